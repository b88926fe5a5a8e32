"""The whole fleet in one process, for a debugger: the same workers, called one after the other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from topd_ray.actors.buffer import TrajectoryBuffer
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.messages import GuidedChunk, GuidedItem, LearnerCheck, Normalisers, RolloutChunk
from topd_ray.actors.parts import learner_part, rollout_part, teacher_part
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.sharing import check_receipts, split_requests
from topd_ray.actors.store import LocalStore
from topd_ray.actors.teacher import TeacherWorker
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import ConfigError
from topd_ray.types import Completions, Prompt, RolloutRequest, UpdateReport


class InlineFleet:
    """One rollout, one teacher and one learner worker; several of a kind are played by the one, turn by turn."""

    def __init__(
        self, config: TopdConfig, total_updates: int, check_interrupt: Callable[[], None] = lambda: None
    ) -> None:
        store = LocalStore()
        self._config = config
        self._check_interrupt = check_interrupt
        self.traffic = Traffic()
        self.buffer = TrajectoryBuffer(config.buffer)
        self._rollout = RolloutWorker(**rollout_part(config), store=store)
        self._teacher = TeacherWorker(**teacher_part(config), store=store)
        self._learner = LearnerWorker(**learner_part(config, rank=0, total_updates=total_updates), store=store)
        self._rollout.setup()
        self._teacher.setup()
        self.learner_attention = self._learner.setup(init_method=None)

    @staticmethod
    def check(config: TopdConfig) -> None:
        """Raise ConfigError for what one process cannot do."""
        num_ranks = config.learner.num_ranks
        if num_ranks != 1:
            raise ConfigError(f"--inline runs one learner rank, learner.num_ranks is {num_ranks}: set it to 1")

    def rollout(self, requests: Sequence[RolloutRequest]) -> Iterator[RolloutChunk]:
        for share in split_requests(requests, self._config.rollout.num_workers):
            for chunk in self._rollout.generate(share, whole=self._config.run.deterministic):
                self._check_interrupt()
                yield chunk

    def look_ahead(self, rollouts: Iterable[RolloutChunk], threshold: float) -> Iterator[GuidedChunk]:
        for chunk in rollouts:
            yield self._teacher.look_ahead([chunk], threshold)

    def learn(self, items: Sequence[GuidedItem]) -> UpdateReport:
        return self._learner.learn(items, Normalisers.of(items))

    def publish_weights(self) -> int:
        bundle = self._learner.pack_weights()
        assert bundle is not None, "one rank always packs its weights"
        return check_receipts(bundle, [self._rollout.update_weights(bundle)])

    def evaluate(self, prompts: Sequence[Prompt], *, model: str, seed: int) -> Iterator[Completions]:
        worker = self._rollout if model == "student" else self._teacher
        return worker.evaluate(prompts, seed=seed)

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        return self._rollout.own_teacher(requests, self._config.teacher.top_k)

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        return self._learner.preflight(items)

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        return self._teacher.verify(list(self._rollout.generate(requests, whole=True)))

    def save_learner(self, folder: Path) -> None:
        self._learner.save(folder)

    def load_learner(self, folder: Path) -> int:
        return self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)

    def shutdown(self) -> None:
        """The learner first: the last vLLM engine to leave takes the process group with it."""
        self._learner.shutdown()
        self._rollout.shutdown()
        self._teacher.shutdown()
