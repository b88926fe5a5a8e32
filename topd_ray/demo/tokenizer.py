"""The embedded pairs' tokenizers, in Hugging Face layout: one of characters, and one of words for worded arithmetic.

The ids are: four special tokens, the three role names of the chat template as single tokens, then the alphabet (or the
pieces of `worded.py`). Encoding and decoding lose nothing within these; anything else becomes `<|unk|>`.
"""

import string
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topd_ray.demo.worded import PIECE, PIECES

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"
SPECIALS = (PAD, START, END, UNKNOWN)
ROLES = ("system", "user", "assistant")
ALPHABET = string.digits + "+-*()=# \n" + string.ascii_lowercase + ".,?!:;/'\"_<>"
MAX_TOKENS = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; 64 entries. Ids follow the order of SPECIALS, ROLES, ALPHABET."""
    return _assemble(ALPHABET, r"[\s\S]")


def build_worded_tokenizer() -> PreTrainedTokenizerFast:
    """Digits, signs and words of worded arithmetic, each one token. Ids follow the order of SPECIALS, ROLES, PIECES."""
    return _assemble(PIECES, PIECE)


def _assemble(pieces: Iterable[str], pattern: str) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template, of `pieces` as `pattern` cuts them out of a text."""
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *ROLES, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
        padding_side="left",
    )


def render_prompt(tokenizer: PreTrainedTokenizerFast, expression: str) -> list[int]:
    """Token ids of `expression` as a user's turn, up to where the assistant starts to write."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": expression}], add_generation_prompt=True, tokenize=False
    )
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return token_ids
