import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_python_runs(capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "{6: 1.0}", "what the comment beside it says"
