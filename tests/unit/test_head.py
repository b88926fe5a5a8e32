"""The gradient of the output layer's weight, which is added up in a wider dtype than it is handed out in."""

import pytest
import torch

from topd_ray.objective import head
from topd_ray.objective.head import WeightGradient


@pytest.mark.parametrize("num_rows", [1, 2, 7, 10, 33])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_a_sum_is_rounded_in_its_own_memory(num_rows, narrow, wide, monkeypatch):
    monkeypatch.setattr(head, "ROUNDED_ROWS", 3)
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_rows, 6, generator=generator).to(narrow)
    left, right = (torch.randn(*shape, generator=generator).to(narrow) for shape in ((num_rows, 5), (5, 6)))
    num_vocabulary = num_rows - num_rows // 4
    blocks = [slice(start, min(start + 4, num_vocabulary)) for start in range(0, num_vocabulary, 4)]
    gradient = WeightGradient(weight, wide, num_vocabulary)
    for is_first in (True, False):
        for rows in blocks:
            gradient.add(rows, left[rows], right, overwrite=is_first)
    expected = torch.zeros(num_rows, 6)
    expected[:num_vocabulary] = 2 * (left[:num_vocabulary] @ right).float()
    found = gradient.rounded()
    assert found.dtype == narrow and found.is_contiguous()
    torch.testing.assert_close(found, expected.to(narrow))
    assert found.untyped_storage().nbytes() <= (num_rows + 1) * 6 * narrow.itemsize
