"""Mixtures of experts: our ops as Ascend's fused ops, in interpreted graphs and op by op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.npu import experts as npu_experts
from tests.npu.op_runs import compare

D, F = 24, 20


def layer(
    num_tokens: int, num_experts: int, top_k: int, only: int | None = None
) -> dict[str, Tensor]:
    """Inputs of `experts`; with `only` every token chooses this expert first."""
    logits = torch.randn(num_tokens, num_experts)
    if only is not None:
        logits[:, only] = 20.0
    weight, expert = reference.experts.topk_softmax(logits, top_k, True)
    return {
        "x": torch.randn(num_tokens, D),
        "weight": weight,
        "expert": expert,
        "gate_up": torch.randn(num_experts, 2 * F, D) * 0.3,
        "down": torch.randn(num_experts, D, F) * 0.3,
    }


SHAPES = [(1, 8, 2), (1, 128, 8), (19, 5, 3), (99, 16, 1), (7, 3, 3)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_topk_softmax(
    run: Callable[..., Any],
    num_tokens: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    normalize: bool,
) -> None:
    """Experts and their order are those of the meaning, and weights are fp32 in both dtypes."""
    logits = torch.randn(num_tokens, num_experts).to(dtype)
    weight, expert = run(lambda x: ops.topk_softmax(x, top_k, normalize), {"x": logits.npu()})
    expected = reference.experts.topk_softmax(logits, top_k, normalize)
    assert torch.equal(expert.cpu(), expected[1]) and expert.dtype == torch.int32
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.cpu(), expected[0], rtol=2e-6, atol=0)


def test_equal_probabilities_go_to_the_smaller_expert(run: Callable[..., Any]) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5])
    _, expert = run(lambda x: ops.topk_softmax(x, 3, False), {"x": logits.npu()})
    assert expert.cpu().tolist() == [[1, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_bad_row_gets_nan_weights_and_experts_that_are_there(
    run: Callable[..., Any], bad: float, normalize: bool
) -> None:
    logits = torch.randn(4, 9)
    logits[2, 5] = bad
    logits[0, 3] = float("-inf")  # probability 0: nothing is wrong with it
    weight, expert = (
        x.cpu() for x in run(lambda x: ops.topk_softmax(x, 3, normalize), {"x": logits.npu()})
    )
    expected = reference.experts.topk_softmax(logits, 3, normalize)
    assert weight[2].isnan().all() and expert[2].tolist() == [0, 1, 2]
    rest = [0, 1, 3]
    assert torch.equal(expert[rest], expected[1][rest])
    torch.testing.assert_close(weight[rest], expected[0][rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("only", [None, 2], ids=["evenly", "one expert first"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_experts(
    run: Callable[..., Any],
    num_tokens: int,
    num_experts: int,
    top_k: int,
    only: int | None,
    dtype: torch.dtype,
) -> None:
    """Experts that no token chooses have NaN in their matrices: they are not read."""
    tensors = layer(num_tokens, num_experts, top_k, only)
    unused = sorted(set(range(num_experts)) - set(tensors["expert"].flatten().tolist()))
    for name in ("gate_up", "down"):
        tensors[name][unused] = float("nan")
    residual = {**tensors, "residual": torch.randn(num_tokens, D)}
    for inputs in (tensors, residual):
        compare(run, ops.experts, reference.experts.experts, inputs, dtype=dtype, kept=("weight",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [[0, 1], [4, 2, 0], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_experts_that_are_elsewhere_are_left_out(
    run: Callable[..., Any], num_tokens: int, own: list[int], dtype: torch.dtype
) -> None:
    """Their weights are NaN, and so are the matrices of expert 2, which no token chooses."""
    tensors = layer(num_tokens, 5, 3)
    tensors["expert"][tensors["expert"] == 2] = 3
    for name in ("gate_up", "down"):
        tensors[name][2] = float("nan")
        tensors[name] = tensors[name][own]
    local = torch.full((5,), -1, dtype=torch.int32)
    local[own] = torch.arange(len(own), dtype=torch.int32)
    is_here = local[tensors["expert"].long()] >= 0
    tensors["weight"] = tensors["weight"].where(is_here, float("nan"))
    residual = {**tensors, "residual": torch.randn(num_tokens, D), "local": local}
    compare(run, ops.experts, reference.experts.experts, residual, dtype=dtype, kept=("weight",))


def test_a_token_whose_experts_are_all_elsewhere_gets_zeros(run: Callable[..., Any]) -> None:
    tensors = {name: one.npu() for name, one in layer(3, 4, 2).items()}
    local = torch.tensor([0, 1, 2, 3, -1, -1], dtype=torch.int32).npu()
    tensors["expert"] = torch.tensor([[4, 5], [5, 4], [4, 5]], dtype=torch.int32).npu()
    inputs = {**tensors, "local": local}
    (found,) = run(lambda *args: ops.experts(*args[:5], None, args[5]), inputs)
    assert torch.equal(found.cpu(), torch.zeros(3, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SHAPES)
def test_expert_linear(
    run: Callable[..., Any], num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    tensors = layer(num_tokens, num_experts, top_k)
    for x in (tensors["x"], torch.randn(num_tokens, top_k, D)):
        inputs = {"x": x, "expert": tensors["expert"], "gate_up": tensors["gate_up"]}
        compare(run, ops.expert_linear, reference.experts.expert_linear, inputs, dtype=dtype)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "size", "match"),
    [
        (1025, 8, 64, "the model has 1025 experts: on an NPU a layer has 2 to 1024"),
        (1, 1, 64, "the model has 1 experts: on an NPU a layer has 2 to 1024"),
        (8, 9, 64, "sends each token to 9 of 8 experts: on an NPU it must be 1 to 8"),
        (8, 2, 65536, "rows of 65536 elements: on an NPU they must be below 65536"),
    ],
)
def test_what_the_ops_do_not_take_is_refused(
    num_experts: int, top_k: int, size: int, match: str
) -> None:
    x, weight = torch.zeros(1, size), torch.zeros(1, 1).expand(num_experts, 2, size)
    down = torch.zeros(1).expand(num_experts, size, 1)
    expert = torch.zeros(1, top_k, dtype=torch.int32)
    with pytest.raises(ValueError, match=match):
        npu_experts.experts(x, torch.ones(1, top_k), expert, weight, down)
    with pytest.raises(ValueError, match=match):
        npu_experts.expert_linear(x, expert, weight)
    if size == 64:
        with pytest.raises(ValueError, match=match):
            npu_experts.topk_softmax(torch.zeros(1, num_experts), top_k, True)


@pytest.mark.parametrize(
    "wrong", ["expert dtype", "tokens", "matrices", "width", "x dtype", "down dtype", "weights"]
)
def test_shapes_and_dtypes_that_torchair_would_accept_are_refused(wrong: str) -> None:
    tensors = layer(3, 5, 2)
    changes: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "expert dtype": ("expert", Tensor.long),
        "tokens": ("x", lambda x: x[:2]),
        "matrices": ("down", lambda x: x[:4]),
        "width": ("gate_up", lambda x: x[:, 2:]),
        "x dtype": ("x", Tensor.half),
        "down dtype": ("down", Tensor.half),
        "weights": ("weight", lambda x: x[:, :1]),
    }
    name, change = changes[wrong]
    with pytest.raises(AssertionError):
        npu_experts.experts(*{**tensors, name: change(tensors[name])}.values())
