"""Throughput and latency of the engine, as numbers and as shares of what the device allows.

# nano-vllm's workload: 256 prompts, 133,966 output tokens
python bench.py --random-weights Qwen3-0.6B --bs 256
# the same on an accelerator; the embedded model on a CPU
python bench.py
# a table by the largest decode batch
python bench.py --model Qwen/Qwen3-0.6B --bs 16 64 256
# batch 1, 128 tokens in, 512 out
python bench.py --random-weights Qwen3-0.6B --latency
# also the time of each kernel in a decode step
python bench.py --random-weights Qwen3-0.6B --profile out
# the same on two GPUs
python bench.py --random-weights Qwen3-8B --latency --tensor-parallel-size 2
# on two GPUs with whole experts on each of them
python bench.py --random-weights Qwen3-30B-A3B --tensor-parallel-size 2 --expert-parallel on
# two resident experts in each layer, the others in the host's memory
python bench.py --random-weights Mixtral-8x7B --latency --expert-offload 2
# gaps between tokens while a long prompt arrives
python bench.py --random-weights Qwen3-0.6B --stall

Every measurement is a line of JSON on stdout and, with --out, in a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from nanovllm import SamplingParams, platforms
from nanovllm.platforms.base import Platform
from nanovllm.startup.choose import choose_dtype
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import Limits, measure_limits
from nanovllm.tools.kernel_table import as_text
from nanovllm.tools.profile import profile_decode
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.engines import engine_of, expert_traffic, load
from scripts.bench.ideal import ideal_seconds
from scripts.bench.routing import experts_per_step
from scripts.bench.stall import measure_stall
from scripts.bench.workload import Workload, make_workload, varied

DEFAULT_SHAPE, DEFAULT_MODEL = "Qwen3-0.6B", "tiny-qwen3"  # on an accelerator, on a CPU


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="embedded model, folder or Hub id")
    names = ", ".join(CONFIGS)
    source.add_argument("--random-weights", metavar="CONFIG", help=f"{names}, or a config.json")
    parser.epilog = (
        f"Without --model and --random-weights: {DEFAULT_SHAPE} with random weights on an "
        f"accelerator, {DEFAULT_MODEL} on a CPU."
    )
    add = parser.add_argument
    add("--layers", type=int, help="use this many layers only (with --random-weights)")
    _add_workload(parser)
    add("--enforce-eager", action="store_true", help="no graphs")
    add("--no-graph", action="store_true", help="compiled, but not captured")
    add("--no-fusion", action="store_true", help="no fused kernels: plain torch, lowered")
    add("--run-ahead", type=int, choices=(0, 1), help="steps launched before tokens are read")
    padding = argparse.BooleanOptionalAction
    add("--padding", action=padding, default=True, help="pad eager batches too")
    add(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model"
    )
    whole = "whether each of these GPUs has whole experts (on), or a part of every expert (off)"
    add("--expert-parallel", choices=("auto", "on", "off"), default="auto", help=whole)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    add("--attention-backend", default="auto", help="auto, triton, flash_attn or sdpa")
    add("--kv-cache-dtype", default="auto", help="auto or fp8")
    offload = "resident experts per layer, or their bytes, such as 8GiB; all are on the host"
    add("--expert-offload", type=_experts_or_bytes, metavar="N", help=offload)
    add(
        "--expert-prefetch", action="store_true", help="fetch experts that a layer's input predicts"
    )
    add("--max-model-len", type=int, help="default: 4096, within what model and workload need")
    add("--max-num-batched-tokens", type=int)
    add("--block-size", type=int)
    add("--max-stall-ms", type=float, help="limit of a prefill step while streams decode")
    add("--runs", type=int, default=1, help="measurements with one loaded model")
    add("--out", type=Path, metavar="FILE", help="append the lines of JSON to this file")
    add("--profile", type=Path, metavar="DIR", help="profile decode steps after the runs (CUDA)")
    add("--profile-steps", type=int, default=8, metavar="N", help="decode steps per profile")
    args = parser.parse_args()
    if args.runs < 1 or args.profile_steps < 1:
        parser.error("--runs and --profile-steps must be at least 1")
    if args.stall and (args.latency or args.profile):
        parser.error("--stall is a measurement of its own: leave out --latency and --profile")
    if args.profile and platforms.select(args.device).traits.name != "cuda":
        parser.error("--profile needs a CUDA device: a CPU launches no kernels")
    if args.layers and args.model:
        parser.error("--layers goes with --random-weights: a checkpoint keeps all its layers")
    if args.min_len < 1 or args.max_len < args.min_len or args.num_seqs < 1:
        parser.error("--num-seqs and --min-len must be at least 1, --max-len at least --min-len")
    if args.first is not None and not 1 <= args.first <= args.num_seqs:
        parser.error(f"--first is {args.first}: it must be 1 to --num-seqs ({args.num_seqs})")
    return args


def _experts_or_bytes(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bs", type=int, nargs="+", default=[256], help="largest decode batch, or several")
    add("--num-seqs", type=int, default=256, help="requests in the workload")
    add("--first", type=int, metavar="N", help="only the first N requests of the workload")
    add("--min-len", type=int, default=100, help="shortest prompt and answer")
    add("--max-len", type=int, default=1024, help="longest prompt and answer")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="the same, by probability; 1: from all")
    add("--latency", action="store_true", help="instead, one request: 128 tokens in, 512 out")
    stall = "instead, gaps between tokens of streams while a prompt of TOKENS arrives"
    add("--stall", type=int, nargs="?", const=16384, metavar="TOKENS", help=stall)
    add("--stall-rows", type=int, default=64, help="streams of --stall")


def choose_model(args: argparse.Namespace, platform: Platform) -> None:
    """Set the model, if the arguments name none, and say so on stderr."""
    if args.model or args.random_weights:
        return
    if platform.traits.name == "cpu" and not args.layers:
        args.model, chosen = DEFAULT_MODEL, f"the embedded model {DEFAULT_MODEL}"
    else:
        args.random_weights = DEFAULT_SHAPE
        chosen = f"the shape of {DEFAULT_SHAPE} with random weights"
    print(f"bench.py: without --model or --random-weights, this measures {chosen}", file=sys.stderr)


def limits_of(platform: Platform, args: argparse.Namespace, config: dict[str, Any]) -> Limits:
    """The device's limits. To be called before the model's cache takes the memory."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    hf = SimpleNamespace(dtype=getattr(torch, stored.removeprefix("torch."), None))
    dtype = choose_dtype(args.dtype, hf, platform)
    found = measure_limits(
        platform.device, dtype, platform.synchronize, platform.cache_limit_bytes()
    )
    gc.collect()
    platform.release()
    platform.reset_peak()
    return found


def measure(
    args: argparse.Namespace, work: Workload, batch_size: int, limits: Limits
) -> dict[str, Any]:
    """One line of results."""
    rows = 1 if args.latency else batch_size
    prompts, output_lens = work.prompts, work.output_lens
    sampling = {"temperature": 0.6, "top_k": args.top_k, "top_p": args.top_p}
    params = [SamplingParams(**sampling, ignore_eos=True, max_tokens=num) for num in output_lens]
    llm, about = load(args, work.model, rows, work.max_model_len)
    engine = engine_of(llm)
    runner = engine.runner
    cfg, platform = runner.cfg, runner.platform
    llm.generate([prompts[0][:16]], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    seconds = []
    for run_idx in range(args.runs):
        run_prompts = varied(prompts, run_idx, cfg.vocab_size)
        begun = time.perf_counter()
        outputs = llm.generate(run_prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begun)
    num_tokens = sum(len(output["token_ids"]) for output in outputs)
    median = sorted(seconds)[len(seconds) // 2]
    ideal = ideal_seconds(runner.model, runner.spec, prompts, output_lens, rows, limits)
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
        "peak_gib": round(platform.peak_bytes() / 2**30, 2),
        "copy_bandwidth_tb_s": round(limits.bandwidth / 1e12, 3),
        "matmul_tflop_s": round(limits.flops / 1e12, 2),
        "limit_tokens_per_second": round(num_tokens / ideal, 1),
        "share_of_limit": round(ideal / median, 4),
        "experts": expert_traffic(llm, num_tokens),
    }
    if runner.cfg.moe is not None:
        run_prompts = varied(prompts, args.runs, cfg.vocab_size)
        result["experts_per_step"] = experts_per_step(engine, run_prompts, rows)
    if args.profile:
        run_prompts = varied(prompts, args.runs, cfg.vocab_size)
        folder = args.profile if len(args.bs) == 1 else args.profile / f"max_num_seqs_{rows}"
        reports = profile_decode(
            engine,
            run_prompts,
            params,
            folder,
            activities=[ProfilerActivity.CUDA],
            bandwidth=limits.bandwidth,
            num_steps=args.profile_steps,
        )
        print("\n\n".join(map(as_text, reports)))
        result["profile"] = [
            {k: v for k, v in report.items() if k != "kernels"} for report in reports
        ]
    llm.close()
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Results by the largest decode batch, to read."""
    lines = [
        f"{'bs':>5} {'tok/s':>10} {'of limit':>9} {'median s':>9} {'spread':>7} "
        f"{'KV tokens':>10} {'load s':>7} {'peak GiB':>9}"
    ]
    for one in results:
        median = sorted(one["seconds"])[len(one["seconds"]) // 2]
        lines.append(
            f"{one['max_num_seqs']:>5} {one['tokens_per_second']:>10,.1f} "
            f"{one['share_of_limit']:>9.1%} {median:>9.3f} {one['spread']:>7.1%} "
            f"{one['memory']['kv_cache_tokens']:>10,} {one['load_seconds']:>7.1f} "
            f"{one['peak_gib']:>9.2f}"
        )
    return "\n".join(lines)


def sentence(result: dict[str, Any]) -> str:
    """A result in one sentence."""
    if result["workload"] == "stall":
        streams = f"{result['model']}, {result['rows']} streams"
        return f"{streams}: {result['worst_ms']} ms between two tokens at most"
    experts, moved = result["experts"], ""
    if experts is not None:
        moved = (
            f"; {experts['hit_rate']:.1%} of experts were resident, "
            f"{experts['moved_bytes_per_token'] / 1e9:.3f} GB per token over the bus, which moves "
            f"{experts['bus_gb_s']} GB/s and allows {experts['bus_limit_tokens_per_second']} tok/s"
        )
    return (
        f"{result['model']} bs {result['max_num_seqs']}: {result['output_tokens']} tokens in "
        f"{', '.join(map(str, result['seconds']))} s = {result['tokens_per_second']} tok/s, "
        f"{result['share_of_limit']:.1%} of the limit; loaded in {result['load_seconds']} s, "
        f"peak {result['peak_gib']} GiB{moved}"
    )


def main() -> None:
    args = arguments()
    platform = platforms.select(args.device)
    choose_model(args, platform)
    if args.profile:
        # CUPTI, taken down and set up again, crashes on graphs that were captured before
        os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        work = make_workload(args, stack)
        limits = None if args.stall else limits_of(platform, args, work.config)
        for batch_size in args.bs[:1] if args.latency or args.stall else args.bs:
            if limits is None:
                results.append(measure_stall(args, work.model, work.max_model_len))
            else:
                results.append(measure(args, work, batch_size, limits))
            print(sentence(results[-1]))
            gc.collect()
            line = json.dumps(results[-1])
            print(line, flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")
    if len(results) > 1:
        print(table(results))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
