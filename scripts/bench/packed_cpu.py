"""Times products of packed weights on a CPU, against bf16, int8 weights, and a copy of memory.

PYTHONPATH=. python scripts/bench/packed_cpu.py
PYTHONPATH=. python scripts/bench/packed_cpu.py --rows 1 512 --dtype float32 --formats q4 bf16

One line for each format and number of rows: tokens per second of all the products of a layer
(qkv, o, gate and up, down), and the GB/s at which weights are read. The weights of several layers
are multiplied in turn, so that they come from memory and not from a cache. Formats take turns, and
a figure is the best of `--turns`: other programs on the machine make all figures smaller. With one
thread, times are processor time, which they change less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import ggml, packed
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import linear as cpu_linear
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.tools import command_line

# (outputs, depth) of a layer's products
SHAPES = {
    "SmolLM2-135M": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
}
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4 = tuple(i * i / 225.0 if i % 2 else -i * i / 225.0 for i in range(16))  # fits no integers
SYMMETRIC = tuple(float(i - 8) for i in range(16))


GGML_NAMES = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K")


class Matrix(NamedTuple):
    product: Callable[[Tensor], Tensor]
    num_bytes: int


def codes(shape: tuple[int, int], bits: int) -> Tensor:
    num_outputs, depth = shape
    num_bytes = depth if bits == 8 else -(-depth // 32) * 16
    return torch.randint(0, 256, (num_outputs, num_bytes), dtype=torch.uint8)


def packed_matrix(
    shape: tuple[int, int],
    bits: int,
    group: int,
    levels: tuple[float, ...] | None,
    has_offset: bool,
    scale_dtype: torch.dtype,
    by_rows: bool = False,
) -> Matrix:
    """Rows are interleaved as an engine's are, or with `by_rows` none."""
    num_outputs, depth = shape
    group = group or depth
    scale = (torch.rand(num_outputs, -(-depth // group)) / 100).to(scale_dtype)
    offset = -8 * scale if has_offset else None
    table = None if levels is None else torch.tensor(levels)
    weight = PackedWeight(codes(shape, bits), scale, offset, table, None, bits, group, depth)
    if not by_rows and packed.prefers_interleaved(packed.Weight(*weight.codes), depth):
        weight = weight.interleaved()
    tensors = [one for one in weight[:3] if one is not None]
    return Matrix(
        lambda x: packed.packed_linear(x, *weight.codes, None), sum(one.nbytes for one in tensors)
    )


def ggml_matrix(shape: tuple[int, int], ggml_type: int) -> Matrix:
    (num_outputs, depth), kind = shape, reference.ggml.TYPES[ggml_type]
    num = depth // kind.columns
    block = torch.randint(0, 256, (num_outputs, num * kind.num_bytes), dtype=torch.uint8)
    half = (torch.rand(num_outputs, num, len(kind.halves)) / 100).half()
    block = reference.ggml.with_halves(block, ggml_type, half)
    return Matrix(lambda x: ggml.ggml_linear(x, block, ggml_type, None), block.numel())


def fp8_matrix(shape: tuple[int, int]) -> Matrix:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    return Matrix(lambda x: packed.fp8_linear(x, weight, scale, 128, 128, None), weight.numel())


def int8_matrix(shape: tuple[int, int]) -> Matrix:
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(shape[0])
    return Matrix(lambda x: cpu_linear.linear_int8(x, weight, scale, None), weight.numel())


def plain_matrix(shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    weight = torch.randn(shape).to(dtype)
    return Matrix(
        lambda x: cpu_linear.linear(x.to(dtype), weight, None), weight.numel() * dtype.itemsize
    )


HALF, FULL = torch.float16, torch.float32
SIZES: dict[str, tuple[int, int, tuple[float, ...] | None, bool, torch.dtype]] = {
    "q4 32 table": (4, 32, SYMMETRIC, False, HALF),
    "q4 32 table fp32 scale": (4, 32, SYMMETRIC, False, FULL),
    "q4 32 offset": (4, 32, None, True, HALF),
    "q4 32 offset fp32 scale": (4, 32, None, True, FULL),
    "q4 128 offset": (4, 128, None, True, HALF),
    "mxfp4 32": (4, 32, MXFP4, False, FULL),
    "nvfp4 16": (4, 16, MXFP4, False, FULL),
    "q4 96 offset": (4, 96, None, True, HALF),
    "nf4 64": (4, 64, NF4, False, FULL),
    "q8 32": (8, 32, None, True, HALF),
    "q8 row": (8, 0, None, True, FULL),
}


def of_sizes(name: str, shape: tuple[int, int], by_rows: bool = False) -> Matrix:
    return packed_matrix(shape, *SIZES[name], by_rows=by_rows)


FORMATS: dict[str, Callable[[tuple[int, int]], Matrix]] = {
    **{name: partial(of_sizes, name) for name in SIZES},
    **{f"rows of {name}": partial(of_sizes, name, by_rows=True) for name in SIZES},
    **{
        f"ggml {name}": partial(ggml_matrix, ggml_type=getattr(reference.ggml, name))
        for name in GGML_NAMES
    },
    "fp8 128": fp8_matrix,
    "int8": int8_matrix,
    "bf16": lambda shape: plain_matrix(shape, torch.bfloat16),
    "fp32": lambda shape: plain_matrix(shape, torch.float32),
}


def fits(name: str, depths: list[int]) -> bool:
    """Types with K have blocks of 256 columns."""
    return not name.endswith("_K") or all(depth % 256 == 0 for depth in depths)


def copy_speed() -> float:
    """GB/s that a copy of 256 MB reads (and writes as many)."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return source.numel() * 4 / min(times) / 1e9


def time_of(layers: list[list[Matrix]], inputs: dict[int, Tensor], depths: list[int]) -> float:
    """Seconds for one layer's products."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for layer in layers:
        for matrix, depth in zip(layer, depths, strict=True):
            matrix.product(inputs[depth])
    return (clock() - start) / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 64, 512])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="START")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=96, help="of weights of each format")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu_library.load()
    chosen = [name for name in FORMATS if name.startswith(tuple(args.formats))]
    print(f"{args.threads} threads, x in {args.dtype}; a copy reads {copy_speed():.1f} GB/s")
    for model in args.models:
        shapes = SHAPES[model]
        depths = [depth for _, depth in shapes]
        print(f"\n{model}: tokens/s of a layer (GB/s of weights) at each number of rows")
        print(f"{'format':24}" + "".join(f"{rows:>18}" for rows in args.rows))
        layers, sizes = {}, {}
        names = [name for name in chosen if fits(name, depths)]
        for name in names:
            one = [FORMATS[name](shape) for shape in shapes]
            sizes[name] = sum(matrix.num_bytes for matrix in one)
            count = max(2, (args.megabytes << 20) // sizes[name])
            layers[name] = [one] + [[FORMATS[name](s) for s in shapes] for _ in range(count - 1)]
        cells: dict[str, list[str]] = {name: [] for name in names}
        for rows in args.rows:
            dtype = getattr(torch, args.dtype)
            inputs = {depth: torch.randn(rows, depth).to(dtype) for depth in depths}
            used = {name: layers[name][: max(2, 800 // rows)] for name in names}
            best = dict.fromkeys(names, float("inf"))
            for _ in range(args.turns if rows <= 64 else max(2, args.turns // 2)):
                for name in names:
                    best[name] = min(best[name], time_of(used[name], inputs, depths))
            for name in names:
                rate = f"{rows / best[name]:,.0f} ({sizes[name] / best[name] / 1e9:.1f})"
                cells[name].append(rate)
        for name in names:
            print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells[name]), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
