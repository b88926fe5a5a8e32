"""A whole run: build the fleet, check it, resume, train, evaluate, export, shut down."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from topd_ray.config.load import dump_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.schedule import rollout_requests
from topd_ray.engines.attention import EAGER
from topd_ray.engines.optimisation import learning_rate
from topd_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RolloutError,
    RunInterrupted,
    TeacherError,
    TopdError,
    WorkerLostError,
)
from topd_ray.evaluation.pass_at_1 import PassAt1, pass_at_1
from topd_ray.metrics.records import reduce
from topd_ray.metrics.timing import Stopwatch
from topd_ray.pipeline.books import Books
from topd_ray.pipeline.checkpoint import Checkpoints, RunState, write_whole
from topd_ray.pipeline.evaluate import collect
from topd_ray.pipeline.fleet import Fleet
from topd_ray.pipeline.flow import Flow
from topd_ray.pipeline.interrupt import Interrupt
from topd_ray.pipeline.plan import Plan, Say, plan_run
from topd_ray.pipeline.post_mortem import write_post_mortem
from topd_ray.pipeline.preflight import NUM_PROMPTS, preflight
from topd_ray.pipeline.setbacks import Setbacks
from topd_ray.provenance import commit
from topd_ray.types import Metric, RolloutRequest


class FleetClass(Protocol):
    """Makes a fleet that is still to be started; `check` tells beforehand, and cheaply, whether it can be."""

    def __call__(
        self, config: TopdConfig, total_updates: int, check_interrupt: Callable[[], None], say: Say
    ) -> Fleet: ...

    def check(self, config: TopdConfig) -> None: ...


def run(plan: Plan, fleet_class: FleetClass, say: Say) -> RunState:
    """Carry out a plan. A signal or an error leaves the last checkpoint, and no process, behind.

    Raises RunInterrupted after a signal; a checkpoint of the last update is then written.
    """
    fleet_class.check(plan.config)
    folder = plan.config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    setbacks = Setbacks(plan.config)
    with _only_process_in(folder), Interrupt() as interrupt:
        write_whole(folder / "config.yaml", dump_config(plan.config))
        lost: WorkerLostError | None = None
        while True:
            fleet = fleet_class(plan.config, plan.total_updates, interrupt.check, say)
            try:
                return _run_session(plan, fleet, interrupt, say, setbacks)
            except ConfigError as error:
                if lost is None:
                    raise
                raise WorkerLostError(f"{lost}, and the workers could not start again: {error}") from error
            except WorkerLostError as error:
                lost = error
                if not setbacks.budget.spend():
                    too_often = f"the run had to begin again {setbacks.budget}"
                    raise WorkerLostError(f"{too_often}, the last time: {error}") from error
                say(f"{error}; all workers start again, from the last checkpoint")
                plan = plan_run(again(fleet.planned), say)


def _run_session(plan: Plan, fleet: Fleet, interrupt: Interrupt, say: Say, setbacks: Setbacks) -> RunState:
    with ExitStack() as stack:
        books = Books.open(plan)
        stack.callback(books.close)
        say("starting the workers")
        stack.callback(fleet.shutdown)
        stack.enter_context(_post_mortem(plan.config, setbacks, say))
        fleet.start()
        try:
            return Session(plan, fleet, books, interrupt, say, setbacks).train()
        except (ConfigError, DataError) as error:  # not the user's input any more
            raise TopdError(f"{type(error).__name__} while running: {error}") from error


@contextmanager
def _post_mortem(config: TopdConfig, setbacks: Setbacks, say: Say) -> Iterator[None]:
    """Write one, while the workers' Ray still runs, for an error that ends the run and is not the user's input."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if not (isinstance(error, WorkerLostError) and setbacks.budget.has_room):
            write_post_mortem(config, error, say)
            if not isinstance(error, RunInterrupted):  # which has said so itself
                _say_last_checkpoint(config, say)
        raise


def _say_last_checkpoint(config: TopdConfig, say: Say) -> None:
    latest = Checkpoints(config.run.folder / "checkpoints", config.run.keep_checkpoints).latest()
    say(f"the last checkpoint is {latest}; the same command goes on from it" if latest else "there is no checkpoint")


def again(config: TopdConfig) -> TopdConfig:
    """The config of a run that goes on from its own last checkpoint, if it has one, once lost nodes are back."""
    wait_seconds = max(config.resources.wait_seconds, config.faults.replace_seconds)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"resume": "auto"}),
            "resources": config.resources.model_copy(update={"wait_seconds": wait_seconds}),
        }
    )


@contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    """Raise ConfigError if another process trains in this run folder."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {folder}: choose another run.name") from None
        yield


class Session:
    """One process's share of a run: from the last checkpoint, or the start, to the end or an interrupt."""

    def __init__(
        self, plan: Plan, fleet: Fleet, books: Books, interrupt: Interrupt, say: Say, setbacks: Setbacks
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._fleet = fleet
        self._books = books
        self._interrupt = interrupt
        self._setbacks = setbacks
        self._say = say
        self._folder = plan.config.run.folder.absolute()
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints", plan.config.run.keep_checkpoints, plan.identity, say
        )
        self._state = replace(plan.state, total_updates=plan.total_updates)
        self._tasks = plan.tasks
        self._distances = plan.distances
        self._started = time.monotonic() - plan.state.seconds
        self._watch = Stopwatch()
        self._saved_step = plan.state.step if plan.learner_folder else -1

    def train(self) -> RunState:
        """Everything from the pre-flight to the summary; returns the final state."""
        evaluation = self._config.evaluation
        try:
            self._begin()
            self._evaluate_once("teacher", evaluation.teacher)
            before = evaluation.before and self._state.step == 0
            self._evaluate_once("before", before)
            self._evaluate_once("before_sampled", before and evaluation.sampled_runs > 0)
            try:
                self._train_steps()
            except (RolloutError, TeacherError):
                if self._flow.is_settled:  # the learner is well, and has what is counted
                    self._save()
                raise
            except WorkerLostError as error:
                if batch := self._flow.learning:
                    raise self._setbacks.while_making(self._state.step + 1, batch, error) from error
                raise
            self._save()
            self._flow.drain()
            self._evaluate_once("after", evaluation.after)
            self._evaluate_once("after_sampled", evaluation.after and evaluation.sampled_runs > 0)
        except RunInterrupted:
            self._save()
            self._say(f"checkpoint of update {self._state.step} written; the same command goes on from it")
            raise
        self._export()
        self._state = replace(self._state, seconds=time.monotonic() - self._started)
        self._write_summary()
        return self._state

    def _begin(self) -> None:
        if self._fleet.learner_attention == EAGER:
            self._say(
                "the learner's attention is the model's own code, whose memory grows with the square of a forward "
                "pass's tokens (learner.max_tokens_per_micro_batch); its log says why"
            )
        if self._plan.learner_folder is not None:
            self._fleet.load_learner(self._plan.learner_folder)
            self._say(f"resumed at update {self._state.step} of {self._plan.total_updates}")
            self._say_other_rate()
        self._state = replace(self._state, policy_version=self._fleet.publish_weights())
        report = preflight(self._fleet, self._config, self._preflight_requests(), self._say)
        self._books.write_metrics(self._state.step, reduce(report.metrics()))
        self._flow = Flow(
            self._config,
            self._fleet,
            self._tasks,
            reopened=self._plan.reopened,
            updates_left=self._plan.total_updates - self._state.step,
            policy_version=self._state.policy_version,
            threshold=lambda: self._distances.value,
            check_interrupt=self._interrupt.check,
            say=self._say,
        )

    def _say_other_rate(self) -> None:
        """Where a run ends decides on the learning rate of each of its updates."""
        was, now, step = self._plan.state.total_updates, self._plan.total_updates, self._state.step
        if was is not None and was != now:
            before, after = (learning_rate(self._config.learner, step, total) for total in (was, now))
            self._say(
                f"the run was to end at update {was}, and ends at {now} now: the learning rate of update {step + 1} is "
                f"{after:.3g} instead of {before:.3g}"
            )

    def _train_steps(self) -> None:
        total = self._plan.total_updates
        self._evaluate_on_the_way()  # the session before may have been interrupted in it
        with tqdm(total=total, initial=self._state.step, unit="update", disable=None, smoothing=0.1) as progress:
            while self._state.step < total:
                self._interrupt.check()
                metrics = self._step()
                progress.update()
                progress.set_postfix({"loss": f"{metrics['loss/total']:.3f}"})
                self._evaluate_on_the_way()
                if self._due(self._config.run.checkpoint_every):
                    self._save()

    def _step(self) -> dict[str, float]:
        """One update; the state changes only once it is complete, so that an interrupted one is simply made again."""
        payload_bytes = self._fleet.traffic.payload_bytes
        with self._watch.time("step"):
            update = self._flow.update()
        num_tokens = sum(item.num_tokens for item in update.items)
        # Before the update's own distances: in a synchronous run, the one that its windows met.
        threshold = Metric(key="near_future/threshold", sum=self._distances.value)
        self._distances.update(distance for item in update.items for distance in item.distances)
        self._state = replace(
            self._state,
            step=self._state.step + 1,
            policy_version=update.policy_version,
            schedule=self._tasks.state(),
            quantile=self._distances.state(),
            trained_tokens=self._state.trained_tokens + num_tokens,
            driver_payload_bytes=self._state.driver_payload_bytes + self._fleet.traffic.payload_bytes - payload_bytes,
            seconds=time.monotonic() - self._started,
        )
        values = reduce([*update.metrics, threshold, *self._watch.take(), *self._run_metrics()])
        seconds = values["seconds/step"]
        values["throughput/trained_tokens_per_second"] = num_tokens / seconds
        values["throughput/learner_tokens_per_second"] = num_tokens / values["seconds/learn"]
        values["throughput/rollout_tokens_per_second"] = values["rollout/tokens"] / seconds
        values["throughput/teacher_tokens_per_second"] = values["teacher/tokens"] / seconds
        self._books.write_update(self._state.step, update, self._tasks)
        self._books.write_metrics(self._state.step, values)
        self._setbacks.made(self._state.step)
        return values

    def _run_metrics(self) -> list[Metric]:
        return [
            Metric(key="run/trained_tokens", sum=self._state.trained_tokens),
            Metric(key="run/policy_version", sum=self._state.policy_version),
            Metric(key="run/driver_payload_bytes", sum=self._state.driver_payload_bytes),
            Metric(key="run/driver_message_bytes", sum=self._fleet.traffic.message_bytes),
            Metric(key="faults/restarts_learner", sum=self._setbacks.budget.num_spent),
        ]

    def _preflight_requests(self) -> list[RolloutRequest]:
        draws = [(-1, prompt) for prompt in self._plan.train[:NUM_PROMPTS]]
        return rollout_requests(draws, samples=[0], run_seed=self._config.run.seed)

    def _due(self, every: int) -> bool:
        return every > 0 and self._state.step % every == 0

    def _save(self) -> None:
        if self._state.step != self._saved_step:
            self._checkpoints.save(self._state, self._fleet.save_learner)
            self._saved_step = self._state.step

    def _evaluate_once(self, key: str, wanted: bool) -> None:
        if wanted and self._plan.heldout and key not in self._state.accuracy:
            accuracy = {**self._state.accuracy, key: self._evaluate(key).mean}
            self._state = replace(self._state, accuracy=accuracy)

    def _evaluate_on_the_way(self) -> None:
        """If it is due at this update, and was not made by an earlier session."""
        step, key = self._state.step, f"step_{self._state.step}"
        is_on_the_way = 0 < step < self._plan.total_updates and self._due(self._config.evaluation.every)
        if is_on_the_way and key not in self._books.answered:
            with self._watch.time("step"):  # the next one, whose trajectories are written here
                self._flow.drain()
            self._evaluate(key)

    def _evaluate(self, key: str) -> PassAt1:
        model = "teacher" if key == "teacher" else "student"
        sampled = key.endswith("_sampled")
        evaluation = self._config.sampled_evaluation if sampled else self._config.evaluation
        heldout, seed = self._plan.heldout, self._config.run.seed
        watch = Stopwatch()
        with watch.time("evaluation"):
            parts = self._fleet.evaluate(heldout, model=model, evaluation=evaluation, seed=seed)
            completions = collect(parts, len(heldout))
        accuracy = pass_at_1(completions.correct, seed=seed)
        self._say(
            f"pass@1 of the {model}{'' if model == key else ' ' + key.replace('_', ' ')}: {accuracy.mean:.1%} "
            f"[{accuracy.low:.1%}, {accuracy.high:.1%}] on {accuracy.num_prompts} prompts x {accuracy.num_runs}"
        )
        num_answers = accuracy.num_prompts * accuracy.num_runs
        prefix = f"evaluation/{model}{'_sampled' if sampled else ''}"
        values = {
            f"{prefix}/pass_at_1": accuracy.mean,
            f"{prefix}/pass_at_1_low": accuracy.low,
            f"{prefix}/pass_at_1_high": accuracy.high,
            f"{prefix}/answer_tokens": completions.num_tokens / num_answers,
            f"{prefix}/cut_by_length": completions.num_cut / num_answers,
        }
        self._books.write_answers(self._state.step, key, [completions.correct[one.prompt_id] for one in heldout])
        self._books.write_metrics(self._state.step, {**values, **reduce(watch.metrics())})
        return accuracy

    def _export(self) -> None:
        """Replace `export/` only once the new one is whole.

        Raises CheckpointError if it cannot be written, WorkerLostError if a learner rank is lost meanwhile.
        """
        target = self._folder / "export"
        unfinished = target.with_name(".export.tmp")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._fleet.export(unfinished)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        except WorkerLostError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        except Exception as error:  # each writer has errors of its own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(f"{target} could not be written: {error}; the checkpoint is safe") from error

    def _write_summary(self) -> None:
        summary = {
            "objective": self._config.objective.method,
            "accuracy": self._state.accuracy,
            "num_prompts": len(self._plan.heldout),
            "steps": self._state.step,
            "trained_tokens": self._state.trained_tokens,
            "seconds": round(self._state.seconds, 1),
            "driver_payload_bytes": self._state.driver_payload_bytes,
            "commit": commit(),
        }
        write_whole(self._folder / "summary.json", json.dumps(summary, indent=1) + "\n")
