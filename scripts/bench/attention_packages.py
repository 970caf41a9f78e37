"""Times our attention kernels and the installed flash-attn packages on this GPU.

    python scripts/bench/attention_packages.py --out times.json [--shapes 8b 0.6b] [--only decode]

Backends: "ours" is what the engine takes, in blocks of 64 tokens and of 128; "ours, all GPUs" is
the prefill kernel that runs where the one for Hopper does not; then each package in its default
blocks. A graph replays launches that rotate over caches larger than the L2. Shares are of the
bandwidth (decode) and of the matrix rate (prefill) measured in the same run. A backend's first
result is compared with ours: one that differs by more than 1 %, or a call that fails, is a row
"failed", and the exit status is 1. flash-attn 4 compiles a kernel for
some seconds when it is first called, unless FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 finds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import flash_attention, ops
from nanovllm.kernels.triton import register as triton_kernels
from nanovllm.kernels.triton.attention_prefill import paged_attention_prefill
from nanovllm.tools import command_line
from nanovllm.tools.device_limits import DeviceLimits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.kernel_inputs import BLOCK, DTYPE, SHAPES, make_cache, relative_error
from scripts.bench.kernel_times import L2_BYTES, Table, time_ceilings

DECODE = [(rows, length) for length in (512, 4096, 32768) for rows in (1, 16, 64, 256)]
# (new tokens of each row, tokens in the cache before them)
PREFILL = [([num], 0) for num in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)] + [
    ([256], 4096),
    ([1024], 7168),
    ([2048], 30720),
    ([8192], 24576),
    ([512] * 16, 0),
    ([100, 1024, 300, 700, 19, 989] * 2, 0),
]
FAILED = "failed"
MOST_SHARE = 0.85  # of the free memory, for a cache


class Backend(NamedTuple):
    """A function with the arguments of `ops.ATTENTION`, and its block size for a head size."""

    attend: Callable[..., Tensor]
    block: Callable[[int], int]
    decodes: bool = True


def backends() -> dict[str, Backend]:
    triton_kernels.register()
    ours = ops.ATTENTION[""]
    found = {
        "ours": Backend(ours, lambda head: BLOCK),
        "ours, all GPUs": Backend(paged_attention_prefill, lambda head: BLOCK, decodes=False),
        "ours, 128": Backend(ours, lambda head: 128),
    }
    for flash in flash_attention.find(torch.cuda.get_device_capability())[0]:
        found[flash.name] = Backend(
            ops.ATTENTION[f"flash_attn_{flash.generation}"],
            lambda head, flash=flash: max(BLOCK, flash_attention.fast_page_tokens(flash, head)),
        )
    return found


def time_case(
    table: Table, limits: DeviceLimits, shape: str, q_lens: list[int], old: int, keys: list[str]
) -> None:
    num_heads, num_kv_heads, head_dim = SHAPES[shape]
    seq_lens = [q_len + old for q_len in q_lens]
    max_q_len = max(q_lens)
    num_bytes = sum(seq_lens) * 2 * num_kv_heads * head_dim * 2
    flops = 4 * head_dim * num_heads * sum(n * old + n * (n + 1) // 2 for n in q_lens)
    q = torch.randn(sum(q_lens), num_heads, head_dim, dtype=DTYPE, device="cuda")
    seq_len = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
    q_start = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
    num_layers = max(1 if max_q_len > 1 else 2, -(-L2_BYTES // num_bytes))
    torch.cuda.empty_cache()
    most_bytes = int(torch.cuda.mem_get_info()[0] * MOST_SHARE)
    num_layers = max(1, min(num_layers, 64, most_bytes // num_bytes))
    row = {"shape": shape, "rows": len(q_lens), "tokens": sum(q_lens), "old": old}
    caches: dict[int, tuple[Tensor, Tensor]] = {}
    first: dict[int, Tensor] = {}
    for name, backend in backends().items():
        if (keys and not any(key in name for key in keys)) or (
            max_q_len == 1 and not backend.decodes
        ):
            continue
        block = backend.block(head_dim)
        if block not in caches:
            caches.clear()  # two may not fit
            torch.manual_seed(0)
            caches[block] = make_cache(num_layers, seq_lens, num_kv_heads, block, head_dim)
        rest = (caches[block][1], seq_len, q_start, max_q_len, head_dim**-0.5, 0)
        try:
            actual = backend.attend(q, *caches[block][0][0], *rest)
            if block not in first:
                first[block] = ops.paged_attention(q, *caches[block][0][0], *rest)
            error = relative_error(actual, first[block])
            if not error < 1e-2:
                raise ValueError(f"relative error {error:.2e}")
            us = time_launches(backend.attend, [(q, *layer, *rest) for layer in caches[block][0]])
        except Exception as problem:  # the compiler of flash-attn 4 has its own classes
            table.add(kind=FAILED, backend=name, **row, why=str(problem)[:300])
            continue
        is_decode = max_q_len == 1
        share = (num_bytes / limits.bandwidth if is_decode else flops / limits.flops) * 1e6 / us
        kind = "decode" if is_decode else "prefill"
        table.add(kind=kind, backend=name, **row, us=us, share=share, error=error)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["8b", "0.6b"], choices=SHAPES)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--backends", nargs="+", default=[], help="parts of names; all by default")
    args = parser.parse_args()
    table = Table()
    limits = time_ceilings(table)
    cases: list[tuple[list[int], int]] = []
    if args.only != "prefill":
        cases += [([1] * rows, length - 1) for rows, length in DECODE]
    if args.only != "decode":
        cases += PREFILL
    for shape in args.shapes:
        for q_lens, old in cases:
            time_case(table, limits, shape, q_lens, old, args.backends)
            if args.out:
                found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "rows": table.rows}
                args.out.write_text(json.dumps(found, indent=1))
    return int(any(row["kind"] == FAILED for row in table.rows))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
