"""Answers of actors: the errors they raise as their own class, and calls that the driver waits for."""

import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, UnserializableException

from topd_ray.actors.calls import Limit
from topd_ray.actors.crew import Crew
from topd_ray.actors.traffic import Traffic
from topd_ray.errors import TopdError, WorkerLostError

POLL_SECONDS = 0.5
PEER_SECONDS = 10.0
"""How long after a learner rank has failed the death of another may still be the reason."""
DEAD_BECAUSE = "The actor is dead because "
DEATH_CHARS = 370
"""Of why an actor is dead: Ray's causes of a sudden end, without its advice."""


def is_loss(error: Exception) -> bool:
    """Whether `error` says that a worker is gone, and not that its code has failed."""
    return isinstance(error, RayActorError) or (
        isinstance(error, RayError) and not isinstance(error, RayTaskError | UnserializableException)
    )


def reason_of(error: Exception | str) -> str:
    """One line that says what has happened."""
    if isinstance(error, RayTaskError) and error.cause is not None:  # whose own words are a traceback
        is_rays = isinstance(error.cause, RayActorError | UnserializableException)
        error = error.cause if is_rays else f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UnserializableException):  # whose first lines are Ray's advice and a traceback
        return lines[-1]
    if isinstance(error, RayActorError):  # then where it was, and why it is dead
        for line in lines[1:]:
            if line.startswith(DEAD_BECAUSE):
                why = textwrap.shorten(line.removeprefix(DEAD_BECAUSE), DEATH_CHARS, placeholder=" ...")
                return f"{lines[0].removesuffix('.')}: {why}"
    return lines[0] if lines else type(error).__name__


class Answers:
    """Of the workers of a crew. What is received is counted as `traffic`."""

    def __init__(self, crew: Crew, traffic: Traffic, check_interrupt: Callable[[], None]) -> None:
        self._crew = crew
        self._traffic = traffic
        self._check_interrupt = check_interrupt

    def get(self, future: ray.ObjectRef, *, count: bool = True) -> Any:
        """An answer, once it is there. Raises RayError, or the TopdError that the worker has raised."""
        try:
            answer = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, TopdError):
                raise error.cause from None
            raise
        if count:
            self._traffic.count(answer)
        return answer

    def fetch(self, futures: Sequence[ray.ObjectRef], limit: Limit) -> list[Any]:
        """All answers, in the order of `futures`, which are of the workers that take part in something.

        Raises WorkerLostError if one of these is gone or `limit` has passed, or else the first error.
        """
        pending = list(futures)
        deadline = time.monotonic() + limit.seconds
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for one in ready:
                self._insist(one, peers=pending, count=False)
            if pending and time.monotonic() > deadline:
                raise WorkerLostError(f"a call has not been answered within {limit}")
        return [self.get(one) for one in futures]

    def stream(self, methods: Sequence[Any], shares: Sequence[Any], limit: Limit, **args: Any) -> Iterator[Any]:
        """What several workers yield, as it comes. Raises WorkerLostError as `fetch` does, for `limit` in silence."""
        streams = [
            method.options(num_returns="streaming").remote(share, **args)
            for method, share in zip(methods, shares, strict=True)
        ]
        heard_at = time.monotonic()
        while streams:
            self._check_interrupt()
            ready = ray.wait(streams, num_returns=1, timeout=POLL_SECONDS)[0]
            if not ready and heard_at + limit.seconds < time.monotonic():
                raise WorkerLostError(f"nothing has been heard of {len(streams)} workers within {limit}")
            for stream in ready:
                try:
                    yield self._insist(next(stream))
                except StopIteration:
                    streams.remove(stream)
                heard_at = time.monotonic()

    def lost(self, error: RayError) -> WorkerLostError:
        """That a worker is gone without which the run cannot go on from where it is."""
        slot = self._crew.slot_of(getattr(error, "actor_id", None)) or "a worker"
        return WorkerLostError(f"{slot} is lost: {reason_of(error)}")

    def loss_among(self, futures: Sequence[ray.ObjectRef]) -> RayError | None:
        """The loss of one of the workers that are asked for `futures`, if that is heard of within PEER_SECONDS.

        A rank that dies makes the others' collective operations fail, and they may be heard of first.
        """
        done = ray.wait(list(futures), num_returns=len(futures), timeout=PEER_SECONDS)[0] if futures else []
        for one in done:
            try:
                self.get(one, count=False)
            except RayError as error:
                if is_loss(error):
                    return error
            except TopdError:  # what it failed with matters less than who died
                continue
        return None

    def _insist(self, future: ray.ObjectRef, *, peers: Sequence[ray.ObjectRef] = (), count: bool = True) -> Any:
        try:
            return self.get(future, count=count)
        except (TopdError, RayError) as error:
            loss = error if isinstance(error, RayError) and is_loss(error) else self.loss_among(peers)
            if loss is not None:
                raise self.lost(loss) from error
            raise
