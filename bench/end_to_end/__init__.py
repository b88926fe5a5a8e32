"""End to end against TRL: `topd run` and its `DistillationTrainer` on the same pair, prompts, optimiser and cores.

    .venv-bench/bin/python -m bench.end_to_end [--cases short long] [--updates N] [--methods opd topd]

`compare.py` gives the sides turns of a few updates each, `ours.py` and `trl.py` are the two sides, each a process of
its own and of its own environment, `task.py` holds what they have in common.
"""

from bench.end_to_end.compare import measure

__all__ = ["measure"]
