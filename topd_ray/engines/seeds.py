"""Seeds that depend on what is drawn, never on when or beside what it is drawn."""

from hashlib import blake2b


def stable_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) from the run's seed and names of what is drawn; the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
