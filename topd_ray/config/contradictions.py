"""Fields that are right one by one and cannot work together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from topd_ray.config.schema import TopdConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Contradiction:
    """What contradicts what."""

    keys: tuple[str, ...]
    """dotted keys involved"""
    text: str
    """what was found and what would be right"""


class ContradictionError(ValueError):
    """Carries the contradictions out of pydantic's validation."""

    def __init__(self, found: tuple[Contradiction, ...]) -> None:
        super().__init__("; ".join(f"{', '.join(one.keys)}: {one.text}" for one in found))
        self.found = found


def contradictions(config: "TopdConfig") -> Iterator[Contradiction]:
    """Every contradiction in `config`."""
    yield from _of_batch(config)
    yield from _of_pipeline(config)
    yield from _of_objective(config)
    yield from _of_branches(config)
    yield from _of_learner(config)
    yield from _of_evaluation(config)
    yield from _of_engines(config)
    yield from _of_gpus(config)
    yield from _of_weights(config)


def _of_batch(config: "TopdConfig") -> Iterator[Contradiction]:
    if config.batch_size < config.learner.num_ranks:
        yield Contradiction(
            keys=("rollout.prompts_per_step", "rollout.samples_per_prompt", "learner.num_ranks"),
            text=f"found a batch of {config.rollout.prompts_per_step} x {config.rollout.samples_per_prompt} = "
            f"{config.batch_size} trajectories for {config.learner.num_ranks} ranks; right would be at least one each",
        )
    budget = config.learner.max_tokens_per_micro_batch
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if budget != "one_trajectory" and budget < longest:
        yield Contradiction(
            keys=("learner.max_tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_new_tokens"),
            text=f"found {budget} tokens of one forward pass for trajectories of up to "
            f"{config.data.max_prompt_tokens} + {config.rollout.max_new_tokens}; right would be at least {longest}, "
            "or one_trajectory",
        )
    elif budget != "one_trajectory" and config.near_future.branches and budget < longest + config.near_future.window:
        yield Contradiction(
            keys=("learner.max_tokens_per_micro_batch", "near_future.window"),
            text=f"found {budget} tokens of one forward pass for prefixes of up to {longest} with windows of "
            f"{config.near_future.window} of their own; right would be at least "
            f"{longest + config.near_future.window}, or one_trajectory",
        )


def _of_pipeline(config: "TopdConfig") -> Iterator[Contradiction]:
    if config.run.deterministic and config.pipeline.max_staleness > 0:
        yield Contradiction(
            keys=("run.deterministic", "pipeline.max_staleness"),
            text=f"found max_staleness {config.pipeline.max_staleness}, with which a batch depends on who is done "
            "first; right would be max_staleness 0, or deterministic false",
        )
    if config.pipeline.max_staleness > 0 and config.rollout.top_p < 1.0 and config.objective.importance_horizon > 0:
        yield Contradiction(
            keys=("pipeline.max_staleness", "rollout.top_p", "objective.importance_horizon"),
            text=f"found top_p {config.rollout.top_p} with importance weights of the whole policy; right would be "
            "top_p 1, or importance_horizon 0",
        )


def _of_objective(config: "TopdConfig") -> Iterator[Contradiction]:
    discount = config.objective.kl_discount
    if discount > 0.0 and config.objective.divergence != "sampled_pg":
        yield Contradiction(
            keys=("objective.kl_discount", "objective.divergence"),
            text=f"found kl_discount {discount:g} with the divergence {config.objective.divergence}; right would be "
            "sampled_pg, whose advantage it discounts, or kl_discount 0",
        )
    if discount > 0.0 and config.pipeline.max_staleness > 0:
        yield Contradiction(
            keys=("objective.kl_discount", "pipeline.max_staleness"),
            text=f"found kl_discount {discount:g} with max_staleness {config.pipeline.max_staleness}; right would be "
            "max_staleness 0, or kl_discount 0: no importance weight corrects for later tokens of an older policy",
        )
    if config.objective.divergence != "sampled_pg":
        return
    if config.objective.cap != "none":
        yield Contradiction(
            keys=("objective.divergence", "objective.cap"),
            text=f"found sampled_pg with cap {config.objective.cap}; right would be cap none, or a divergence: "
            "the policy-gradient form has no token loss to cap",
        )
    if config.rollout.top_p < 1.0:
        yield Contradiction(
            keys=("objective.divergence", "rollout.top_p"),
            text=f"found sampled_pg with top_p {config.rollout.top_p}; right would be top_p 1: "
            "its importance weights are of the whole policy",
        )


def _of_branches(config: "TopdConfig") -> Iterator[Contradiction]:
    """Of guidance beside the trajectory."""
    num_teachers, num_rollouts = config.teacher.num_workers, config.rollout.num_workers
    if config.resamples and config.run.deterministic and num_teachers > num_rollouts:
        yield Contradiction(
            keys=("near_future.student_window", "run.deterministic", "teacher.num_workers", "rollout.num_workers"),
            text=f"found resample with {num_teachers} teachers for {num_rollouts} rollout workers, which then serve in "
            "the order they are asked; right would be a rollout worker for each teacher, or deterministic false",
        )
    staleness = config.pipeline.max_staleness
    if staleness == 0:
        return
    if config.near_future.student_window == "resample":
        yield Contradiction(
            keys=("near_future.student_window", "pipeline.max_staleness"),
            text=f"found resample with max_staleness {staleness}, where the policy that wrote a trajectory may be gone "
            "by the time it should continue it; right would be max_staleness 0, or reuse",
        )
    elif config.near_future.branches and config.objective.importance_horizon > 0:
        yield Contradiction(
            keys=("near_future.guidance_context", "pipeline.max_staleness", "objective.importance_horizon"),
            text=f"found teacher with max_staleness {staleness} and importance weights, which are not known beside the "
            "trajectory; right would be max_staleness 0, importance_horizon 0, or student",
        )


def _of_learner(config: "TopdConfig") -> Iterator[Contradiction]:
    if config.learner.offload_optimizer and config.learner.zero_stage == 0:
        yield Contradiction(
            keys=("learner.offload_optimizer", "learner.zero_stage"),
            text="found offload_optimizer with zero_stage 0; right would be zero_stage 1, 2 or 3",
        )
    if config.learner.loss_kernel == "triton" and config.resources.gpus_per_learner == 0:
        yield Contradiction(
            keys=("learner.loss_kernel", "resources.gpus_per_learner"),
            text="found triton, whose kernels run on a GPU, for a learner without one; right would be torch",
        )


def _of_evaluation(config: "TopdConfig") -> Iterator[Contradiction]:
    if config.evaluation.temperature == 0.0 and config.evaluation.num_runs > 1:
        yield Contradiction(
            keys=("evaluation.num_runs", "evaluation.temperature"),
            text=f"found {config.evaluation.num_runs} greedy answers per prompt, which are all the same; "
            "right would be temperature > 0, or num_runs 1",
        )
    if config.evaluation.every > 0 and config.data.heldout is None:
        yield Contradiction(
            keys=("evaluation.every", "data.heldout"),
            text=f"found an evaluation every {config.evaluation.every} updates without held-out prompts; "
            "right would be every 0, or data.heldout set",
        )


def _of_engines(config: "TopdConfig") -> Iterator[Contradiction]:
    for role, section in (("rollout", config.rollout), ("teacher", config.teacher)):
        if section.max_batched_tokens < section.max_num_seqs:
            yield Contradiction(
                keys=(f"{role}.max_batched_tokens", f"{role}.max_num_seqs"),
                text=f"found {section.max_batched_tokens} tokens of one forward pass for {section.max_num_seqs} "
                f"sequences at once; right would be max_batched_tokens of at least max_num_seqs",
            )


def _of_gpus(config: "TopdConfig") -> Iterator[Contradiction]:
    """Ray hands out several GPUs only whole, and vLLM takes one for each part of a tensor-parallel engine."""
    sizes = {"rollout": config.rollout.tensor_parallel_size, "teacher": config.teacher.tensor_parallel_size}
    keys = tuple(f"gpus_per_{role}" for role in ("rollout", "teacher", "learner"))
    unset = [f"resources.{key}" for key in keys if getattr(config.resources, key) is None]
    if config.resources.wait_seconds > 0 and unset:
        yield Contradiction(
            keys=("resources.wait_seconds", *unset),
            text=f"found {config.resources.wait_seconds:g} s to wait for nodes, whose GPUs cannot be counted yet; "
            "right would be the GPUs of every role, 0 for none",
        )
    for role in ("rollout", "teacher", "learner"):
        num_gpus: float | None = getattr(config.resources, f"gpus_per_{role}")
        if num_gpus is None:
            continue
        key = f"resources.gpus_per_{role}"
        if num_gpus > 1 and not num_gpus.is_integer():
            yield Contradiction(keys=(key,), text=f"found {num_gpus:g}; right would be a whole number, or at most 1")
        elif num_gpus > 0 and sizes.get(role, 1) not in (1, num_gpus):
            yield Contradiction(
                keys=(key, f"{role}.tensor_parallel_size"),
                text=f"found {num_gpus:g} GPUs for an engine spread over {sizes[role]}; right would be {sizes[role]}, "
                "unset, or 0 without GPUs",
            )
    yield from contradictions_of_shares(config)


def contradictions_of_shares(config: "TopdConfig") -> Iterator[Contradiction]:
    """Of workers that get a share of a GPU each, as far as `resources.gpus_per_*` are known."""
    learner = config.resources.gpus_per_learner or 0
    if 0 < learner < 1 and config.learner.num_ranks > 1:
        yield Contradiction(
            keys=("resources.gpus_per_learner", "learner.num_ranks"),
            text=f"found {learner:g} of a GPU for each of {config.learner.num_ranks} ranks; right would be 1: "
            "Ray may put two ranks on one GPU, which NCCL refuses",
        )
    for role, section in (("rollout", config.rollout), ("teacher", config.teacher)):
        share: float = getattr(config.resources, f"gpus_per_{role}") or 0
        if 0 < share < 1 and section.kv_cache_bytes is None:
            yield Contradiction(
                keys=(f"resources.gpus_per_{role}", f"{role}.kv_cache_bytes"),
                text=f"found {share:g} of a GPU for an engine that sizes its cache by what it finds free, while others "
                "load there; right would be kv_cache_bytes set, or a GPU of its own",
            )


def _of_weights(config: "TopdConfig") -> Iterator[Contradiction]:
    if config.weights.channel == "ipc":
        yield from _of_ipc(config)
    elif config.weights.channel == "broadcast":
        yield from _of_broadcast(config)


def _of_broadcast(config: "TopdConfig") -> Iterator[Contradiction]:
    """gloo and NCCL do not meet, and NCCL refuses two members on one GPU."""
    learner, rollout = config.resources.gpus_per_learner, config.resources.gpus_per_rollout
    on_cpus = learner == 0 and rollout == 0
    on_own_gpus = learner is not None and rollout is not None and learner >= 1 and rollout >= 1
    if not on_cpus and not on_own_gpus:
        shown = ["unset" if one is None else f"{one:g}" for one in (learner, rollout)]
        yield Contradiction(
            keys=("weights.channel", "resources.gpus_per_learner", "resources.gpus_per_rollout"),
            text=f"found broadcast with {shown[0]} GPUs for a learner rank and {shown[1]} for a rollout worker; right "
            "would be 0 and 0, or at least 1 and 1, or object_store",
        )


def _of_ipc(config: "TopdConfig") -> Iterator[Contradiction]:
    """CUDA IPC opens the memory of the one GPU that both processes are on."""
    learner, rollout = config.resources.gpus_per_learner, config.resources.gpus_per_rollout
    if not learner or not rollout or learner + config.rollout.num_workers * rollout > 1:
        shown = ["unset" if one is None else f"{one:g}" for one in (learner, rollout)]
        yield Contradiction(
            keys=("weights.channel", "resources.gpus_per_learner", "resources.gpus_per_rollout", "rollout.num_workers"),
            text=f"found ipc with {shown[0]} GPUs for a learner rank and {shown[1]} for each of "
            f"{config.rollout.num_workers} rollout workers; right would be shares of one GPU above 0, together at most "
            "1, or object_store",
        )
    if config.pipeline.max_staleness > 0:
        yield Contradiction(
            keys=("weights.channel", "pipeline.max_staleness"),
            text=f"found ipc with max_staleness {config.pipeline.max_staleness}: the learner holds one version, which "
            "all rollout workers must have read before the next; right would be max_staleness 0, or object_store",
        )
    if config.learner.num_ranks > 1 or config.rollout.tensor_parallel_size > 1:
        yield Contradiction(
            keys=("weights.channel", "learner.num_ranks", "rollout.tensor_parallel_size"),
            text=f"found ipc with {config.learner.num_ranks} learner ranks and engines of "
            f"{config.rollout.tensor_parallel_size} GPUs; right would be 1 and 1, or object_store",
        )
