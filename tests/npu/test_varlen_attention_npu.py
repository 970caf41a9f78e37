"""Attention within segments and the other ops of vision towers as Ascend's ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from tests.npu import semantics
from tests.npu.op_runs import compare

N, H = 3, 24
SCALE = H**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "num_padding"), [([1], 0), ([19], 5), ([7, 1, 20], 4), ([4, 4, 3, 0, 0], 8)],
    ids=str,
)  # fmt: skip
def test_segments_do_not_see_each_other(
    run: Callable[..., Any], lengths: list[int], num_padding: int, dtype: torch.dtype
) -> None:
    """NaN in the padding reaches no segment."""
    used = sum(lengths)
    tensors = {name: torch.randn(used + num_padding, N, H) for name in "qkv"}
    for x_TNH in tensors.values():
        x_TNH[used:] = torch.nan
    tensors["start_S"] = torch.tensor([0, *accumulate(lengths)]).int()

    def only_used(attend: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return attend(*inputs)[:used]

    compare(
        run,
        partial(only_used, ops.varlen_attention),
        partial(only_used, reference.attention.varlen_attention),
        tensors,
        max(lengths),
        SCALE,
        dtype=dtype,
    )


def test_more_segments_than_the_op_takes_are_refused(run: Callable[..., Any]) -> None:
    x_TNH = torch.randn(4200, 1, 64).npu()
    start_S = torch.arange(4201).int().npu()
    inputs = {"q": x_TNH, "k": x_TNH.clone(), "v": x_TNH.clone(), "start_S": start_S}
    with pytest.raises(ValueError, match=r"420\d segments: .*at most 4096.*vision_patch_budgets"):
        run(lambda *args: ops.varlen_attention(*args, 1, 0.125), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_forms_of_gelu_keep_their_meaning(
    run: Callable[..., Any], approximate: str, dtype: torch.dtype
) -> None:
    """GE's Gelu is the form with tanh; the two differ by up to 5e-4."""
    gelu = partial(torch.nn.functional.gelu, approximate=approximate)
    compare(run, gelu, gelu, {"x": torch.linspace(-4, 4, 99).view(9, 11)}, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norms(run: Callable[..., Any], dtype: torch.dtype) -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)

    tensors = {"x": torch.randn(19, 48) + 2, "weight": torch.randn(48), "bias": torch.randn(48)}
    compare(run, norm, norm, tensors, dtype=dtype)


def test_the_meanings_are_those_of_torch() -> None:
    q, k, v = (torch.randn(9, N, 64) for _ in "qkv")
    start_S = torch.tensor([0, 2, 2, 9]).int()
    found = semantics.packed_attention(q, k, v, [2, 2, 9], [2, 2, 9], 0.3)
    expected = reference.attention.varlen_attention(q, k, v, start_S, 7, 0.3)
    torch.testing.assert_close(found, expected)
    x = torch.linspace(-4, 4, 99)
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(semantics.gelu(x), tanh)
    x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
    found = semantics.layer_norm(x, [48], weight, bias, 1e-5)[0]
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-5))
