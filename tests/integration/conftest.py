"""What the tests of engines share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def no_process_group_left() -> Iterator[None]:
    """The learner leaves its process group to the process; the tests of other modules share this one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
