"""TRL's side: `trl.py FOLDER DESCRIPTOR CASE NUM_UPDATES`, in an environment with TRL.

Set up as one would who wants it fast on a CPU: float32, no gradient checkpointing, scaled-dot-product attention, a KV
cache, the whole batch in one pass, fused AdamW, no evaluation, no checkpoints, no logging, no progress bar. Its vLLM
generation does not run here: TRL hands vLLM the weights by `load_weights`, which vLLM's CPU engine, having repacked
them, refuses.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from bench.end_to_end import task
from bench.end_to_end.task import Case
from bench.end_to_end.turns import Turns


class Stages:
    """Seconds by stage of the update in hand, taken around methods of the trainer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: Any, method: str, stage: str) -> None:
        plain = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.time(stage):
                return plain(*arguments, **keywords)

        setattr(owner, method, timed)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The update's stages; what lies inside of another one is taken out of that."""
        taken, self.seconds = self.seconds, {}
        forwards = taken.get("teacher_forward", 0.0) + taken.get("student_forward", 0.0)
        taken["loss"] = taken.pop("compute_loss") - forwards
        return taken


class Trainer(DistillationTrainer):  # type: ignore[misc]
    """With its stages timed and the lengths of its responses kept."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.stages = Stages()
        self.lengths: list[int] = []
        self.num_cut = 0
        self.stages.around(self, "compute_loss", "compute_loss")
        self.stages.around(self.accelerator, "backward", "backward")

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        optimizer = super().create_optimizer(*arguments, **keywords)
        self.stages.around(optimizer, "step", "optimizer")
        return optimizer

    def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
        with self.stages.time("generation"):
            completions = super()._generate_single_turn(*arguments, **keywords)
        self.lengths += [len(completion) for completion in completions]
        self.num_cut += sum(completion[-1] not in self.eos_token_ids for completion in completions)
        return completions

    def _get_last_hidden_state(self, model: Any, *arguments: Any, **keywords: Any) -> Any:
        with self.stages.time("teacher_forward" if model is self.teacher_model else "student_forward"):
            return super()._get_last_hidden_state(model, *arguments, **keywords)


class TakeTurns(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Trainer, turns: Turns) -> None:
        self._trainer, self._turns = trainer, turns

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turns.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        lengths, num_cut = trainer.lengths, trainer.num_cut
        trainer.lengths, trainer.num_cut = [], 0
        self._turns.after_update(
            num_tokens=sum(lengths), num_cut=num_cut, stages=trainer.stages.take(), lengths=lengths
        )


def settings(case: Case, num_updates: int, folder: Path) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=1.0,  # reverse KL
        temperature=1.0,
        max_completion_length=case.max_new_tokens,
        per_device_train_batch_size=task.PROMPTS_PER_UPDATE,
        gradient_accumulation_steps=1,
        max_steps=num_updates,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta1=task.BETAS[0],
        adam_beta2=task.BETAS[1],
        adam_epsilon=task.ADAM_EPSILON,
        weight_decay=task.WEIGHT_DECAY,
        max_grad_norm=task.GRADIENT_CLIPPING,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def load(folder: Path) -> Any:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def main(folder: Path, descriptor: int, case: Case, num_updates: int) -> None:
    torch.set_num_threads(task.THREADS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student = load(folder / "student")
    rows = task.read_rows(folder / "train.jsonl")
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    trainer = Trainer(
        model=student,
        teacher_model=load(folder / "teacher"),
        args=settings(case, num_updates, folder),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    turns = Turns(descriptor)
    trainer.add_callback(TakeTurns(trainer, turns))
    trainer.train()
    models = {"before": load(folder / "student"), "after": student}
    turns.finish({key: task.accuracy(model, tokenizer, folder, case.max_new_tokens) for key, model in models.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), task.CASES[sys.argv[3]], int(sys.argv[4]))
