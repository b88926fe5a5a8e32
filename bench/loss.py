"""The fused TOPD loss against the naive one, eager and under torch.compile: time and memory, forward and backward.

    python -m bench.loss [--tokens N] [--vocabulary V] [--width D] [--top-k K] [--repeats R] [--threads T]

The naive loss makes all logits in float32, takes log-softmax, gathers the support, and leaves the rest to autograd; its
divergence and guidance are the same functions of the same numbers. The floor is three products (logits, and their
gradient back into hidden states and weight): 6 N V D operations, timed here as three bare matmuls of these shapes.
Peak memory is what a fresh child process's resident set gains while the loss runs (GPU: allocator peak), the
gradients that must be returned excepted.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.report import save
from topd_ray.objective import LossBatch, LossSpec, Support, divergence, topd_loss

SIDES = ("ours", "ours_opd", "naive", "compiled")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="loss")
    return parser.parse_args()


class Problem:
    """Inputs of one loss: random hidden states and head, a random teacher, guidance at every tenth token."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        num, vocabulary, width, top_k = arguments.tokens, arguments.vocabulary, arguments.width, arguments.top_k
        self.num_tokens = num
        self.hidden = torch.randn(num, width, device=self.device).to(dtype).requires_grad_()
        self.head = (torch.randn(vocabulary, width, device=self.device) * width**-0.5).to(dtype).requires_grad_()
        ids = torch.stack([torch.randperm(vocabulary, device=self.device)[:top_k] for _ in range(num)])
        logprobs = torch.randn(num, top_k, device=self.device).log_softmax(1) - 0.1
        guided = torch.zeros(num, dtype=torch.long, device=self.device)
        guided[::10] = 2
        num_guided = int(guided.sum())
        self.num_guided = num_guided / 2
        self.batch = LossBatch(
            sampled_ids=ids[:, 0],
            teacher_topk_ids=ids,
            teacher_topk_logprobs=logprobs,
            teacher_sampled_logprobs=logprobs[:, 0],
            behaviour_logprobs=logprobs[:, 0],
            capped=torch.zeros(num, dtype=torch.bool, device=self.device),
            segment_ids=torch.zeros(num, dtype=torch.long, device=self.device),
            target_indptr=torch.cat([guided.new_zeros(1), guided.cumsum(0)]),
            target_ids=torch.randint(0, vocabulary, (num_guided,), device=self.device),
            target_weights=torch.full((num_guided,), 0.5, device=self.device),
            target_entropy=torch.zeros(num, device=self.device),
        )
        self.chunk_tokens = arguments.chunk_tokens

    def ours(self, method: Any = "topd") -> Tensor:
        spec = LossSpec(method=method, chunk_tokens=self.chunk_tokens)
        counts = {"num_tokens": self.num_tokens, "num_guided": self.num_guided}
        return topd_loss(self.hidden, self.head, self.batch, spec, **counts)[0]

    def naive(self) -> Tensor:
        return naive(self.hidden, self.head, self.batch, self.num_tokens, self.num_guided)

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Loss and gradients; the loss's value."""
        self.hidden.grad = self.head.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value.item()


def naive(hidden: Tensor, head: Tensor, batch: LossBatch, num_tokens: float, num_guided: float) -> Tensor:
    """The TOPD loss (reverse, temperature 1, lambda 0.3) over all logits at once."""
    support = Support.build(
        batch.teacher_topk_ids, batch.teacher_topk_logprobs, batch.sampled_ids, batch.teacher_sampled_logprobs
    )
    logp_NV = linear(hidden, head).float().log_softmax(1)
    picked_NC = logp_NV.gather(1, support.ids)
    inside_N = picked_NC.exp().masked_fill(~support.mask[:, :-1], 0.0).sum(1)
    tail_N = (1.0 - inside_N).clamp(min=1e-6).log()
    student_NC = torch.cat([picked_NC, tail_N.unsqueeze(1)], dim=1).masked_fill(~support.mask, 0.0)
    loss = divergence(student_NC, support.teacher_logp, support.mask, "reverse").sum() / num_tokens
    rows_Z = torch.repeat_interleave(batch.target_indptr.diff(), output_size=batch.target_ids.shape[0])
    guidance = -(batch.target_weights * logp_NV[rows_Z, batch.target_ids]).sum() - batch.target_entropy.sum()
    return loss + 0.3 * guidance / num_guided


def sides(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    compiled = torch.compile(naive)
    return {
        "ours": problem.ours,
        "ours_opd": lambda: problem.ours("opd"),
        "naive": problem.naive,
        "compiled": lambda: compiled(
            problem.hidden, problem.head, problem.batch, problem.num_tokens, problem.num_guided
        ),
    }


def floor(problem: Problem) -> None:
    """The three products no loss can do without."""
    with torch.no_grad():
        logits = problem.hidden @ problem.head.T
        _ = logits @ problem.head, logits.T @ problem.hidden
    if problem.device.type == "cuda":
        torch.cuda.synchronize()


def extra_bytes(arguments: argparse.Namespace, side: str) -> int:
    """Peak memory of one step beyond inputs and returned gradients, in a process of its own."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(arguments, side, sender))
    process.start()
    found = int(receiver.recv())
    process.join()
    return found


def _measure(arguments: argparse.Namespace, side: str, sender: Connection) -> None:
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    loss = sides(problem)[side]
    returned = problem.hidden.nbytes + problem.head.nbytes
    if problem.device.type == "cuda":
        problem.step(loss)
        problem.hidden.grad = problem.head.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.step(loss)
        sender.send(torch.cuda.max_memory_allocated() - before - returned)
        return
    small = argparse.Namespace(**{**vars(arguments), "tokens": 64})  # load libraries and, at its own shape, compile
    warm = Problem(small)
    warm.step(sides(warm)[side])
    del warm
    if side == "compiled":
        problem.step(loss)
        problem.hidden.grad = problem.head.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that are free already must not be used again unseen
    reset_peak()
    before = resident("VmRSS")
    problem.step(loss)
    sender.send(resident("VmHWM") - before - returned)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    steps: dict[str, Callable[[], Any]] = {
        name: (lambda loss=loss: problem.step(loss))  # type: ignore[misc]
        for name, loss in sides(problem).items()
    }
    values = {name: step() for name, step in steps.items()}  # also warms up and compiles
    steps["floor"] = lambda: floor(problem)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    memory = {name: extra_bytes(arguments, name) for name in SIDES}
    save(
        arguments.name,
        {
            "values": values,
            "seconds": {name: round(statistics.median(found), 4) for name, found in seconds.items()},
            "seconds_spread": {name: [round(min(found), 4), round(max(found), 4)] for name, found in seconds.items()},
            "ours_over": {
                name: round(statistics.median(a / b for a, b in zip(seconds["ours"], found, strict=True)), 3)
                for name, found in seconds.items()
            },
            "extra_megabytes": {name: round(found / 1e6, 1) for name, found in memory.items()},
            "memory_over_naive": round(memory["ours"] / memory["naive"], 3),
            "floor_operations": 6 * arguments.tokens * arguments.vocabulary * arguments.width,
            "arguments": vars(arguments),
        },
    )


if __name__ == "__main__":
    main()
