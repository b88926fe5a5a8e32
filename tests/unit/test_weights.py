"""The weight channel: chunks, fingerprints and the names that make up a policy."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from topd_ray.errors import WeightSyncError
from topd_ray.weights.checksum import _sum_with_numpy, _sum_with_torch, fingerprint
from topd_ray.weights.chunks import ALIGNMENT, Chunk, pack, unpack
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


def unpacked(chunks: Iterable[Chunk]) -> list[tuple[str, torch.Tensor]]:
    return [named for chunk in chunks for named in unpack(chunk)]


def test_chunks_give_back_every_tensor_bit_for_bit():
    tensors = make_tensors()
    for chunk_bytes in (1, 200, 10_000):
        found = dict(unpacked(pack(tensors.items(), version=1, chunk_bytes=chunk_bytes)))
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor)


def test_chunks_are_bounded_unless_one_tensor_is_larger():
    tensors = {str(i): torch.zeros(ALIGNMENT // 4) for i in range(10)} | {"large": torch.zeros(1000)}
    chunks = list(pack(tensors.items(), version=1, chunk_bytes=4 * ALIGNMENT))
    assert [len(chunk.entries) for chunk in chunks] == [4, 4, 2, 1]
    assert [chunk.octets.nbytes for chunk in chunks] == [4 * ALIGNMENT, 4 * ALIGNMENT, 2 * ALIGNMENT, 4032]


def test_a_chunk_is_given_out_before_more_tensors_than_it_holds_are_asked_for():
    asked = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(9):
            asked.append(index)
            yield str(index), torch.zeros(ALIGNMENT // 4)

    chunks = pack(tensors(), version=1, chunk_bytes=3 * ALIGNMENT)
    for wanted in (4, 7):
        next(chunks)
        assert len(asked) == wanted, "a chunk is closed by the first tensor that it has no room for"


def test_unpacked_tensors_share_the_chunks_memory_even_if_read_only(recwarn):
    (chunk,) = pack({"a": torch.zeros(4)}.items(), version=1, chunk_bytes=100)
    chunk.octets.setflags(write=False)
    ((_, tensor),) = unpack(chunk)
    assert tensor.data_ptr() == chunk.octets.ctypes.data
    assert not recwarn.list


def test_the_fingerprint_is_of_the_content_and_not_of_the_order():
    tensors = make_tensors()
    found = unpacked(pack(tensors.items(), version=1, chunk_bytes=100))
    whole = fingerprint(tensors.items())
    assert whole == fingerprint(found[::-1]) == fingerprint(found[:2]) + fingerprint(found[2:])
    assert (whole.num_tensors, whole.num_bytes) == (5, sum(tensor.nbytes for tensor in tensors.values()))
    assert 0 <= whole.checksum < 2**64


@pytest.mark.parametrize("start", [0, 1, 8])
def test_a_fingerprint_summed_by_torch_is_that_summed_by_numpy(start):
    octets = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1003, np.uint8))[start:]
    assert _sum_with_torch(octets) % 2**64 == _sum_with_numpy(octets) % 2**64


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
    in_files = ExpectedTensors(shapes={**expected.shapes, "lm_head.weight": (4, 2)}, tied_head=True)
    assert [name for name, _ in in_files.check(whole)] == ["embed", "norm", "lm_head.weight"]
    assert [name for name, _ in in_files.check(whole[:2])] == ["embed", "norm"]
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
