"""Decode steps of rows with long contexts: tokens per second, and what of the limit is the cache.

    python scripts/bench/long_context.py --shape gpt-oss-20b --out results.json
    python scripts/bench/long_context.py --shape Qwen3.5-35B-A3B --layers 16 --rows 64

Weights are random. No prompt is computed: the scheduler is told that all full blocks of each
prompt are in the prefix cache, gives each row blocks of its own, and the cache's numbers are drawn.
Recurrent states begin as zeros. So prompts of minutes take no time, and a step reads, multiplies
and writes as after a computed prompt. The limit of a step is its bytes by the device's copy
bandwidth: weights (of the experts that rows choose if routing is even), cache, and states.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.cli.bench.ideal import step_bytes
from nanovllm.engine.engine import Engine
from nanovllm.models.model import cache_of
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.plan import PAD_BLOCK
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import measure_limits
from nanovllm.tools.shapes import CONFIGS

WARM_STEPS = 8
PREFILL_TOKENS = 512  # of a step: prompts need one block each


def pretend_cached(cache: KVCacheManager) -> None:
    """Every prompt finds all its full blocks, which no other request has."""

    def found(digests: list[bytes]) -> list[list[int]]:
        tables = []
        for window in cache.groups.windows:
            begin = max(0, len(digests) - cache.groups.num_blocks(window - 1)) if window else 0
            blocks = cache.pool.allocate(len(digests) - begin)
            tables.append([PAD_BLOCK] * begin + blocks)
        for table in tables:  # they have no owner until they are shared
            cache.pool.release([block for block in table if block != PAD_BLOCK])
        return tables

    cache.cached_prefix = found  # type: ignore[method-assign, assignment]
    cache.snapshots = None


def draw_cache(engine: Engine) -> None:
    """Random keys and values: zeros would need less power."""
    for cache in filter(None, map(cache_of, engine.runner.steps.caches)):
        for tensor in cache:
            if isinstance(tensor, torch.Tensor) and tensor.dtype.itemsize > 1:
                tensor.normal_()


def step_seconds(engine: Engine, args: argparse.Namespace) -> tuple[float, list[int]]:
    """(seconds of a decode step of all rows, their tokens half-way)."""
    made, vocab_size = random.Random(0), engine.model_config.vocab_size
    num_tokens = WARM_STEPS + args.steps + 16
    params = SamplingParams(temperature=0.6, max_tokens=num_tokens, ignore_eos=True)
    pretend_cached(engine.scheduler.cache)
    for _ in range(args.rows):
        prompt = [made.randrange(vocab_size) for _ in range(args.context)]
        engine.add_request(prompt, params, incremental=False)
    requests = list(engine.scheduler.waiting)
    while not all(len(one.output_ids) >= WARM_STEPS for one in requests):
        engine.step()
    begun, num_begun = time.perf_counter(), sum(len(one.output_ids) for one in requests)
    for _ in range(args.steps):
        engine.step()
    seconds = time.perf_counter() - begun
    if (num := sum(len(one.output_ids) for one in requests) - num_begun) != args.steps * args.rows:
        raise ValueError(f"{num} tokens in {args.steps} steps of {args.rows} rows: not all decoded")
    return seconds / args.steps, [one.num_computed - args.steps // 2 for one in requests]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = dict(CONFIGS[args.shape]) if args.shape in CONFIGS else _read(Path(args.shape))
    if args.layers:
        config["num_hidden_layers"] = args.layers
    platform = platforms.select(args.device)
    free = platform.cache_limit_bytes()
    limits = measure_limits(platform.device, torch.bfloat16, platform.synchronize, free)
    platform.release()
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder, random_weights=True, device=args.device, max_num_seqs=args.rows,
            graph_batch_sizes=[args.rows], max_num_batched_tokens=PREFILL_TOKENS,
            max_model_len=args.context + args.steps + 64, kv_cache_dtype=args.kv_cache_dtype,
            gpu_memory_utilization=args.memory,
        )  # fmt: skip
    engine = engine_of(llm)
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 1)}
    draw_cache(engine)
    seconds, lengths = step_seconds(engine, args)
    of_step = step_bytes(engine.runner.model, engine.runner.spec, lengths)
    moved = sum(of_step.values())
    found |= {
        "shape": args.shape, "layers": config["num_hidden_layers"], "rows": args.rows,
        "context": args.context, "step_ms": round(seconds * 1e3, 3),
        "tokens_per_second": round(args.rows / seconds, 1),
        "share_of_limit": round(moved / limits.bandwidth / seconds, 4),
        "bytes": {name: round(num) for name, num in of_step.items()},
        "cache_share_of_bytes": round(of_step["cache"] / moved, 4),
        "bandwidth_tb_s": round(limits.bandwidth / 1e12, 3), "memory": engine.memory.as_dict(),
    }  # fmt: skip
    if platform.traits.name == "cuda":
        found["device"] = torch.cuda.get_device_name()
    llm.close()
    return {**found, "versions": versions()}


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", required=True, help=f"{', '.join(CONFIGS)}, or a config.json")
    add("--layers", type=int, help="use only this many layers")
    add("--rows", type=int, default=64)
    add("--context", type=int, default=32768, help="tokens of each row")
    add("--steps", type=int, default=64, help="timed decode steps")
    add("--kv-cache-dtype", default="auto", help="auto or fp8")
    add("--memory", type=float, default=0.94, help="share of the device's memory")
    add("--device", default="auto")
    add("--out", type=Path, help="file for the results")
    args = parser.parse_args()
    found = measure(args)
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
