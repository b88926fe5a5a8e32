"""No secret is left in text that is to be passed on, and the rest of the text is."""

import time
from pathlib import Path

import pytest

from topd_ray.config.load import dump_config, load_config
from topd_ray.redaction import REDACTED, Redactor

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3tValue0123456789"
KEY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={SECRET}",
        f"export WANDB_API_KEY='{SECRET}' && run",
        f"{{'RAY_AUTH_TOKEN': '{SECRET}', 'N': '1'}}",
        f'{{"aws_secret_access_key": "{SECRET}"}}',
        f'"{{\\"HF_TOKEN\\": \\"{SECRET}\\"}}"',
        f"my_password: {SECRET}",
        f'DB_PASSWORD="two words {SECRET}"',
        f"SIGNING_KEY={SECRET}",
        f"tool --api-key {SECRET} --verbose",
        f"authorization: Basic {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"sent 'bearer {SECRET}'",
        f"https://user:{SECRET}@index.example/simple",
        f"GET /x?token={SECRET}&n=1",
        f"loading with hf_{SECRET}",
        f"ghp_{SECRET} sk-{SECRET} glpat-{SECRET}",
        f"eyJhbGciOiJI.{SECRET}.{SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"{SECRET}\n-----END PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n",
    ],
)
def test_secrets_by_their_looks(text: str) -> None:
    redact = Redactor({})
    found = redact(f"before\n{text}\nafter")
    assert SECRET not in found and REDACTED in found
    assert redact(found) == found
    known = Redactor({"MY_TOKEN": SECRET})(text)
    assert SECRET not in known and f"{REDACTED}]" not in known


def test_what_surrounds_a_secret_is_kept() -> None:
    redact = Redactor({})
    assert redact(f"a HF_TOKEN={SECRET} b") == f"a HF_TOKEN={REDACTED} b"
    assert redact(f"one\n-----BEGIN PRIVATE KEY-----\n{KEY}\n-----END PRIVATE KEY-----\ntwo") == f"one\n{REDACTED}\ntwo"
    assert redact(f"pip https://me:{SECRET}@host/simple") == f"pip https://{REDACTED}@host/simple"


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens: 64000000",
        "loss of a token: 0.5187204",
        "TOKENIZERS_PARALLELISM=false",
        "eos_token_id=151643151643",
        "the teacher's key: value cache",
        "https://host:8265/api?x=1",
        "tokens/s 1234567.8, key error in sk-learn",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert Redactor({})(text) == text


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_hold_nothing_that_looks_like_a_secret(path: Path) -> None:
    assert Redactor({})(path.read_text()) == path.read_text()
    dumped = dump_config(load_config(path))
    assert Redactor({})(dumped) == dumped


def test_secrets_of_the_environment_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ray-secret-1\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("hub-secret-2")
    (tmp_path / "token").write_text("path-secret-3")
    environment = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "MLFLOW_TRACKING_PASSWORD": "env-secret-4",
        "TOKENIZERS_PARALLELISM": "false-friend",
        "X_TOKEN": "1",
    }
    text = "(ray-secret-1 hub-secret-2 path-secret-3 env-secret-4 false-friend 1)"
    assert Redactor(environment)(text) == f"({REDACTED} {REDACTED} {REDACTED} {REDACTED} false-friend 1)"
    assert str(tmp_path / "token") in Redactor(environment)(f"file {tmp_path / 'token'}")


def test_long_lines_take_no_longer_than_they_should() -> None:
    started = time.monotonic()
    for text in ("A" * 500_000, "a_token" * 70_000, "://a" * 100_000, "-----BEGIN " * 50_000):
        Redactor({})(text)
    assert time.monotonic() - started < 5.0
