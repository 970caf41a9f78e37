"""Throughput and latency of the engine, with the share of what the device's bandwidth and matrix rate allow.

python bench.py --random-weights Qwen3-0.6B --bs 256        # nano-vllm's workload: 256 prompts, 133,966 output tokens
python bench.py --model Qwen/Qwen3-0.6B --bs 16 64 256      # a table by bucket cap
python bench.py --random-weights Qwen3-0.6B --latency       # batch 1, 128 tokens in, 512 out
python bench.py --random-weights Qwen3-0.6B --profile out   # and what the device does in a decode step, by kernel
python bench.py --random-weights Qwen3-0.6B --stall         # gaps between tokens while a long prompt arrives

Every measurement is a line of JSON on stdout, and in the file that --out names.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.models.formats import PLAIN
from nanovllm.models.interface import Model
from nanovllm.runner.spec import EngineSpec
from nanovllm.tools.profile import as_text, profile_decode

# The published config.json of Qwen/Qwen3-0.6B and Qwen/Qwen3-8B, as far as shapes go.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
SHARED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "attention_bias": False, "hidden_act": "silu", "eos_token_id": 151645, "dtype": "bfloat16",
}  # fmt: skip
COPY_BYTES, MATMUL_SIZE = {"cuda": 4 << 30, "cpu": 1 << 29}, {"cuda": 8192, "cpu": 1024}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="embedded model, folder or Hub id")
    source.add_argument(
        "--random-weights",
        metavar="CONFIG",
        help=f"{', '.join(SHAPES)}, or a config.json: no download",
    )
    parser.add_argument(
        "--bs",
        type=int,
        nargs="+",
        default=[256],
        help="largest decode batch; several give a table",
    )
    parser.add_argument("--num-seqs", type=int, default=256, help="requests in the workload")
    parser.add_argument(
        "--layers", type=int, help="cut the model to this many layers (with --random-weights)"
    )
    parser.add_argument("--min-len", type=int, default=100, help="shortest prompt and answer")
    parser.add_argument("--max-len", type=int, default=1024, help="longest prompt and answer")
    parser.add_argument(
        "--top-k", type=int, default=0, help="filter tokens before they are drawn; 0: do not"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="the same, by probability; 1: do not"
    )
    parser.add_argument(
        "--latency", action="store_true", help="one request, 128 tokens in and 512 out, instead"
    )
    parser.add_argument(
        "--stall", type=int, nargs="?", const=16384, metavar="TOKENS",
        help="instead, gaps between the tokens of --stall-rows streams while a prompt of so many tokens arrives",
    )  # fmt: skip
    parser.add_argument("--stall-rows", type=int, default=64)
    parser.add_argument(
        "--max-stall-ms",
        type=float,
        help="the engine's bound on prefill steps while streams decode",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs")
    parser.add_argument("--no-graph", action="store_true", help="compiled, but nothing captured")
    parser.add_argument(
        "--no-fusion",
        action="store_true",
        help="no fused kernels: plain torch through the lowering",
    )
    parser.add_argument(
        "--run-ahead", type=int, choices=(0, 1), help="steps launched before tokens are read"
    )
    parser.add_argument(
        "--padding",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pad eager batches too",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--attention-backend", default="auto", help="auto, triton, flash_attn or sdpa"
    )
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto or fp8")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--block-size", type=int)
    parser.add_argument(
        "--runs", type=int, default=1, help="repetitions of the measurement on one loaded model"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="append the lines of JSON to this file, too"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="profile decode steps after the timed runs (CUDA)",
    )
    parser.add_argument(
        "--profile-steps", type=int, default=8, metavar="N", help="decode steps per profile"
    )
    args = parser.parse_args()
    if args.runs < 1 or args.profile_steps < 1:
        parser.error("--runs and --profile-steps must be at least 1")
    if args.stall and (args.latency or args.profile):
        parser.error("--stall is a measurement of its own: leave out --latency and --profile")
    if args.profile and platforms.select(args.device).traits.name != "cuda":
        parser.error("--profile needs a CUDA device: on a CPU there are no launches to look at")
    return args


def checkpoint(args: argparse.Namespace, stack: ExitStack) -> str:
    """The model to load; for random weights a temporary folder that holds only a config.json."""
    if args.random_weights is None:
        return args.model
    if args.random_weights in SHAPES:
        config = {
            **SHARED,
            **SHAPES[args.random_weights],
            "tie_word_embeddings": args.random_weights == "Qwen3-0.6B",
        }
    else:
        config = json.loads(Path(args.random_weights).read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def workload(args: argparse.Namespace, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """nano-vllm's draws in their order: all prompts first, then all output lengths."""
    if args.latency:
        random.seed(0)
        return [[random.randint(0, min(10000, vocab_size - 1)) for _ in range(128)]], [512]
    random.seed(0)
    low, high = args.min_len, args.max_len
    prompts = [
        [random.randint(0, min(10000, vocab_size - 1)) for _ in range(random.randint(low, high))]
        for _ in range(args.num_seqs)
    ]
    return prompts, [random.randint(low, high) for _ in range(args.num_seqs)]


def device_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of a large copy, reads and writes counted; flops per second of a large matrix product)."""

    def best_seconds(work: Any) -> float:
        seconds = []
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    size = MATMUL_SIZE[device.type]
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device, dtype=dtype)
    bandwidth = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    return bandwidth, 2 * size**3 / best_seconds(lambda: a @ a)


def ideal_seconds(
    model: Model,
    spec: EngineSpec,
    prompts: list[list[int]],
    output_lens: list[int],
    rows: int,
    bandwidth: float,
    flops: float,
) -> float:
    """What the workload must take: each decode step the larger of reading the weights and multiplying by them, plus
    reading the keys and values of every row; all prompts once through the layers at the full matrix rate."""
    weight_bytes = model.weight_bytes(spec.weight_format)
    kv_bytes = model.kv_bytes_per_token(spec.cache_dtype)
    num_weights = model.weight_bytes(PLAIN) / model.config.dtype.itemsize
    head_weights = model.config.vocab_size * model.config.hidden_size
    seconds = 2 * (num_weights - head_weights) * sum(map(len, prompts)) / flops
    waiting = list(zip((len(prompt) for prompt in prompts), (n - 1 for n in output_lens)))[::-1]
    context, left = np.zeros(0), np.zeros(0)
    while waiting or left.size:
        fresh = [waiting.pop() for _ in range(min(rows - left.size, len(waiting)))]
        context = np.append(context, [length for length, _ in fresh])
        left = np.append(left, [num for _, num in fresh])
        steps = max(1, int(left.min())) if not waiting else 1
        weights = max(weight_bytes / bandwidth, 2 * num_weights * left.size / flops)
        cached = steps * context.sum() + left.size * steps * (steps + 1) / 2
        seconds += steps * weights + cached * kv_bytes / bandwidth
        context, left = context + steps, left - steps
        context, left = context[left > 0], left[left > 0]
    return seconds


def load(
    args: argparse.Namespace, model: str, max_num_seqs: int, max_model_len: int
) -> tuple[LLM, dict[str, Any]]:
    """The model, and what a line of JSON says of it and of this machine."""
    started = time.perf_counter()
    llm = LLM(
        model,
        device=args.device,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.enforce_eager,
        capture=not args.no_graph,
        fuse=not args.no_fusion,
        run_ahead=args.run_ahead,
        pad_batches=args.padding,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_stall_ms=args.max_stall_ms,
        kvcache_block_size=args.block_size,
        random_weights=args.random_weights is not None,
    )
    load_seconds = time.perf_counter() - started
    runner = llm.engine.runner
    device, is_graph = runner.platform.device, runner.compiler.lowering is not None
    return llm, {
        "model": args.random_weights or args.model,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "dtype": str(runner.cfg.dtype).removeprefix("torch."),
        "attention_backend": args.attention_backend,
        "kv_cache_dtype": str(runner.spec.cache_dtype).removeprefix("torch."),
        "mode": "graph" if is_graph else "eager",
        "capture": is_graph and not args.no_graph,
        "fuse": is_graph and not args.no_fusion,
        "run_ahead": llm.engine.run_ahead,
        "max_num_seqs": max_num_seqs,
        "load_seconds": round(load_seconds, 2),
        "memory": llm.engine.memory.as_dict(),
        "versions": versions(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def measure(
    args: argparse.Namespace, model: str, batch_size: int, limits: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    rows = 1 if args.latency else batch_size
    llm, about = load(args, model, rows, args.max_model_len)
    runner = llm.engine.runner
    cfg, device = runner.cfg, runner.platform.device
    if "device" not in limits:
        limits["device"] = device_limits(device, cfg.dtype)
    bandwidth, flops = limits["device"]
    prompts, output_lens = workload(args, cfg.vocab_size)
    sampling = {"temperature": 0.6, "top_k": args.top_k, "top_p": args.top_p}
    params = [SamplingParams(**sampling, ignore_eos=True, max_tokens=num) for num in output_lens]
    llm.generate([prompts[0][:16]], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    seconds = []

    def varied(run_idx: int) -> list[list[int]]:
        """Other prompts each time, or the prefix cache would answer the second run's prefill."""
        return [[(token + run_idx) % cfg.vocab_size for token in prompt] for prompt in prompts]

    for run_idx in range(args.runs):
        run_prompts = varied(run_idx)
        begun = time.perf_counter()
        outputs = llm.generate(run_prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
    num_tokens = sum(len(output["token_ids"]) for output in outputs)
    median = sorted(seconds)[len(seconds) // 2]
    ideal = ideal_seconds(runner.model, runner.spec, prompts, output_lens, rows, bandwidth, flops)
    result = {
        **about,
        "workload": "latency" if args.latency else "throughput",
        "sampling": sampling,
        "num_seqs": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": num_tokens,
        "seconds": [round(value, 4) for value in seconds],
        "spread": round((max(seconds) - min(seconds)) / median, 4),
        "tokens_per_second": round(num_tokens / median, 1),
        "peak_gib": round(runner.platform.peak_bytes() / 2**30, 2),
        "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "matmul_tflop_s": round(flops / 1e12, 2),
        "limit_tokens_per_second": round(num_tokens / ideal, 1),
        "share_of_limit": round(ideal / median, 4),
    }
    if args.profile:
        folder = args.profile if len(args.bs) == 1 else args.profile / f"max_num_seqs_{rows}"
        activities = [torch.profiler.ProfilerActivity.CUDA]
        reports = profile_decode(
            llm.engine, varied(args.runs), params, folder,
            activities=activities, bandwidth=bandwidth, num_steps=args.profile_steps,
        )  # fmt: skip
        print("\n\n".join(map(as_text, reports)))
        result["profile"] = [
            {k: v for k, v in report.items() if k != "kernels"} for report in reports
        ]
    llm.close()
    return result


def measure_stall(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Gaps between the tokens of streams, as their reader sees them: before a long prompt comes, from then until its first
    token, and afterwards; milliseconds."""
    rows, num_steps = args.stall_rows, 100
    max_model_len = max(args.max_model_len, args.stall + 16)
    llm, about = load(args, model, rows + 1, max_model_len)
    engine, rng = llm.engine, random.Random(0)
    stall = engine.scheduler.stall

    def prompt(length: int) -> list[int]:
        return [rng.randrange(min(10000, engine.model_config.vocab_size)) for _ in range(length)]

    runs, worst = [], []
    for _ in range(args.runs):
        short_len = min(128, max_model_len // 4)
        params = SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=max_model_len - short_len
        )
        last = {engine.add_request(prompt(short_len), params): 0.0 for _ in range(rows)}
        gaps: dict[str, list[float]] = {"before": [], "during": [], "after": []}
        long_id, arrived, first = -1, math.inf, math.inf
        num_after = num_warm = 0
        while num_after < num_steps:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.completion is not None and output.request_id in last:
                    raise SystemExit(
                        f"a stream ended before its time: raise --max-model-len ({max_model_len})"
                    )
                if output.request_id == long_id:
                    first = min(first, now)
                elif num_warm > num_steps:
                    begun = last[output.request_id]
                    phase = "before" if now <= arrived else "during" if begun < first else "after"
                    gaps[phase].append(1e3 * (now - begun))
                last[output.request_id] = now
            num_warm += all(last.values())  # steps since every stream has begun
            num_after += first < math.inf
            if long_id < 0 and num_warm == 2 * num_steps:
                arrived = time.perf_counter()
                long_id = engine.add_request(
                    prompt(args.stall), SamplingParams(max_tokens=1, ignore_eos=True)
                )
        engine.abort_all(last)
        worst.append(max(gaps["during"]))
        runs.append(
            {"first_token_ms": round(1e3 * (first - arrived), 2)}
            | {k: spread(v) for k, v in gaps.items()}
        )
    llm.close()
    return {
        **about,
        "workload": "stall",
        "rows": rows,
        "long_prompt_tokens": args.stall,
        "max_stall_ms": stall.max_ms if stall else None,
        "prefill_ms": {str(tokens): round(ms, 3) for tokens, ms in stall.step_ms}
        if stall
        else None,
        "attention_ms_per_million": round(1e6 * stall.attention_ms, 4) if stall else None,
        "worst_ms": round(max(worst), 3),
        "runs": runs,
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"median": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "worst": -1}
    return {name: round(ordered[idx], 3) for name, idx in at.items()}


def versions() -> dict[str, str]:
    """Of everything that the numbers hang on, as far as it is here."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = (
                subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
            )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Results by bucket cap, to read."""
    lines = [
        f"{'bs':>5} {'tok/s':>10} {'of limit':>9} {'median s':>9} {'spread':>7} {'KV tokens':>10} {'load s':>7} {'peak GiB':>9}"
    ]
    for one in results:
        median = sorted(one["seconds"])[len(one["seconds"]) // 2]
        lines.append(
            f"{one['max_num_seqs']:>5} {one['tokens_per_second']:>10,.1f} {one['share_of_limit']:>9.1%} {median:>9.3f} "
            f"{one['spread']:>7.1%} {one['memory']['kv_cache_tokens']:>10,} {one['load_seconds']:>7.1f} "
            f"{one['peak_gib']:>9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.profile:
        # taken down and set up again between two profiles, CUPTI crashes on graphs that were captured before
        os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
    limits: dict[str, tuple[float, float]] = {}
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        model = checkpoint(args, stack)
        for batch_size in args.bs[:1] if args.latency or args.stall else args.bs:
            if args.stall:
                result = measure_stall(args, model)
                print(
                    f"{result['model']}, {result['rows']} streams: {result['worst_ms']} ms between two tokens at most"
                )
            else:
                result = measure(args, model, batch_size, limits)
                results.append(result)
                print(
                    f"{result['model']} bs {result['max_num_seqs']}: {result['output_tokens']} tokens in "
                    f"{', '.join(map(str, result['seconds']))} s = {result['tokens_per_second']} tok/s, "
                    f"{result['share_of_limit']:.1%} of the limit; loaded in {result['load_seconds']} s, "
                    f"peak {result['peak_gib']} GiB"
                )
            gc.collect()
            print(json.dumps(result), flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(result) + "\n")
    if len(results) > 1:
        print(table(results))


if __name__ == "__main__":
    main()
