"""Checks and times the experts of Qwen3-30B-A3B in packed weights, against bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import packed_experts
from nanovllm.kernels.triton.experts import experts as plain_experts
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.gpu_timing import time_launches
from scripts.bench.packed_cases import DEVICE, DTYPE, num_bytes, random_codes, real

CONFIG = CONFIGS["Qwen3-30B-A3B"]
HIDDEN, SIZE = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
EXPERTS, TOP_K = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
LAYERS = 4


def bench_experts(kind: str, rows: Sequence[int], bandwidth: float) -> dict[str, Any]:
    """Microseconds of all experts of a layer for each number of rows."""
    layers = [
        (
            random_codes(kind, 2 * SIZE, HIDDEN, (EXPERTS,)),
            random_codes(kind, HIDDEN, SIZE, (EXPERTS,)),
        )
        for _ in range(LAYERS)
    ]
    plain = [[real(part, depth).to(DTYPE) for part, depth in zip(layers[0], (HIDDEN, SIZE))]]
    plain += [[one.clone() for one in plain[0]] for _ in range(LAYERS - 1)]
    found: dict[str, Any] = {"kind": kind, "rows": {}}
    for num_rows in rows:
        logits = torch.randn(num_rows, EXPERTS, device=DEVICE)
        weight, expert = reference.experts.topk_softmax(logits, TOP_K, True)
        x = torch.randn(num_rows, HIDDEN, device=DEVICE).to(DTYPE)
        row = _timed(layers, plain, x, weight, expert)
        share = len(expert.unique()) / EXPERTS
        limit = share * sum(map(num_bytes, layers[0])) / bandwidth * 1e6
        slower = "  SLOWER THAN BF16" if row["us"] > row["bf16"] else ""
        print(
            f"experts 30b {kind:4} rows {num_rows:3}: {row['us']:7.2f} µs, "
            f"bf16 {row['bf16']:7.2f}, bytes {limit:6.2f} ({limit / row['us']:4.0%}) "
            f"error {row['error']:.1e}{slower}",
            flush=True,
        )
        found["rows"][num_rows] = row
    return found


def _timed(
    layers: list[tuple[Codes, Codes]],
    plain: list[list[Tensor]],
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
) -> dict[str, Any]:
    def run(idx: int) -> Tensor:
        y = packed_experts.run_experts(x, weight, expert, *layers[idx], None, None)
        assert y is not None
        return y

    def run_plain(idx: int) -> Tensor:
        return plain_experts(x, weight, expert, *plain[idx])

    calls = [(i % LAYERS,) for i in range(28)]
    exact = run_plain(0).float()
    error = float((run(0).float() - exact).norm() / exact.norm())
    row: dict[str, Any] = {"error": error, "us": time_launches(run, calls)}
    row["bf16"] = time_launches(run_plain, calls)
    return row
