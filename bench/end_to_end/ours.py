"""Our side: `ours.py FOLDER DESCRIPTOR CASE NUM_UPDATES METHOD`, in the environment of `make demo`.

What runs is `topd run` as it is, its workers on Ray. The clock is read when a step's figures reach `metrics.jsonl`, so
that whatever happens between two steps counts; the stages are the run's own figures.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from bench.end_to_end import task
from bench.end_to_end.task import Case
from bench.end_to_end.turns import Turns
from topd_ray.cli import main as topd
from topd_ray.metrics.sinks import Sinks


def overrides(folder: Path, case: Case, num_updates: int, method: str) -> list[str]:
    """What differs from jobs/demo.yaml: every setting that TRL's side shares, and nothing to wait for."""
    values = {
        "run.root": folder,
        "run.name": method,
        "run.steps": num_updates,
        "run.checkpoint_every": 0,
        "data.train": folder / "train.jsonl",
        "data.heldout": "null",
        "data.shuffle": "false",
        "data.max_prompt_tokens": case.max_prompt_tokens,
        "student.model": folder / "student",
        "teacher.model": folder / "teacher",
        "teacher.top_k": "full",
        "rollout.prompts_per_step": task.PROMPTS_PER_UPDATE,
        "rollout.samples_per_prompt": 1,
        "rollout.temperature": 1.0,
        "rollout.max_new_tokens": case.max_new_tokens,
        "objective.method": method,
        "objective.divergence": "reverse",
        "learner.learning_rate": case.learning_rate,
        "learner.schedule": "constant",
        "learner.warmup_fraction": 0.0,
        "learner.betas": f"[{task.BETAS[0]}, {task.BETAS[1]}]",
        "learner.adam_epsilon": task.ADAM_EPSILON,
        "learner.weight_decay": task.WEIGHT_DECAY,
        "learner.gradient_clipping": task.GRADIENT_CLIPPING,
        "metrics.tensorboard": "false",
        "resources.threads_per_learner": task.THREADS,
    }
    return [f"{key}={value}" for key, value in values.items()]


class TurnSinks(Sinks):
    """The run's sinks, with a turn's end after a step's figures are written."""

    turns: Turns

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        if step == 0:  # the pre-flight check, the last thing before the first update
            self.turns.start()
            return
        stages = {key.removeprefix("seconds/"): value for key, value in values.items() if key.startswith("seconds/")}
        del stages["step"]
        num_cut = round(values["rollout/cut_by_length"] * task.PROMPTS_PER_UPDATE)
        self.turns.after_update(num_tokens=round(values["learner/tokens"]), num_cut=num_cut, stages=stages)


def main(folder: Path, descriptor: int, case: Case, num_updates: int, method: str) -> None:
    import topd_ray.pipeline.sinks as sinks

    TurnSinks.turns = Turns(descriptor)
    sinks.Sinks = TurnSinks  # type: ignore[attr-defined]
    code = topd(["run", "jobs/demo.yaml", *overrides(folder, case, num_updates, method)])
    if code != 0:
        sys.exit(code)
    TurnSinks.turns.finish({"after": grade_export(folder / method / "export", folder, case)})


def grade_export(export: Path, folder: Path, case: Case) -> float:
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    torch.set_num_threads(task.THREADS)
    student = Qwen3ForCausalLM.from_pretrained(export, dtype=torch.float32)
    return task.accuracy(student, AutoTokenizer.from_pretrained(export), folder, case.max_new_tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), task.CASES[sys.argv[3]], int(sys.argv[4]), sys.argv[5])
