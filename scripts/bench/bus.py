"""Measures the bus between host and GPU, and the share that kernels of offloaded experts reach.

# experts of Mixtral-8x7B: hidden size 4096, width 14336
python scripts/bench/bus.py
# experts of Qwen3-30B-A3B
python scripts/bench/bus.py --hidden 2048 --size 768 --experts 128 --top-k 8

Every measurement is a line of JSON: seconds for a GiB of pinned memory, then GB/s of the copy
engine, of the copy kernel by programs and bytes in flight, and of products that read experts in
place; last the microseconds of a fetch that finds all experts resident.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanovllm.kernels.triton import experts, offload
from nanovllm.models.experts.offloaded import Offloaded, Offloader, OffloadPlan
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.platforms.regions import SplitRegion
from nanovllm.tools import command_line

GIB = 1 << 30
REPEATS = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--size", type=int, default=14336, help="width of an expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    return parser.parse_args()


def show(what: str, **values: float | str) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def seconds(run: Callable[[], object]) -> float:
    """The shortest of several runs, by the device's clock."""
    found = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def measure_pinning(platform: CudaPlatform) -> None:
    for num_threads in (1, 4, 8):
        region = platform.split_region()
        pin = [((GIB // num_threads,), torch.uint8)] * (2 * num_threads)

        def one(what: tuple[tuple[int], torch.dtype], region: SplitRegion = region) -> Tensor:
            platform.enter_thread()
            return region.host_empty(*what)

        begun = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(one, pin))
        taken = time.perf_counter() - begun
        show("pin", threads=num_threads, seconds_per_gib=round(taken / 2, 3))
        region.close()


def layer(args: argparse.Namespace, region: SplitRegion) -> Offloaded:
    """A layer of random experts, of which `top_k` are resident."""
    offloader = Offloader(OffloadPlan(args.top_k, 1), region, torch.device("cuda", 0))
    shapes = (args.experts, 2 * args.size, args.hidden), (args.experts, args.hidden, args.size)
    both = [offloader.empty(shape, torch.bfloat16) for shape in shapes]
    for one in both:
        one.copy_(torch.randn(one.shape, dtype=one.dtype, device="cuda") * 0.02)
    return offloader.stored(*both)


def measure_copies(args: argparse.Namespace, stored: Offloaded) -> None:
    both = (stored.host_gate_up_EGD, stored.host_down_EDF)
    slots = stored.residents[:2]
    copied = args.top_k * stored.expert_bytes
    chosen = [stored.num_experts - 1 - i for i in range(args.top_k)]
    listed = [args.top_k, *(number for slot, e in enumerate(chosen) for number in (e, slot))]
    copies = torch.tensor(listed, dtype=torch.int32, device="cuda")
    for num_programs in (8, 16, 32, 64, 132):
        for num_bytes in (8192, 16384, 32768, 65536):
            tile = offload.CopyTile(num_programs, num_bytes)

            run = partial(offload.copy_listed, both, slots, copies, tile, False)
            run()
            rate = round(copied / seconds(run) / 1e9, 2)
            show("copy kernel", programs=num_programs, bytes_each=num_bytes, gb_s=rate)
    pinned = torch.empty(min(copied, 1 << 28), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    taken = seconds(lambda: target.copy_(pinned, non_blocking=True))
    show("copy engine", gb_s=round(pinned.nbytes / taken / 1e9, 2))


def measure_products(args: argparse.Namespace, stored: Offloaded) -> None:
    """Products of a token without resident experts, and a fetch whose experts are all resident."""
    none = -1 - torch.arange(stored.num_experts, dtype=torch.int32, device="cuda")
    x_TD = torch.randn(1, args.hidden, dtype=torch.bfloat16, device="cuda")
    weight_TK = torch.rand(1, args.top_k, device="cuda")
    expert_TK = torch.arange(args.top_k, dtype=torch.int32, device="cuda")[None]
    both = (stored.host_gate_up_EGD, stored.host_down_EDF)

    def products(slot_I: Tensor) -> None:
        experts.offloaded_experts(
            x_TD, weight_TK, expert_TK, stored.num_experts, stored.first_1, slot_I,
            *stored.residents[:2], *both, x_TD,
        )  # fmt: skip

    for what, slot_I in (("in place", none), ("in slots", stored.residents.slot_I)):
        products(slot_I)
        taken = seconds(partial(products, slot_I))
        rate = round(args.top_k * stored.expert_bytes / taken / 1e9, 2)
        show("products " + what, gb_s=rate, microseconds=round(taken * 1e6, 1))

    kv_slot_T = torch.zeros(1, dtype=torch.int64, device="cuda")
    rest = (stored.first_1, stored.counters_C, *both, *stored.residents)

    def fetch() -> None:
        for _ in range(20):
            offload.fetch_experts(expert_TK, kv_slot_T, 0, *rest)

    fetch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fetch()
    show("fetch of resident experts", microseconds=round(seconds(graph.replay) / 20 * 1e6, 2))


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise ValueError("this measures a GPU's bus, and torch finds no CUDA device")
    platform = CudaPlatform()
    platform.prepare()
    measure_pinning(platform)
    region = platform.split_region()
    stored = layer(args, region)
    with torch.no_grad():
        measure_copies(args, stored)
        measure_products(args, stored)
    region.close()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
