"""Where payloads live between the worker that makes them and the one that uses them."""

from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import ObjectLostError

from topd_ray.errors import PayloadLostError

Payload = Any
"""An Arrow record batch, or a list of weight chunks."""
Handle = Any
"""A ray.ObjectRef, or in one process the payload itself."""


class Store(Protocol):
    """Puts payloads where other workers can get them without a copy through the driver."""

    spans_processes: bool
    """whether workers are processes of their own"""

    def put(self, payload: Payload) -> Handle: ...

    def get(self, handles: Sequence[Handle]) -> list[Payload]:
        """The payloads in order; a handle that comes twice is fetched once, and gives the same object twice.

        Raises PayloadLostError where one is gone with the worker or node that held it.
        """
        ...

    def node_address(self) -> str:
        """Of the node that this process is on, where the other nodes reach it."""
        ...


class LocalStore:
    """One process: a handle is the payload."""

    spans_processes = False

    def put(self, payload: Payload) -> Handle:
        return payload

    def get(self, handles: Sequence[Handle]) -> list[Payload]:
        return list(handles)

    def node_address(self) -> str:
        return "127.0.0.1"


class RayStore:
    """Ray's object store; an object lives as long as the worker that put it and anyone who holds its handle.

    `ray.put` always writes to shared memory, whereas a small return value would travel through its caller.
    """

    spans_processes = True

    def put(self, payload: Payload) -> Handle:
        return ray.put(payload)

    def get(self, handles: Sequence[Handle]) -> list[Payload]:
        once = list(dict.fromkeys(handles))
        try:
            payloads = dict(zip(once, ray.get(once), strict=True))
        except ObjectLostError as error:
            raise PayloadLostError(str(error).splitlines()[0]) from error
        return [payloads[handle] for handle in handles]

    def node_address(self) -> str:
        return str(ray.util.get_node_ip_address())
