"""One GPU for several processes of an NCCL group: it lets two hosts share one, but not two processes of a host."""

import os


def pose_as_a_host() -> None:
    """Call it before this process's first NCCL group; NCCL takes hosts at their word. Harmless without NCCL."""
    os.environ.update(NCCL_HOSTID=str(os.getpid()), NCCL_SOCKET_IFNAME="lo")
