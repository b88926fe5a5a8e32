"""The whole fleet in one process, for a debugger: the same workers, called one after the other."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from topd_ray.actors.events import Event, Guided, Learned, Packed, Published, Written
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.messages import GuidedItem, LearnerCheck, Normalisers, RolloutChunk
from topd_ray.actors.parts import learner_part, rollout_part, teacher_part
from topd_ray.actors.rollout import RolloutWorker
from topd_ray.actors.sharing import check_receipt
from topd_ray.actors.store import LocalStore
from topd_ray.actors.teacher import TeacherWorker
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import EvaluationConfig, TopdConfig
from topd_ray.engines.process import check_build
from topd_ray.errors import ConfigError
from topd_ray.types import Completions, Prompt, RolloutRequest
from topd_ray.weights.bundle import weight_metrics


class InlineFleet:
    """One rollout, one teacher and one learner worker; several of a kind are played by the one, turn by turn.

    Commands wait until `wait` carries them out: one by one in the order they came, but one batch of rollouts after the
    other, new weights between two of them, and all else before the next rollouts.
    """

    def __init__(
        self,
        config: TopdConfig,
        total_updates: int,
        check_interrupt: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        store = LocalStore()
        self._config = config
        self.planned = config
        self.traffic = Traffic()
        self._rollouts: deque[Iterator[Event]] = deque()
        self._orders: deque[Iterator[Event]] = deque()
        self._is_writing = False
        self._must_publish = False
        self._rollout = RolloutWorker(**rollout_part(config), store=store)
        self._teacher = TeacherWorker(**teacher_part(config), store=store)
        self._learner = LearnerWorker(**learner_part(config, rank=0, total_updates=total_updates), store=store)
        self._loaded: list[RolloutWorker | TeacherWorker | LearnerWorker] = []

    @staticmethod
    def check(config: TopdConfig) -> None:
        """Raise ConfigError for what one process cannot do."""
        num_ranks = config.learner.num_ranks
        if num_ranks != 1:
            raise ConfigError(f"--inline runs one learner rank, learner.num_ranks is {num_ranks}: set it to 1")
        check_build(torch.cuda.device_count())

    def start(self) -> None:
        for worker in (self._rollout, self._teacher):
            worker.setup()
            self._loaded.append(worker)
        self.learner_attention = self._learner.setup(init_method=None)
        self._loaded.append(self._learner)

    def write(self, worker: int, requests: Sequence[RolloutRequest]) -> None:
        self._rollouts.append(self._write(worker, requests))

    def guide(self, teacher: int, chunks: Sequence[RolloutChunk], threshold: float) -> None:
        self._orders.append(self._guide(teacher, tuple(chunks), threshold))

    def learn(self, items: Sequence[GuidedItem]) -> None:
        self._orders.append(self._learn(items))

    def publish(self) -> None:
        self._must_publish = True

    def excuse(self, role: str) -> None:
        """Nothing is restarted in one process."""

    def wait(self) -> list[Event]:
        if self._orders:
            return list(self._orders.popleft())
        if self._must_publish and not self._is_writing:
            self._must_publish = False
            version = self.publish_weights()
            return [
                Packed(metrics=tuple(self._weight_metrics)),
                *(Published(worker=worker, version=version) for worker in range(self._config.rollout.num_workers)),
            ]
        if self._rollouts:
            event = next(self._rollouts[0], None)
            self._is_writing = event is not None
            if event is not None:
                return [event]
            self._rollouts.popleft()
        return []

    def _write(self, worker: int, requests: Sequence[RolloutRequest]) -> Iterator[Event]:
        chunks = self._rollout.generate(requests, whole=self._config.run.deterministic)
        if self._config.resamples:  # the engine continues no prefix while it is writing
            chunks = iter(list(chunks))
        for chunk in chunks:
            yield Written(worker=worker, chunk=chunk)

    def _guide(self, teacher: int, chunks: tuple[RolloutChunk, ...], threshold: float) -> Iterator[Event]:
        student = self._rollout if self._config.resamples else None
        yield Guided(teacher=teacher, sources=chunks, chunk=self._teacher.look_ahead(chunks, threshold, student))

    def _learn(self, items: Sequence[GuidedItem]) -> Iterator[Event]:
        yield Learned(report=self._learner.learn(items, Normalisers.of(items)))

    def publish_weights(self) -> int:
        bundle = self._learner.pack_weights()
        assert bundle is not None, "one rank always packs its weights"
        receipt = self._rollout.update_weights(bundle)
        assert receipt is not None, "nothing overtakes it in one process"
        self._weight_metrics = weight_metrics(bundle, [receipt])
        return check_receipt(0, [bundle], receipt)

    def evaluate(
        self, prompts: Sequence[Prompt], *, model: str, evaluation: EvaluationConfig, seed: int
    ) -> Iterator[Completions]:
        worker = self._rollout if model == "student" else self._teacher
        return worker.evaluate(prompts, evaluation=evaluation, seed=seed)

    def own_teacher(self, requests: Sequence[RolloutRequest]) -> list[GuidedItem]:
        return self._rollout.own_teacher(requests, self._config.teacher.top_k)

    def preflight(self, items: list[GuidedItem]) -> LearnerCheck:
        return self._learner.preflight(items)

    def verify_teacher(self, requests: Sequence[RolloutRequest]) -> float | None:
        return self._teacher.verify(self._rollout.generate_whole(requests))

    def save_learner(self, folder: Path) -> None:
        self._learner.save(folder)

    def load_learner(self, folder: Path) -> int:
        return self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)

    def shutdown(self) -> None:
        """The learner, which came last, first: the last vLLM engine to leave takes the process group with it."""
        self._orders.clear()
        self._rollouts.clear()
        for worker in reversed(self._loaded):
            worker.shutdown()
