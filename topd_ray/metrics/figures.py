"""Every figure a run writes: its key in metrics.jsonl, its name in Prometheus, its unit, and what it means.

docs/metrics.md is generated from this table: `python -m topd_ray.metrics.figures [PATH]`.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Unit = Literal["", "nats", "tokens", "seconds", "bytes", "ratio", "tokens_per_second", "bytes_per_second"]
DEFAULT_PATH = Path("docs/metrics.md")
RAY_PREFIX = "ray_"
"""Ray puts it before the name of every metric that a program gives it."""
_UNITS = {"": "", "ratio": "0 to 1", "tokens_per_second": "tokens/s", "bytes_per_second": "bytes/s"}
_HEAD = """# Metrics

Every figure a run writes. Generated from `topd_ray/metrics/figures.py` by `python -m topd_ray.metrics.figures`; edit
that file instead of this page. [monitoring.md](monitoring.md) says how to watch them.

`metrics.jsonl` holds one line for each update, check and evaluation: `step`, the number of updates made, and figures by
key. A figure that nothing was counted for is left out; one that is not finite is `null`. Means are over everything of
the update, on all workers, weighed by what they count. In Prometheus each is a gauge with the last value and the tag
`run`.
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a run."""

    key: str
    unit: Unit
    text: str

    @property
    def name(self) -> str:
        """The name given to Ray: `topd_`, the key's words, the unit at the end, as Prometheus wants it."""
        words = self.key.replace("/", "_")
        if not self.unit or words.endswith(f"_{self.unit}"):
            return f"topd_{words}"
        return "_".join(["topd", *(word for word in words.split("_") if word != self.unit), self.unit])

    @property
    def prometheus_name(self) -> str:
        """The name that a query asks for."""
        return RAY_PREFIX + self.name


STEP = Figure("step", "", "Updates made.")


def _evaluation(model: str, *, sampled: bool = False) -> Iterable[Figure]:
    prefix = f"evaluation/{model}{'_sampled' if sampled else ''}"
    drawn = ", drawn as rollouts are (evaluation.sampled_runs)" if sampled else ""
    yield Figure(
        f"{prefix}/pass_at_1", "ratio", f"Share of the {model}'s answers to held-out prompts that are right{drawn}."
    )
    yield Figure(f"{prefix}/pass_at_1_low", "ratio", "Lower end of its 95 % bootstrap interval over prompts.")
    yield Figure(f"{prefix}/pass_at_1_high", "ratio", "Upper end of that interval.")
    yield Figure(f"{prefix}/answer_tokens", "tokens", "Mean length of an answer.")
    yield Figure(f"{prefix}/cut_by_length", "ratio", "Share of answers that reached evaluation.max_new_tokens.")


_SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Progress": (
        STEP,
        Figure("run/trained_tokens", "tokens", "Response tokens the learner has seen, all sessions of the run."),
        Figure("run/policy_version", "", "Version of the weights that the update made."),
        Figure("run/driver_payload_bytes", "bytes", "Arrays and Arrow buffers that came to the driver: 0."),
        Figure(
            "run/driver_message_bytes", "bytes", "Counts, handles and metrics that came since workers were started."
        ),
    ),
    "Loss": (
        Figure("loss/total", "nats", "What is minimised: L_OPD + objective.guidance_weight x L_traj."),
        Figure("loss/opd", "nats", "L_OPD, mean over response tokens, after objective.cap."),
        Figure("loss/divergence", "nats", "The same before the cap; under sampled_pg the reverse KL."),
        Figure("loss/guidance", "nats", "L_traj: KL to the guidance, mean over guided positions (under topd)."),
        Figure("loss/capped", "ratio", "Share of response tokens whose loss the cap has cut."),
        Figure("student/entropy", "nats", "Entropy of the student on the teacher's support, mean over tokens."),
        Figure("student/tail", "ratio", "Student's probability outside of the support."),
        Figure("student/agrees_with_teacher", "ratio", "Share of tokens where both find the same one likeliest."),
        Figure("teacher/tail", "ratio", "Teacher's probability outside of its top_k and the sampled token."),
        Figure("teacher/sampled_nll", "nats", "Teacher's -log-prob of the sampled token, mean over tokens."),
        Figure("mismatch/logprob", "nats", "Learner's minus rollout engine's log-prob of the sampled token."),
        Figure("mismatch/abs_logprob", "nats", "The same without its sign: how far the two engines are apart."),
    ),
    "Learner": (
        Figure("learner/tokens", "tokens", "Response tokens of the update."),
        Figure("learner/micro_batches", "", "Forward passes of one rank."),
        Figure("learner/padding", "ratio", "Share of positions computed for nothing."),
        Figure("learner/grad_norm", "", "Norm of the gradient before clipping."),
        Figure("learner/learning_rate", "", "Learning rate of the update."),
    ),
    "Rollouts and the near future": (
        Figure("rollout/tokens", "tokens", "Written since the last update."),
        Figure("teacher/tokens", "tokens", "Scored since the last update."),
        Figure("rollout/response_tokens", "tokens", "Mean length of a response."),
        Figure("rollout/cut_by_length", "ratio", "Share of responses that reached rollout.max_new_tokens."),
        Figure("rollout/behaviour_nll", "nats", "Student's -log-prob of its own tokens, mean over tokens."),
        Figure("near_future/windows", "", "Windows of a trajectory, mean."),
        Figure("near_future/distance", "", "Transport distance of both futures (cost: 1 - cosine), mean over windows."),
        Figure("near_future/divergent", "ratio", "Share of windows whose distance exceeds the threshold."),
        Figure("near_future/threshold", "", "That threshold: a quantile of the latest distances before the update."),
        Figure("near_future/capped_tokens", "ratio", "Share of response tokens that objective.cap chose to cap."),
    ),
    "Time and throughput": (
        Figure("seconds/step", "seconds", "Wall time of the update, from the first rollout to the new weights."),
        Figure("seconds/rollout_and_look_ahead", "seconds", "Rollouts and teachers, which overlap."),
        Figure("seconds/learn", "seconds", "The learner."),
        Figure("seconds/publish_weights", "seconds", "Until every rollout engine has acknowledged the new weights."),
        Figure("seconds/evaluation", "seconds", "An evaluation."),
        Figure("throughput/trained_tokens_per_second", "tokens_per_second", "Trained tokens over the wall time."),
        Figure("throughput/rollout_tokens_per_second", "tokens_per_second", "Written by all rollout workers."),
        Figure("throughput/teacher_tokens_per_second", "tokens_per_second", "Scored by all teacher workers."),
        Figure("throughput/learner_tokens_per_second", "tokens_per_second", "Trained on while the learner works."),
    ),
    "Queues and waiting": (
        Figure("queue/rollout", "", "Requests that wait for a rollout worker."),
        Figure("queue/writing", "", "Trajectories that are being written."),
        Figure("queue/teacher", "", "Trajectories that wait for a teacher worker."),
        Figure("queue/buffer", "", "Guided trajectories that wait for the learner."),
        Figure("queue/bytes", "bytes", "Their size, which buffer.max_bytes bounds."),
        Figure(
            "waiting/rollout",
            "seconds",
            "Time a rollout worker had nothing to do, mean; here and below without evaluations and checkpoints.",
        ),
        Figure("waiting/teacher", "seconds", "Time a teacher worker had nothing to do, mean."),
        Figure("waiting/learner", "seconds", "Time the learner had nothing to do."),
        Figure("staleness/mean", "", "Versions between the policy that wrote a trajectory and the learner's, mean."),
        Figure("staleness/max", "", "The same, largest of the update."),
        Figure("staleness/dropped", "", "Trajectories dropped as too old, and drawn again."),
        Figure("staleness/importance_weight", "", "Importance weight of tokens that an older policy wrote, mean."),
        Figure("staleness/importance_clipped", "ratio", "Share of these whose weight is at objective.importance_clip."),
    ),
    "Faults": (
        Figure("faults/restarts_rollout", "", "Rollout workers made anew since all workers were last started."),
        Figure("faults/restarts_teacher", "", "Teacher workers made anew."),
        Figure("faults/restarts_learner", "", "Times this driver started all workers again, from a checkpoint."),
        Figure("faults/quarantined", "", "Trajectories given up since the last update: workers failed with them."),
        Figure("faults/payloads_lost", "", "Trajectories written again since then: they were lost on the way."),
    ),
    "Weights": (
        Figure("weights/bytes", "bytes", "Size of the policy in the rollout engines' dtype."),
        Figure("weights/chunks", "", "Pieces it was packed in."),
        Figure("weights/overhead", "", "Packed bytes over that size."),
        Figure("weights/seconds_pack", "seconds", "Learner: until all is packed, and can be had."),
        Figure("weights/seconds_fetch", "seconds", "Rollout worker: until all is fetched and checked, mean."),
        Figure("weights/fetch_bytes_per_second", "bytes_per_second", "Its rate: over a link, how much of it is used."),
        Figure("weights/seconds_load", "seconds", "Rollout engine: until it serves the new policy, mean."),
    ),
    "Checks before the first update": (
        Figure(
            "preflight/learner_difference",
            "nats",
            "Learner against rollout engine: largest difference on a token.",
        ),
        Figure("preflight/self_distillation_loss", "nats", "Loss with the student as its own teacher."),
        Figure(
            "preflight/teacher_difference", "nats", "Teacher engine against plain forward pass: largest difference."
        ),
    ),
    "Evaluation": (*_evaluation("student"), *_evaluation("student", sampled=True), *_evaluation("teacher")),
}
FIGURES = {figure.key: figure for figures in _SECTIONS.values() for figure in figures}
"""By key."""


def reference() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(_section(title, figures) for title, figures in _SECTIONS.items())])


def main(arguments: list[str]) -> None:
    """Write the page to the path given, by default to docs/metrics.md below the working folder."""
    path = Path(arguments[0]) if arguments else DEFAULT_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference(), encoding="utf-8")
    print(f"wrote {path}")


def _section(title: str, figures: Iterable[Figure]) -> str:
    rows = "".join(
        f"| `{one.key}` | {_UNITS.get(one.unit, one.unit)} | {one.text} | `{one.prometheus_name}` |\n"
        for one in figures
    )
    return f"## {title}\n\n| key | unit | meaning | in Prometheus |\n| --- | --- | --- | --- |\n{rows}"


if __name__ == "__main__":
    main(sys.argv[1:])
