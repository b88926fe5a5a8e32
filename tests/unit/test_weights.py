"""The weight channel: chunks, fingerprints and the names that make up a policy."""

import numpy as np
import pytest
import torch

from topd_ray.errors import WeightSyncError
from topd_ray.weights.checksum import fingerprint
from topd_ray.weights.chunks import ALIGNMENT, pack, unpack
from topd_ray.weights.naming import ExpectedTensors


def make_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 3).to(torch.bfloat16),
        "c": torch.arange(11),
        "d": torch.randn(()),
        "e": torch.randn(4, 6).t(),
    }


def test_chunks_give_back_every_tensor_bit_for_bit():
    tensors = make_tensors()
    for max_chunk_bytes in (1, 200, 10_000):
        chunks, _ = pack(tensors.items(), max_chunk_bytes)
        found = dict(unpack(chunks))
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor)


def test_chunks_are_bounded_unless_one_tensor_is_larger():
    tensors = {str(i): torch.zeros(ALIGNMENT // 4) for i in range(10)} | {"large": torch.zeros(1000)}
    chunks, receipt = pack(tensors.items(), 4 * ALIGNMENT)
    assert [len(chunk.entries) for chunk in chunks] == [4, 4, 2, 1]
    assert receipt.num_tensors == 11
    assert receipt.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_unpacked_tensors_share_the_chunks_memory_even_if_read_only(recwarn):
    chunks, _ = pack({"a": torch.zeros(4)}.items())
    chunks[0].octets.setflags(write=False)
    ((_, tensor),) = unpack(chunks)
    assert tensor.data_ptr() == chunks[0].octets.ctypes.data
    assert not recwarn.list


def test_the_fingerprint_is_of_the_content_and_not_of_the_order():
    tensors = make_tensors()
    chunks, receipt = pack(tensors.items(), 100)
    assert receipt == fingerprint(tensors.items()) == fingerprint(list(unpack(chunks))[::-1])
    assert 0 <= receipt.checksum < 2**64


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(a=t["a"] + 1e-6),
        lambda t: t.update(a=t["a"].reshape(5, 3)),
        lambda t: t.update(c=t["c"].to(torch.int32)),
        lambda t: t.update(f=t.pop("a")),
        lambda t: t.update(a=t["e"], e=t["a"]),
        lambda t: t.update(zeros=torch.zeros(0)),
    ],
)
def test_the_fingerprint_sees_changes(change):
    tensors = make_tensors()
    before = fingerprint(tensors.items())
    change(tensors)
    assert fingerprint(tensors.items()).checksum != before.checksum


def test_the_fingerprint_counts_every_last_byte():
    octets = torch.from_numpy(np.arange(13, dtype=np.uint8))
    before = fingerprint([("a", octets)]).checksum
    octets[-1] += 1
    assert fingerprint([("a", octets)]).checksum != before


def test_a_policy_is_complete_or_refused():
    expected = ExpectedTensors(shapes={"embed": (4, 2), "norm": (2,)}, tied_head=True)
    embed, norm = torch.zeros(4, 2), torch.zeros(2)
    assert [name for name, _ in expected.check([("norm", norm), ("embed", embed)])] == ["norm", "embed"]
    whole = [("embed", embed), ("norm", norm), ("lm_head.weight", embed)]
    assert [name for name, _ in expected.check(whole)] == ["embed", "norm"]
    for spoilt, message in (
        (whole[:1], "missing: norm"),
        ([*whole, ("extra", norm)], "unknown: extra"),
        ([("embed", norm), ("norm", norm)], r"wrong shape: embed \(2,\) instead of \(4, 2\)"),
        ([*whole, ("norm", norm)], "1 names came twice"),
    ):
        with pytest.raises(WeightSyncError, match=message):
            expected.check(spoilt)
    untied = ExpectedTensors(shapes=expected.shapes, tied_head=False)
    with pytest.raises(WeightSyncError, match=r"unknown: lm_head.weight"):
        untied.check(whole)
