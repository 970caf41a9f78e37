"""Experts with biases and a clamped SwiGLU, also in MXFP4, or with GELU, in Triton, for few and for
many tokens."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import clamped
from nanovllm.kernels.triton.experts import gelu_experts
from tests.kernels.test_triton_packed import packed_weight

device = "cuda" if torch.cuda.is_available() else "cpu"
ALPHA, LIMIT = 1.702, 7.0
EXPERTS, TOP_K, HIDDEN, SIZE = 6, 2, 192, 32
# Places that round: gate, up, the activation, the sum, the residual.
ERROR = 6 * torch.finfo(torch.float16).eps / 2
# pair by pair; sorted by expert
TOKENS = pytest.mark.parametrize("num_tokens", [1, 7])
FORMS = pytest.mark.parametrize("is_parallel", [False, True], ids=["all", "some"])


def inputs(
    num_tokens: int, is_parallel: bool, dtype: torch.dtype = torch.float16
) -> tuple[Any, ...]:
    """x, weights and experts of tokens, biases of the experts that are here, a residual, places."""
    logits = torch.randn(num_tokens, EXPERTS, device=device)
    weight_TK, expert_TK = reference.experts.topk_softmax(logits, TOP_K, True)
    num_here = EXPERTS - 2 if is_parallel else EXPERTS
    x_TD = torch.randn(num_tokens, HIDDEN, device=device).to(dtype)
    biases = (
        6 * torch.randn(num_here, 2 * SIZE, device=device).to(dtype),  # some are beyond the limit
        torch.randn(num_here, HIDDEN, device=device).to(dtype),
    )
    residual = torch.randn_like(x_TD)
    places = torch.tensor([1, -1, 3, 0, -1, 2], dtype=torch.int32, device=device)
    return x_TD, weight_TK, expert_TK, biases, residual, places if is_parallel else None


def exact(given: tuple[Any, ...], gate_up: Tensor, down: Tensor) -> Tensor:
    x_TD, weight_TK, expert_TK, (gate_up_bias, down_bias), residual, places = given
    found = residual.double()
    for t in range(len(x_TD)):
        for k in range(TOP_K):
            e = int(expert_TK[t, k])
            e = e if places is None else int(places[e])
            if e >= 0:
                both = gate_up[e].double() @ x_TD[t].double() + gate_up_bias[e].double()
                gate, up = both[:SIZE].clamp(max=LIMIT), both[SIZE:].clamp(-LIMIT, LIMIT)
                inner = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
                y = down[e].double() @ inner + down_bias[e].double()
                found[t] += weight_TK[t, k].double() * y
    return found


def check(y_TD: Tensor, wanted: Tensor) -> None:
    error = ERROR * torch.finfo(y_TD.dtype).eps / torch.finfo(torch.float16).eps
    assert float((y_TD.double() - wanted).norm() / wanted.norm()) < error


@TOKENS
@FORMS
def test_experts(num_tokens: int, is_parallel: bool) -> None:
    given = inputs(num_tokens, is_parallel)
    x_TD, weight_TK, expert_TK, (gate_up_bias, down_bias), residual, places = given
    num_here = len(down_bias)
    gate_up = (torch.randn(num_here, 2 * SIZE, HIDDEN, device=device) / HIDDEN**0.5).half()
    down = (torch.randn(num_here, HIDDEN, SIZE, device=device) / SIZE**0.5).half()
    args = (gate_up, gate_up_bias, down, down_bias, ALPHA, LIMIT, residual, places)
    wanted = exact(given, gate_up, down)
    check(clamped.clamped_experts(x_TD, weight_TK, expert_TK, *args), wanted)
    check(reference.clamped.clamped_experts(x_TD, weight_TK, expert_TK, *args), wanted)


@pytest.mark.parametrize(
    ("group", "num_tokens", "is_parallel", "dtype"),
    [(32, 1, False, torch.float16), (32, 1, True, torch.bfloat16), (32, 7, False, torch.bfloat16),
     (32, 7, True, torch.float16), (16, 1, False, torch.float16), (16, 7, True, torch.bfloat16),
     (8, 7, True, torch.float16)],
)  # fmt: skip
def test_packed_experts(group: int, num_tokens: int, is_parallel: bool, dtype: torch.dtype) -> None:
    """Groups of 16 are those of a rank that cuts blocks of 32; no kernel takes groups of 8."""
    given = inputs(num_tokens, is_parallel, dtype)
    x_TD, weight_TK, expert_TK, (gate_up_bias, down_bias), residual, places = given
    table = reference.packed.e2m1_table(device)

    def weight(num_outs: int, depth: int, group: int) -> tuple[Any, ...]:
        code, scale, *_ = packed_weight(num_outs, depth, 4, group, "", (len(down_bias),))
        return code, (4 * scale).bfloat16(), None, table, 4, group

    gate_up, down = weight(2 * SIZE, HIDDEN, 32), weight(HIDDEN, SIZE, group)
    real = [reference.packed.unpacked(*w, d) for w, d in ((gate_up, HIDDEN), (down, SIZE))]
    args = (*gate_up, gate_up_bias, *down, down_bias, ALPHA, LIMIT, residual, places)
    wanted = exact(given, *real)
    check(clamped.packed_clamped_experts(x_TD, weight_TK, expert_TK, *args), wanted)
    check(reference.clamped.packed_clamped_experts(x_TD, weight_TK, expert_TK, *args), wanted)


@TOKENS
@FORMS
def test_experts_with_gelu(num_tokens: int, is_parallel: bool) -> None:
    x_TD, weight_TK, expert_TK, (_, bias), residual, places = inputs(num_tokens, is_parallel)
    gate_up = (2 * torch.randn(len(bias), 2 * SIZE, HIDDEN, device=device) / HIDDEN**0.5).half()
    down = (torch.randn(len(bias), HIDDEN, SIZE, device=device) / SIZE**0.5).half()
    wanted = residual.double()
    for t, k in product(range(num_tokens), range(TOP_K)):
        e = int(expert_TK[t, k])
        e = e if places is None else int(places[e])
        if e >= 0:
            inner = reference.norm_act.gelu_mul(gate_up[e].double() @ x_TD[t].double())
            wanted[t] += weight_TK[t, k].double() * (down[e].double() @ inner)
    args = (x_TD, weight_TK, expert_TK, gate_up, down, residual, places)
    check(gelu_experts(*args), wanted)
    check(reference.experts.gelu_experts(*args), wanted)


def test_nan_stays_where_it_is() -> None:
    """The limits hide no NaN."""
    given = inputs(7, False)
    x_TD, weight_TK, expert_TK, (gate_up_bias, down_bias), residual, _ = given
    gate_up = torch.randn(EXPERTS, 2 * SIZE, HIDDEN, device=device).half()
    down = torch.randn(EXPERTS, HIDDEN, SIZE, device=device).half()
    gate_up[2] = torch.nan
    y_TD = clamped.clamped_experts(
        x_TD, weight_TK, expert_TK, gate_up, gate_up_bias, down, down_bias, ALPHA, LIMIT, residual
    )
    assert torch.equal(y_TD.isnan().any(1), (expert_TK == 2).any(1))
