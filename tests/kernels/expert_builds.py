"""The kernels of experts with their production constants, for `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton


class Mixture(NamedTuple):
    hidden: int
    size: int
    num_experts: int
    top_k: int


MIXTURES = {
    "qwen3-30b-a3b": Mixture(2048, 768, 128, 8),
    "odd": Mixture(200, 72, 60, 4),
    "gpt-oss-20b": Mixture(2880, 2880, 32, 4),
}
# Types of pointers that are not those of the model's dtype.
TYPES = {
    "scale_ptr": "*fp32", "logits_ptr": "*fp32", "arrived_ptr": "*i32", "expert_ptr": "*i32",
    "pair_ptr": "*i32", "start_ptr": "*i32", "first_ptr": "*i32", "slot_ptr": "*i32",
    "local_ptr": "*i32",
    "owner_ptr": "*i32", "copies_ptr": "*i32", "buffer_slot_ptr": "*i32", "kv_slot_ptr": "*i64",
    "counters_ptr": "*i64", "stamp_ptr": "*i64", "clock_ptr": "*i64",
}  # fmt: skip
# Biases of experts, and the activation of gpt-oss.
NOT_CLAMPED: dict[str, Any] = {"HAS_BIAS": False, "ALPHA": 0.0, "LIMIT": 0.0, "bias_ptr": None}
CLAMPED: dict[str, Any] = {"HAS_BIAS": True, "ALPHA": 1.702, "LIMIT": 7.0}
# In these kernels weight_ptr and out_ptr are results of the choice of experts.
CHOICE = {"weight_ptr": "*fp32"}
GROUPS = TYPES | CHOICE | {"bias_ptr": "*fp32"}

# name, kernel, constants, warps, stages, types of pointers
Launch = tuple[str, Any, dict[str, Any], int, int, dict[str, str]]


def other_launches(name: str, all_forms: bool) -> Iterator[Launch]:
    """All launches of a sparse layer but those of groups; with all forms also those that read
    experts on the host, and those with experts on other ranks."""
    mixture = MIXTURES[name]
    yield from _choices(mixture, ("", " expert_parallel") if all_forms else ("",))
    for where in ("", " offloaded", " expert_parallel") if all_forms else ("",):
        yield from _few(mixture, where)
    yield from _copies(mixture)


def group_launches(
    name: str, dtype: str, shared_bytes: int, every: bool, offloaded: bool
) -> Iterator[Launch]:
    """Products for many tokens: both for groups of 1 and of 24. The largest groups have one tile,
    which `every` compiles for both products. In fp32 that is the tile for 24, with fewer stages."""
    cases = [(pairs_each, gated) for pairs_each in (1.0, 24.0) for gated in (False, True)]
    if dtype != "fp32":
        cases += [(1000.0, gated) for gated in ((False, True) if every else (True,))]
    for pairs_each, gated in cases:
        yield _group(MIXTURES[name], pairs_each, gated, False, shared_bytes, dtype)
    if offloaded:
        for gated in (False, True) if every else (True,):
            yield _group(MIXTURES[name], 1.0, gated, True, shared_bytes, dtype)


def clamped_launches(name: str, shared_bytes: int) -> Iterator[Launch]:
    """Launches of experts with biases and a clamped activation."""
    yield from _few(MIXTURES[name], " clamped")
    for gated in (False, True):
        yield _group(MIXTURES[name], 24.0, gated, False, shared_bytes, "bf16", clamped=True)


def _choices(mixture: Mixture, forms: tuple[str, ...]) -> Iterator[Launch]:
    from nanovllm.kernels.triton import group_topk, moe_sort, topk_softmax

    hidden, _, num_experts, top_k = mixture
    shape = {
        "NUM_EXPERTS": num_experts,
        "EXPERTS_P": triton.next_power_of_2(num_experts),
        "TOP_K": top_k,
        "NORMALIZE": True,
    }
    score = shape | {"DEPTH": hidden, "COLUMNS": 256, "WARPS": 4}
    score |= {"HAS_BIAS": False, "bias_ptr": None}
    logits = {"logits_ptr": "*bf16"}
    yield (
        "route",
        topk_softmax.topk_softmax_kernel,
        shape | {"ROWS": 1},
        1,
        3,
        TYPES | CHOICE | logits,
    )
    yield (
        "route within groups",
        group_topk.group_topk_kernel,
        _groups(num_experts, top_k),
        1,
        3,
        GROUPS,
    )
    yield "norm_router_topk", topk_softmax.norm_router_topk_kernel, score, 4, 3, TYPES | CHOICE
    for where in forms:
        parallel = {"EXPERT_PARALLEL": bool(where)}
        sort = {"NUM_EXPERTS": num_experts, "BLOCK": 2048} | parallel
        yield f"sort{where}", moe_sort.sort_pairs_kernel, sort, 4, 3, TYPES
        combine = {"TOP_K": top_k, "DIM": hidden, "BLOCK": 1024, "HAS_RESIDUAL": True} | parallel
        yield f"combine{where}", moe_sort.combine_kernel, combine, 4, 3, TYPES


def _groups(num_experts: int, top_k: int) -> dict[str, Any]:
    """Four groups, of which two are chosen."""
    from nanovllm.kernels.triton.group_topk import group_constants

    return group_constants(num_experts, 4, 2) | {
        "GROUP_SCORES": 2, "TOP_K": top_k, "SIGMOID": True, "HAS_BIAS": True, "NORMALIZE": True,
    }  # fmt: skip


def _few(mixture: Mixture, where: str) -> Iterator[Launch]:
    from nanovllm.kernels.triton import moe_gemv

    hidden, size, _, top_k = mixture
    common = {
        "TOP_K": top_k,
        "COLUMNS": moe_gemv.COLUMNS,
        "OFFLOADED": where == " offloaded",
        "EXPERT_PARALLEL": where == " expert_parallel",
        **(CLAMPED if where == " clamped" else NOT_CLAMPED),
    }
    first, second = moe_gemv.gemv_tiles(hidden, size)
    for label, kernel, tile, outs, depth in (
        ("gate_up", moe_gemv.moe_gemv_gate_up_kernel, first, size, hidden),
        ("down", moe_gemv.moe_gemv_down_kernel, second, hidden, size),
    ):
        constants = common | {
            "NUM_OUTS": outs,
            "DEPTH": depth,
            "OUTS": tile.outs,
            "WARPS": tile.num_warps,
            "AHEAD": tile.ahead,
            "HAS_RESIDUAL": True,
        }
        yield f"pair {label}{where}", kernel, constants, tile.num_warps, 3, TYPES


def _group(
    mixture: Mixture,
    pairs_each: float,
    gated: bool,
    offloaded: bool,
    shared_bytes: int,
    dtype: str,
    clamped: bool = False,
) -> Launch:
    from nanovllm.kernels.triton import grouped_gemm

    hidden, size, num_experts, top_k = mixture
    tile = grouped_gemm.grouped_tile(pairs_each, gated, 4 if dtype == "fp32" else 2, shared_bytes)
    constants = {
        "NUM_EXPERTS": num_experts,
        "EXPERTS_P": triton.next_power_of_2(num_experts),
        "TOP_K": top_k,
        "NUM_OUTS": size if gated else hidden,
        "DEPTH": hidden if gated else size,
        "ROWS": tile.rows,
        "LINES": tile.lines,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "X_BY": (grouped_gemm.BY_TOKEN if gated else grouped_gemm.BY_PLACE).value,
        "OUT_BY": (grouped_gemm.BY_PLACE if gated else grouped_gemm.BY_PAIR).value,
        "GATED": gated,
        "HAS_SCALE": not gated,
        "OFFLOADED": offloaded,
        "UPCAST": False,
        **(CLAMPED if clamped else NOT_CLAMPED),
    }
    where = " offloaded" if offloaded else " clamped" if clamped else ""
    label = f"group {'gate_up' if gated else 'down'} {pairs_each:g}{where}"
    return label, grouped_gemm.grouped_gemm_kernel, constants, tile.num_warps, 3, TYPES


def _copies(mixture: Mixture) -> Iterator[Launch]:
    from nanovllm.kernels.triton import offload

    _, _, num_experts, top_k = mixture
    hidden, size = mixture.hidden, mixture.size
    experts_p, slots = triton.next_power_of_2(num_experts), max(2, num_experts // 4)
    shape = {"NUM_EXPERTS": num_experts, "EXPERTS_P": experts_p}
    plan = shape | {
        "TOP_K": top_k,
        "NUM_SLOTS": slots,
        "SLOTS_P": triton.next_power_of_2(slots),
        "BLOCK": max(1, offload.COMPARED // experts_p),
        "IS_AHEAD": False,
    }
    sizes = {"GATE_UP": 2 * size * hidden, "DOWN": hidden * size}
    tile = offload.CopyTile()
    copy = sizes | {"BLOCK": tile.num_bytes // 2}
    out = {"out_ptr": "*i32"}
    yield "fetch_plan", offload.fetch_plan_kernel, plan, 4, 3, TYPES | out
    yield "stream_plan", offload.stream_plan_kernel, shape, 4, 3, TYPES
    yield "copy", offload.copy_kernel, copy, tile.num_warps, 3, TYPES
