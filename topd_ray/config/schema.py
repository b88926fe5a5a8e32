"""The config of a run. Every field is documented here and nowhere else; docs/config.md is generated from it.

Nothing here imports torch, Ray or vLLM: a config is checked before any of them is loaded.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from topd_ray.config.contradictions import ContradictionError, contradictions
from topd_ray.config.section import DecayRate, Dtype, Fraction, PathText, PositiveInt, Section
from topd_ray.config.study_schema import StudiesConfig

MIN_OBJECT_STORE_BYTES = 75 * 1024**2
"""Ray's own OBJECT_STORE_MINIMUM_MEMORY_BYTES."""


class RunConfig(Section):
    """The run itself: its name, its folder, its length, and how it resumes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run, also of its folder."""
    root: PathText = "runs"
    """Folder that holds the run folders; this run writes to `root/name`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn: prompt order, rollouts, sampled teacher windows."""
    deterministic: bool = False
    """Fix thread counts and the composition of every batch, so that the same config gives the bitwise same student."""
    steps: PositiveInt | None = None
    """Learner updates to make; unset, `epochs` decides."""
    epochs: PositiveInt = 1
    """Passes over the training prompts, when `steps` is unset."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` goes on from the last checkpoint if there is one, `must` insists on one, `never` refuses a used folder."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 50
    """Updates between two checkpoints; 0 writes one only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are deleted after a new one is complete."""

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


class ArithmeticConfig(Section):
    """The embedded task, used when `data.train` or `data.heldout` says `arithmetic`."""

    difficulty: Annotated[int, Field(ge=1, le=8)] = 4
    """Largest number of operators in an expression."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problem generator."""
    num_train: PositiveInt = 20_000
    """Distinct training prompts."""
    num_heldout: PositiveInt = 500
    """Distinct held-out prompts; none of them is a training prompt, whatever the seed."""


class DataConfig(Section):
    """Where prompts come from."""

    train: PathText = "arithmetic"
    """`arithmetic`, a .jsonl or .parquet file, or a folder written by `datasets.save_to_disk`."""
    heldout: PathText | None = "arithmetic"
    """Like `train`, for evaluation; its rows need an `answer`. Unset: no evaluation."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    system_prompt: str | None = None
    """System message put in front of rows that give a `prompt` (rows with `messages` are taken as they are)."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Extra arguments of the chat template, for instance `enable_thinking: false`."""
    max_prompt_tokens: PositiveInt = 800
    """Longest prompt, the chat template included (tokens)."""
    overlong: Literal["error", "skip"] = "error"
    """What happens to longer prompts: stop with the row's number, or skip and count them."""
    shuffle: bool = True
    """Draw the prompts of each epoch in an order of its own."""


class ModelConfig(Section):
    """A model: a Hugging Face folder or a hub name."""

    model: PathText
    """Local folder in the Hugging Face layout with safetensors, or hub name."""
    revision: str | None = None
    """Branch, tag or commit, for hub names."""
    dtype: Dtype = "bfloat16"
    """Type of the weights in the inference engine."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class StudentConfig(ModelConfig):
    """The model that is trained."""


class TeacherConfig(ModelConfig):
    """The model that is learnt from, and its vLLM engines."""

    top_k: PositiveInt | Literal["full"] = 64
    """Teacher tokens kept per position; `full` keeps the whole vocabulary."""
    num_workers: PositiveInt = 1
    """Teacher engines, each a Ray actor."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs an engine is spread over."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    """Share of a GPU's memory an engine may take (GPU only); means nothing where `kv_cache_bytes` is set."""
    kv_cache_bytes: PositiveInt | None = None
    """Key-value cache of an engine (bytes); unset: derived from the memory share on GPUs, 1 GiB on CPUs. Engines that
    share a GPU need it."""
    max_num_seqs: PositiveInt = 256
    """Sequences an engine runs at once."""
    max_batched_tokens: PositiveInt = 2048
    """Tokens of one forward pass; scoring materialises [tokens, vocabulary] in float32, so this bounds its memory. At
    least `max_num_seqs`, as each running sequence takes one."""
    enforce_eager: bool = False
    """Skip graph capture and compilation: slower steps, faster start."""
    verify: bool = True
    """Before the first step compare the engine's scores with a plain forward pass (skipped, and said, above 4 GB)."""


class RolloutConfig(Section):
    """How the student writes, and its vLLM engines."""

    prompts_per_step: PositiveInt = 16
    """Prompts of one update."""
    samples_per_prompt: PositiveInt = 4
    """Rollouts of each prompt; `prompts_per_step * samples_per_prompt` is the batch of one update."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature; student and teacher log-probabilities are taken at it as well."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole distribution."""
    max_new_tokens: PositiveInt = 8000
    """Longest response (tokens)."""
    num_workers: PositiveInt = 1
    """Rollout engines, each a Ray actor."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs an engine is spread over."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    """Share of a GPU's memory an engine may take (GPU only); means nothing where `kv_cache_bytes` is set."""
    kv_cache_bytes: PositiveInt | None = None
    """Key-value cache of an engine (bytes); unset: derived from the memory share on GPUs, 1 GiB on CPUs. Engines that
    share a GPU need it."""
    max_num_seqs: PositiveInt = 256
    """Sequences an engine runs at once."""
    max_batched_tokens: PositiveInt = 8192
    """Tokens of one forward pass; at least `max_num_seqs`, as each running sequence takes one."""
    enforce_eager: bool = False
    """Skip graph capture and compilation: slower steps, faster start."""


class NearFutureConfig(Section):
    """Which positions the teacher looks ahead from, how far, and how the futures are compared (paper, section 4)."""

    ranking: Literal["teacher_nll", "sampled_kl", "random"] = "teacher_nll"
    """Loss that ranks candidates: -log p_T(x_t), or log p_S(x_t) - log p_T(x_t). `random` draws as many positions at
    random instead, to see what the choice is worth."""
    candidate_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.0225
    """Share of a trajectory's response tokens taken as candidates (the paper's 218 of 9,688); at least one."""
    min_distance: PositiveInt = 1
    """Smallest distance between two candidates (tokens)."""
    window: PositiveInt = 50
    """Length K of the near future (tokens)."""
    teacher_decoding: Literal["greedy", "sample"] = "greedy"
    """How the teacher continues a prefix."""
    student_window: Literal["reuse", "resample"] = "reuse"
    """The student's near future: `reuse` the rollout's own next tokens, or have the student continue the prefix anew.
    Guidance then lies on the new tokens, after that prefix: the learner forwards every fork with its prefix, one by
    one, which costs a multiple of the update. Only synchronous (`pipeline.max_staleness` 0)."""
    guidance_context: Literal["student", "teacher"] = "student"
    """Whose window stands before a guided position. `teacher`: the student learns the teacher's window by plain
    cross-entropy after the prefix and the teacher's own tokens, in place of the transported targets on its own. It
    costs what `student_window: resample` costs."""
    embedding: Literal["teacher", "student"] = "teacher"
    """Whose input embeddings give the ground cost 1 - cosine."""
    transport: Literal["exact", "entropic"] = "exact"
    """Solver of the transport plan."""
    plan: Literal["transport", "identity"] = "transport"
    """What the student learns of the teacher's window: what the transport plan moves to each of its positions, or, at
    position i, the teacher's i-th token (positions beyond the shorter window then learn nothing). Distances, and with
    them the forks, are those of the transport either way."""
    entropic_epsilon: Annotated[float, Field(gt=0.0)] = 0.05
    """Regularisation of the entropic solver (in units of the ground cost)."""
    false_alarm_quantile: Fraction = 0.3
    """Candidates below this quantile of the recent transport distances are false alarms and guide nothing."""
    quantile_window: PositiveInt = 4096
    """How many of the latest distances the running quantile looks back on."""

    @property
    def branches(self) -> bool:
        """Whether guidance lies beside the trajectory, on tokens that are not the rollout's."""
        return self.student_window == "resample" or self.guidance_context == "teacher"


class ObjectiveConfig(Section):
    """The loss: L_OPD + guidance_weight * L_traj (paper, section 4)."""

    method: Literal["topd", "opd"] = "topd"
    """`topd` adds near-future guidance to per-token distillation, `opd` is the latter alone."""
    divergence: Literal["reverse", "forward", "jsd", "sampled_pg"] = "reverse"
    """Per-token divergence of student and teacher; `sampled_pg` is the policy-gradient form on sampled tokens."""
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture of the generalised Jensen-Shannon divergence."""
    importance_clip: Annotated[float, Field(gt=0.0)] = 2.0
    """Largest importance weight: of a prefix that an older policy wrote, and of a token under `sampled_pg`."""
    importance_horizon: Annotated[int, Field(ge=0)] = 64
    """Tokens before a position whose p_S / p_behaviour make up its importance weight, in trajectories that an older
    policy wrote; 0 leaves them unweighted."""
    kl_discount: DecayRate = 0.0
    """Discount of the future under `sampled_pg`: the advantage of token t is the sum over k of kl_discount^k
    (log p_T - log p_S)(x_{t+k}) to the end of its trajectory; 0 leaves the token's own. Takes another product with the
    output layer, and on-policy trajectories (`pipeline.max_staleness` 0)."""
    guidance_weight: Annotated[float, Field(ge=0.0)] = 0.3
    """lambda."""
    guidance_reduction: Literal["mean", "sum"] = "mean"
    """L_traj over guided positions: their mean, or their sum per trajectory."""
    cap: Literal["none", "low_ot", "matched_high_ot"] = "none"
    """The paper's ablation: cap false alarms, or as many real forks, at the median token loss of their trajectory."""

    @property
    def looks_ahead(self) -> bool:
        """Whether the teacher continues prefixes at all."""
        return self.method == "topd" or self.cap != "none"


class LearnerConfig(Section):
    """The DeepSpeed optimiser."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_fraction: Fraction = 0.05
    """Share of the updates spent on a linear warm-up."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay."""
    gradient_clipping: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    dtype: Dtype = "bfloat16"
    """Type of weights and activations; the loss is always computed in float32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory (GPU only)."""
    num_ranks: PositiveInt = 1
    """Data-parallel learner ranks, each a Ray actor."""
    max_tokens_per_micro_batch: PositiveInt | Literal["one_trajectory"] = 16_384
    """Tokens of one forward pass on one rank, prompts included: whole trajectories lie end to end in one row, without
    padding. It bounds the memory of activations, so the longest trajectory has to fit. `one_trajectory` gives each a
    pass of its own, for students whose layers cannot keep trajectories apart (recurrent or chunked attention)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    logits_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at once while the loss is computed; unset, an eighth of a micro-batch's, at most 1,024,
    or what 48 MiB (on GPUs 512 MiB) of float32 hold if that is more. Triton's are of the product's dtype: a fifth, at
    most 2,048, or what 512 MiB hold."""
    loss_kernel: Literal["torch", "triton"] = "torch"
    """What reads and writes these logits: torch, or on a GPU Triton kernels, which took a third of the time for the
    same loss on one H200 (bench/README.md); no whole run with them has been seen there."""

    @property
    def micro_batch_budget(self) -> int:
        """Tokens of one forward pass; 1 has room for no second trajectory."""
        return 1 if self.max_tokens_per_micro_batch == "one_trajectory" else self.max_tokens_per_micro_batch


class BufferConfig(Section):
    """The trajectory buffer: references to record batches in Ray's object store."""

    max_bytes: PositiveInt = 2 * 1024**3
    """Bytes of referenced record batches; above it, producers wait. The learner takes a batch out only when it is
    whole, and the run stops with an error if one batch does not fit."""


class PipelineConfig(Section):
    """How far rollouts, teacher and learner may overlap."""

    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates the learner may be ahead of the policy that wrote a trajectory when it is trained on. 0: synchronous, and
    exactly on-policy. Above, rollouts go on while the learner learns; a trajectory that has become too old is dropped,
    counted and drawn again, and importance weights (objective.importance_*) correct for the older policy."""
    on_new_weights: Literal["finish", "interrupt"] = "interrupt"
    """What becomes of responses that are being written when a new policy arrives. `interrupt`: they go on under it from
    where they are (each token keeps the log-prob it was drawn with, and the trajectory counts as old as its first
    token). `finish`: the engine ends them first, and begins no others until it serves the new policy."""


class FaultsConfig(Section):
    """What happens when workers, nodes or inputs fail."""

    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts of one worker; one more ends the run. A restart counts for `window_seconds`, or until an input goes into
    quarantine that may have been the reason; and for longer until there is progress: trajectories that the rollout
    worker has written or the teacher guided since. A restart of the learner takes all workers with it, and the run goes
    on from its last checkpoint; progress is then an update that this process had not made before."""
    window_seconds: Annotated[float, Field(gt=0.0)] = 600.0
    """See `max_restarts`."""
    stall_seconds: Annotated[float, Field(gt=0.0)] = 1800.0
    """A worker that has work and delivers nothing for this long counts as lost."""
    replace_seconds: Annotated[float, Field(gt=0.0)] = 900.0
    """How long a lost worker may take to be back, its place on a node and the loading of its model included."""
    max_attempts: Annotated[int, Field(ge=3)] = 4
    """Failures of a rollout or teacher worker that one input may be part of. The last two attempts are made with the
    input alone on a worker; if both fail, it is put into quarantine (quarantine.jsonl) and the run goes on without it.
    An input that kills the learner is not: see `max_restarts`."""


class WeightsConfig(Section):
    """How a new policy reaches the rollout engines."""

    channel: Literal["object_store", "broadcast", "ipc"] = "object_store"
    """`object_store`: through Ray's object store, anywhere; `broadcast`: from the learner to all rollout workers at
    once, with gloo where `resources.gpus_per_learner` and `gpus_per_rollout` are 0, with NCCL where they are at least
    1; `ipc`: through the memory of the one GPU that Ray has and that the learner and all rollout workers share
    (synchronous only, `pipeline.max_staleness` 0)."""
    chunk_bytes: Annotated[int, Field(ge=1024**2)] = 64 * 1024**2
    """Weights that travel as one piece (bytes); a larger tensor is a piece by itself."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 300.0
    """How long the engines may take to acknowledge a version. A broadcast is begun anew, without them, where workers
    hold it up for a quarter of that."""


class EvaluationConfig(Section):
    """pass@1 on the held-out prompts."""

    before: bool = True
    """Evaluate the student before the first update."""
    after: bool = True
    """Evaluate it after the last one."""
    teacher: bool = True
    """Evaluate the teacher as well, once."""
    every: Annotated[int, Field(ge=0)] = 0
    """Updates between two evaluations during training; 0: none."""
    num_prompts: PositiveInt | None = None
    """Held-out prompts used; unset: all."""
    num_runs: PositiveInt = 1
    """Answers per prompt, averaged (greedy decoding needs one)."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling."""
    sampled_runs: Annotated[int, Field(ge=0)] = 0
    """Answers per prompt of one more evaluation of the student, before the first update and after the last one, drawn
    as rollouts are (`rollout.temperature`, `rollout.top_p`); 0: none."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer (tokens); unset: the rollout's."""
    grader: Literal["arithmetic", "math"] = "arithmetic"
    """`arithmetic` compares the final integer exactly, `math` uses math-verify."""


class MetricsConfig(Section):
    """Sinks besides `metrics.jsonl`, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    prometheus: bool = False
    """Give the figures to Ray's metrics. The Ray agent of the driver's node exports them on a port of its own, to
    everybody who reaches it; `.prometheus/NAME.json` in `run.root` says where (docs/monitoring.md). Not with
    `--inline`."""


class ResourcesConfig(Section):
    """What the actors may use. Unset fields are chosen by what the machine or the cluster has."""

    ray_address: str | None = None
    """Address of a running Ray cluster (`auto` finds it); unset: the environment's RAY_ADDRESS, or, without that, a
    cluster of this machine, for this run alone."""
    gpus_per_rollout: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs of one rollout worker: 0, a share of one (with `rollout.kv_cache_bytes`), or its tensor-parallel size (the
    default where there are GPUs; fewer GPUs than workers are shared). 0 needs vLLM's CPU build."""
    gpus_per_teacher: Annotated[float, Field(ge=0.0)] | None = None
    """Like `gpus_per_rollout`, for teacher workers."""
    gpus_per_learner: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs of one learner rank, a share of one only for a single rank; unset: like `gpus_per_rollout`."""
    threads_per_rollout: PositiveInt = 1
    """CPU threads of one rollout worker."""
    threads_per_teacher: PositiveInt = 1
    """CPU threads of one teacher worker."""
    threads_per_learner: PositiveInt = 1
    """CPU threads of one learner rank."""
    rollout_nodes: dict[str, str] = {}
    """Ray node labels that a node must carry to hold a rollout worker, for instance `{ray.io/node-group: rollout}`;
    empty: any node."""
    teacher_nodes: dict[str, str] = {}
    """Like `rollout_nodes`, for teacher workers."""
    learner_nodes: dict[str, str] = {}
    """Like `rollout_nodes`, for learner ranks."""
    wait_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """How long to wait for nodes that the cluster does not have yet, because an autoscaler or a queue is bringing them;
    0: what is missing is an error at once."""
    object_store_bytes: Annotated[int, Field(ge=MIN_OBJECT_STORE_BYTES)] | None = None
    """Ray's object store on this machine; unset: Ray's own choice. Only for a cluster started by the run."""


class TopdConfig(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    student: StudentConfig
    teacher: TeacherConfig
    rollout: RolloutConfig = RolloutConfig()
    near_future: NearFutureConfig = NearFutureConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    buffer: BufferConfig = BufferConfig()
    pipeline: PipelineConfig = PipelineConfig()
    faults: FaultsConfig = FaultsConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    resources: ResourcesConfig = ResourcesConfig()
    studies: StudiesConfig = StudiesConfig()

    @property
    def resamples(self) -> bool:
        """Whether the student continues prefixes anew."""
        return self.objective.looks_ahead and self.near_future.student_window == "resample"

    @property
    def batch_size(self) -> int:
        """Trajectories of one update."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def sampled_evaluation(self) -> EvaluationConfig:
        """How the student's answers are drawn like rollouts (`evaluation.sampled_runs`)."""
        rollout = self.rollout
        drawn = {"num_runs": self.evaluation.sampled_runs, "temperature": rollout.temperature, "top_p": rollout.top_p}
        return self.evaluation.model_copy(update=drawn)

    @model_validator(mode="after")
    def _no_contradictions(self) -> "TopdConfig":
        if found := tuple(contradictions(self)):
            raise ContradictionError(found)
        return self
