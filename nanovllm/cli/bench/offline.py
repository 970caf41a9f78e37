"""Measures an engine in this process: throughput, single-request latency, or gaps (`stall`)."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from nanovllm import env, platforms
from nanovllm.cli.bench.engines import check_options, engine_of, expert_traffic, load, num_generated
from nanovllm.cli.bench.ideal import ideal_seconds
from nanovllm.cli.bench.prefill_latency import measure_prefill_latency
from nanovllm.cli.bench.routing import experts_per_step
from nanovllm.cli.bench.workload import Workload, make_workload, varied
from nanovllm.cli.watch import Watch
from nanovllm.engine.engine import Engine
from nanovllm.llm import LLM
from nanovllm.platforms.base import Platform
from nanovllm.sampling import SamplingParams
from nanovllm.startup.engine_spec import choose_dtype
from nanovllm.tools.device_limits import DeviceLimits, measure_limits
from nanovllm.tools.kernel_table import as_text
from nanovllm.tools.profile import profile_decode

DEFAULT_SHAPE, DEFAULT_MODEL = "Qwen3-0.6B", "tiny-qwen3"  # on an accelerator; on a CPU


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for conflicting arguments."""
    if args.runs < 1 or args.profile_steps < 1:
        raise ValueError("--runs and --profile-steps must be at least 1")
    if args.stall and (args.latency or args.profile):
        raise ValueError("--stall is a separate measurement: leave out --latency and --profile")
    if args.layers and args.model:
        raise ValueError("--layers needs --random-weights: a checkpoint keeps all its layers")
    if args.min_len < 1 or args.max_len < args.min_len or args.num_seqs < 1:
        raise ValueError(
            "--num-seqs and --min-len must be at least 1, --max-len at least --min-len"
        )
    if not 1 <= (args.num_seqs if args.first is None else args.first) <= args.num_seqs:
        raise ValueError(f"--first is {args.first}: it must be 1 to --num-seqs ({args.num_seqs})")
    if args.profile and platforms.select(args.device).traits.name != "cuda":
        raise ValueError("--profile needs a CUDA device: a CPU launches no kernels")


def choose_model(args: argparse.Namespace, platform: Platform) -> None:
    """Choose the model if the arguments name none, and report it on stderr."""
    if args.model or args.random_weights:
        return
    if platform.traits.name == "cpu" and not args.layers:
        args.model, chosen = DEFAULT_MODEL, f"the embedded model {DEFAULT_MODEL}"
    else:
        args.random_weights = DEFAULT_SHAPE
        chosen = f"the shape of {DEFAULT_SHAPE} with random weights"
    print(
        f"nanovllm bench: without --model or --random-weights, this measures {chosen}",
        file=sys.stderr,
    )


def limits_of(platform: Platform, args: argparse.Namespace, config: dict[str, Any]) -> DeviceLimits:
    """The device's limits. Call it before the model's KV cache is allocated."""
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
    args: argparse.Namespace, work: Workload, batch_size: int, limits: DeviceLimits
) -> dict[str, Any]:
    """Measure one batch size. Returns a line of results."""
    rows = 1 if args.latency else batch_size
    prompts, output_lens = work.prompts, work.output_lens
    sampling = {"temperature": 0.6, "top_k": args.top_k, "top_p": args.top_p}
    params = [SamplingParams(**sampling, ignore_eos=True, max_tokens=num) for num in output_lens]
    llm, about = load(args, work.model, rows, work.max_model_len)
    engine = engine_of(llm)
    runner = engine.runner
    cfg, platform = runner.cfg, runner.platform
    seconds, num_tokens = _timed(llm, prompts, params, args.runs)
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
        result["profile"] = _profile(args, engine, run_prompts, params, limits.bandwidth)
    llm.close()
    return result


def _timed(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], num_runs: int
) -> tuple[list[float], int]:
    """(seconds of each run, tokens of one)."""
    vocab_size = engine_of(llm).model_config.vocab_size
    llm.generate([prompts[0][:16]], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    seconds, total = [], num_runs * sum(one.max_tokens or 0 for one in params)
    before = num_generated(llm)
    with Watch("generating", "tokens", total, count=lambda: num_generated(llm) - before):
        for run_idx in range(num_runs):
            run_prompts = varied(prompts, run_idx, vocab_size)
            begun = time.perf_counter()
            outputs = llm.generate(run_prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - begun)
    return seconds, sum(len(output["token_ids"]) for output in outputs)


def _profile(
    args: argparse.Namespace,
    engine: Engine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Print the time per kernel in windows of decode steps. Returns the reports without kernels."""
    rows = engine.scheduler.max_num_seqs
    folder = args.profile if len(args.bs) == 1 else args.profile / f"max_num_seqs_{rows}"
    reports = profile_decode(
        engine,
        prompts,
        params,
        folder,
        activities=[ProfilerActivity.CUDA],
        bandwidth=bandwidth,
        num_steps=args.profile_steps,
    )
    print("\n\n".join(map(as_text, reports)))
    return [{k: v for k, v in report.items() if k != "kernels"} for report in reports]


def say_what(args: argparse.Namespace, work: Workload) -> None:
    """Print what is measured, unless --quiet is set."""
    if env.is_quiet():
        return
    model = args.model or f"{args.random_weights} with random weights"
    if args.stall:
        what = f"{args.stall_rows} streams while a prompt of {args.stall:,} tokens arrives"
    else:
        rows = 1 if args.latency else ", then ".join(map(str, args.bs))
        num, many = len(work.prompts), "s" if len(work.prompts) > 1 else ""
        tokens = f"{sum(map(len, work.prompts)):,} tokens in and {sum(work.output_lens):,} out"
        what = f"{num} prompt{many}, {tokens}, at most {rows} at a time"
    times = f", {args.runs} times" if args.runs > 1 else ""
    print(f"{model}: {what}{times}", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """A readable table of results by the largest decode batch."""
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
    """A result as a sentence."""
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


def measure_all(args: argparse.Namespace) -> None:
    """Run and print all measurements. Raises ValueError for unusable arguments."""
    check(args)
    platform = platforms.select(args.device)
    choose_model(args, platform)
    if args.profile:
        # CUPTI crashes on earlier captured graphs if it is torn down and initialized again
        env.replace({"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"})
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        work = make_workload(args, stack)
        check_options(args, work.model)
        limits = None if args.stall else limits_of(platform, args, work.config)
        for batch_size in args.bs[:1] if args.latency or args.stall else args.bs:
            if not results:
                say_what(args, work)
            if limits is None:
                results.append(measure_prefill_latency(args, work.model, work.max_model_len))
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
