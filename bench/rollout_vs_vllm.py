"""RolloutEngine.generate against bare vllm.LLM.generate on the same requests.

    python -m bench.rollout_vs_vllm [--model FOLDER] [--num-prompts N] [--repeats N] ...

Both sides draw the same number of samples per prompt with the same seeds, lengths and temperature, and return the
sampled tokens' log-probs. They take turns, so that whatever else the machine does falls on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.report import save
from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.data.tokenizer import read_vocabulary
from topd_ray.engines.process import prepare_process
from topd_ray.engines.rollout import RolloutEngine
from topd_ray.engines.vllm_engine import CPU_BLOCK_SIZE, CPU_KV_CACHE_BYTES
from topd_ray.types import Prompt, RolloutRequest

Written = dict[str, list[int]]
"""response token ids by trajectory id"""
EMBEDDED_STUDENT = "topd_ray/demo/pair/student"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_STUDENT)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def make_requests(arguments: argparse.Namespace, vocabulary_size: int) -> list[RolloutRequest]:
    """Prompts of arbitrary tokens: speed does not depend on what they mean."""
    return [
        RolloutRequest(
            prompt=Prompt(
                prompt_id=str(row),
                token_ids=tuple((7 * row + 3 * i) % vocabulary_size for i in range(arguments.prompt_tokens)),
            ),
            sample_index=sample,
            epoch=0,
            seed=row * arguments.samples + sample,
        )
        for row in range(arguments.num_prompts)
        for sample in range(arguments.samples)
    ]


def build_ours(arguments: argparse.Namespace) -> RolloutEngine:
    rollout = RolloutConfig(
        max_new_tokens=arguments.max_new_tokens,
        max_num_seqs=arguments.max_num_seqs,
        max_batched_tokens=arguments.max_batched_tokens,
        enforce_eager=arguments.enforce_eager,
    )
    return RolloutEngine(
        StudentConfig(model=arguments.model, dtype=arguments.dtype),
        rollout,
        max_prompt_tokens=arguments.prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        threads=arguments.threads,
        seed=0,
    )


def build_bare(arguments: argparse.Namespace) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = {"block_size": CPU_BLOCK_SIZE, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    return LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=arguments.prompt_tokens + arguments.max_new_tokens + 1,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_batched_tokens,
        enforce_eager=arguments.enforce_eager,
        generation_config="vllm",
        **(on_cpu if current_platform.is_cpu() else {}),
    )


def run_ours(engine: RolloutEngine, requests: list[RolloutRequest]) -> Written:
    return {one.trajectory_id: one.response_ids.tolist() for one in engine.generate(requests)}


def run_bare(llm: Any, requests: list[RolloutRequest], eos_ids: tuple[int, ...], max_tokens: int) -> Written:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests]
    params = [
        SamplingParams(
            temperature=1.0,
            seed=request.seed,
            max_tokens=max_tokens,
            logprobs=0,
            stop_token_ids=list(eos_ids),
            detokenize=False,
            flat_logprobs=True,
        )
        for request in requests
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {r.trajectory_id: list(output.outputs[0].token_ids) for r, output in zip(requests, outputs, strict=True)}


def main() -> None:
    arguments = parse_arguments()
    prepare_process(arguments.threads)
    vocabulary = read_vocabulary(StudentConfig(model=arguments.model))
    requests = make_requests(arguments, vocabulary.size)
    engine, llm = build_ours(arguments), build_bare(arguments)
    sides: dict[str, Callable[[], Written]] = {
        "ours": lambda: run_ours(engine, requests),
        "bare": lambda: run_bare(llm, requests, vocabulary.eos_ids, arguments.max_new_tokens),
    }
    written = {name: side() for name, side in sides.items()}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            num_tokens = sum(len(ids) for ids in side().values())
            speeds[name].append(num_tokens / (time.perf_counter() - started))
    save("rollout_vs_vllm", report(arguments, written, speeds))
    engine.shutdown()


def report(
    arguments: argparse.Namespace, written: dict[str, Written], speeds: dict[str, list[float]]
) -> dict[str, Any]:
    """Medians in response tokens per second; `ratio` is ours over bare, repeat by repeat."""
    ratios = [ours / bare for ours, bare in zip(speeds["ours"], speeds["bare"], strict=True)]
    return {
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "num_tokens": sum(len(ids) for ids in written["ours"].values()),
        "same_tokens": sum(written["ours"][name] == written["bare"][name] for name in written["ours"])
        / len(written["ours"]),
        "arguments": vars(arguments),
    }


if __name__ == "__main__":
    main()
