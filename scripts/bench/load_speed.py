"""Measures the speed of reading a checkpoint to the device, in GB/s.

# the shape of Qwen3-30B-A3B with 20 of its layers, a tensor for each expert
python scripts/bench/load_speed.py --shape Qwen3-30B-A3B --layers 20
# as transformers 5 writes it: two tensors for all experts of a layer
python scripts/bench/load_speed.py --shape Qwen3-30B-A3B --layers 20 --stacked-experts
# two processes at the same time, each with its part of every weight on its own device
python scripts/bench/load_speed.py --shape Qwen3-8B --ranks 2
# an existing checkpoint
python scripts/bench/load_speed.py --model DIR

A checkpoint of random weights, in files of 5 GB, is written to a temporary folder. It is then in
the page cache, if memory suffices. Prints one line of JSON per run; GB are those of the weights on
the device, which in the checkpoint's dtype are those of the files. "host_copy_gb_s" is the rate at
which one thread copies the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanovllm import platforms
from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.shards import Shard
from nanovllm.startup.resolve import ResolvedConfig, resolve_without_weights
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.random_checkpoint import SHARD_BYTES, write_checkpoint


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(CONFIGS), help="random weights of this shape")
    source.add_argument("--model", type=Path, help="a folder with a checkpoint")
    add = parser.add_argument
    add("--layers", type=int, help="use this many layers only (with --shape)")
    add("--stacked-experts", action="store_true", help="two tensors for all experts of a layer")
    add("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="size of a file")
    add("--folder", type=Path, help="parent of the temporary folder")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    add("--runs", type=int, default=3)
    add("--ranks", type=int, default=1, metavar="N", help="devices that share the weights")
    add("--rank", type=int, help="set for the processes that this starts")
    args = parser.parse_args()
    if args.model and (args.layers or args.stacked_experts):
        parser.error("--layers and --stacked-experts go with --shape")
    if (
        args.runs < 1
        or args.ranks < 1
        or (args.layers is not None and args.layers < 1)
        or args.shard_gb <= 0
    ):
        parser.error("--runs, --ranks and --layers must be at least 1, and --shard-gb above 0")
    return args


def write(args: argparse.Namespace, folder: Path) -> Path:
    config: dict[str, Any] = dict(CONFIGS[args.shape])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    shard_bytes = int(args.shard_gb * 1e9)
    started = time.perf_counter()
    write_checkpoint(folder, config, 0, shard_bytes, stacks_experts=args.stacked_experts)
    print(f"written in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return folder


def read(resolved: ResolvedConfig) -> tuple[float, int]:
    """Seconds of reading this rank's weights to the device, as a start does, and their bytes."""
    platform, region = resolved.platform, resolved.platform.region()
    with tqdm(total=resolved.model.config.num_layers, desc="loading weights", unit="layer") as bar:
        platform.synchronize()
        started = time.perf_counter()
        target = loader.Target(platform.device, region.place, platform.host_buffer, resolved.shard)
        params = loader.load(resolved.model, resolved.folder, target, bar.update)
        platform.synchronize()
        seconds = time.perf_counter() - started
    tensors = {id(one): one for one in pytree.tree_leaves(params) if one is not None}
    num_bytes = sum(one.nbytes for one in tensors.values())
    del params, tensors
    region.close()
    platform.release()
    return seconds, num_bytes


def copy_rate() -> float:
    """Bytes per second of one thread's copy within host memory."""
    threads, source = torch.get_num_threads(), torch.ones(1 << 28, dtype=torch.uint8)
    target = torch.ones_like(source)
    torch.set_num_threads(1)
    started = time.perf_counter()
    target.copy_(source)
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return source.nbytes / seconds


def measure(args: argparse.Namespace, folder: Path) -> None:
    """The measurements of one process."""
    config = EngineConfig(
        str(folder), device=args.device, dtype=args.dtype, tensor_parallel_size=args.ranks
    )
    resolved = resolve_without_weights(config)
    resolved = replace(resolved, shard=Shard(args.rank or 0, args.ranks))
    about = {
        "model": args.shape or str(folder),
        "layers": resolved.model.config.num_layers,
        "device": resolved.platform.describe(),
        "dtype": str(resolved.model.config.dtype).removeprefix("torch."),
        "files": len(list(folder.glob("*.safetensors"))),
        "stacked_experts": args.stacked_experts,
        "rank": args.rank or 0,
        "ranks": args.ranks,
        "host_copy_gb_s": round(copy_rate() / 1e9, 2),
    }
    for _ in range(args.runs):
        seconds, num_bytes = read(resolved)
        gb = num_bytes / 1e9
        about |= {"gb": round(gb, 3), "seconds": round(seconds, 3)}
        print(json.dumps({**about, "gb_per_second": round(gb / seconds, 2)}), flush=True)


def start_ranks(args: argparse.Namespace, folder: Path) -> None:
    """Run a process for each rank, all at the same time. Raises RuntimeError if one fails."""
    platform = platforms.select(args.device)
    words = ["--model", str(folder), "--ranks", str(args.ranks), "--runs", str(args.runs)]
    words += ["--device", args.device, "--dtype", args.dtype]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *words, "--rank", str(rank)],
            env={**os.environ, **platform.rank_environment(rank, os.environ)},
        )
        for rank in range(args.ranks)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"the processes of the ranks ended with {codes}")


def main(args: argparse.Namespace) -> None:
    with ExitStack() as stack:
        folder = args.model
        if folder is None:
            place = TemporaryDirectory(prefix="load-speed-", dir=args.folder)
            folder = write(args, Path(stack.enter_context(place)) / "checkpoint")
        if args.ranks > 1 and args.rank is None:
            start_ranks(args, folder)
        else:
            measure(args, folder)


if __name__ == "__main__":
    sys.exit(command_line.run(partial(main, arguments())))
