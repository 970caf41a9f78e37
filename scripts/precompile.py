"""Compile a model's programs and kernels before its first start. Reads config.json, no weights.

    python scripts/precompile.py --model Qwen/Qwen3-0.6B --bs 1 2 4 8 16 --out /var/cache/qwen3

Then, in Python:

    LLM("Qwen/Qwen3-0.6B", compile_cache="/var/cache/qwen3", compile_cache_mode="require",
        graph_batch_sizes=[1, 2, 4, 8, 16])

Options that shape programs must be the same for `LLM`. A store serves every checkpoint of the same
shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import EngineConfig, log
from nanovllm.startup.compile_farm.farm import WorkerFailed
from nanovllm.startup.compile_farm.tasks import Outcome
from nanovllm.startup.precompile import fill
from nanovllm.tools import command_line

# Options of `LLM`; those in SHAPING are integers that shape programs, as --bs does.
NAMED = (
    "device",
    "dtype",
    "attention_backend",
    "kv_cache_dtype",
    "quantization",
    "gpu_memory_utilization",
    "npu_graph_options",
    "vision_patch_budgets",
)
SHAPING = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_kvcache_blocks",
    "kvcache_block_size",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="embedded model, folder or Hub id")
    parser.add_argument(
        "--bs", type=int, nargs="+", metavar="ROWS", help="graph_batch_sizes; default: the device's"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the store: created, for its owner only, if it does not exist",
    )
    parser.add_argument(
        "--jobs", type=int, help="processes; default: half the cores, at most 8; 1 on an NPU"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto or fp8")
    parser.add_argument("--quantization", help="int8, on a CPU")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--npu-graph-options",
        type=json.loads,
        metavar="JSON",
        help="an object: option path -> value",
    )
    parser.add_argument("--vision-patch-budgets", type=int, nargs="+", metavar="PATCHES")
    for name in SHAPING:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}: it must be at least 1")
    log.configure()
    options: dict[str, Any] = {name: getattr(args, name) for name in (*NAMED, *SHAPING)}
    config = EngineConfig(args.model, graph_batch_sizes=args.bs, compile_cache=args.out, **options)
    started = time.perf_counter()
    with tqdm(desc="compiling", unit="bucket", dynamic_ncols=True) as bar:

        def progress(outcome: Outcome, num_buckets: int) -> None:
            bar.total = num_buckets
            bar.set_postfix_str(f"{outcome.bucket[0]} {outcome.bucket[1]}")
            bar.update()

        try:
            outcomes = fill(config, args.jobs, progress)
        except WorkerFailed as error:
            bar.close()
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
    programs, found = sum(one.programs for one in outcomes), sum(one.found for one in outcomes)
    kernels, seconds = sum(one.kernels for one in outcomes), time.perf_counter() - started
    print(
        f"{args.out}: {len(outcomes)} buckets, {programs} programs compiled, {found} were there, "
        f"{kernels} kernels compiled, {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
