"""Runs our ops on npu tensors, in an interpreted graph or op by op, and compares results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanovllm.compile.lower import torchair
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.trace import trace
from nanovllm.kernels.npu import kernels as npu_kernels


def in_graph(function: Callable[..., Any], inputs: dict[str, object]) -> tuple[Tensor, ...]:
    """The results of a function after tracing, conversion to Ascend IR and interpretation."""
    graph, fakes, _ = trace(function, inputs)
    replaced = replace_ops(graph, fakes, table=npu_kernels.IN_GRAPH)
    run = torchair.lower(replaced, fakes, settings=torchair.TorchairOptions())
    return tuple(run(*(value for value in inputs.values() if isinstance(value, Tensor))))


def eagerly(function: Callable[..., Any], inputs: dict[str, object]) -> tuple[Tensor, ...]:
    result = function(*inputs.values())
    return result if isinstance(result, tuple) else (result,)


def compare(
    run: Callable[..., Any],
    op: Callable[..., Any],
    meaning: Callable[..., Any],
    tensors: dict[str, Tensor],
    *settings: Any,
    dtype: torch.dtype = torch.float32,
    kept: Sequence[str] = (),
) -> None:
    """Compare results and written inputs of `op` on npu tensors with `meaning` in fp32.

    Inputs of fp32 are rounded to `dtype`, but for those named in `kept`. NaN in an input must not
    reach a result.

    In bf16 the op rounds its inputs once, its result once and values in between a few times, each
    time by up to 2⁻⁸ of the largest value.
    """
    rounded = {
        name: x.to(dtype) if x.dtype == torch.float32 and name not in kept else x
        for name, x in tensors.items()
    }
    expected_inputs = {
        name: x.float() if x.dtype == dtype else x.clone() for name, x in rounded.items()
    }
    expected = meaning(*expected_inputs.values(), *settings)
    expected = expected if isinstance(expected, tuple) else (expected,)
    inputs = {name: x.npu() for name, x in rounded.items()}
    actual = run(lambda *args: op(*args, *settings), inputs)
    share = 4 * 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    pairs = [(a.cpu(), e) for a, e in zip(actual, expected) if e is not None]
    assert not any(a.is_floating_point() and a.isnan().any() for a, _ in pairs)
    pairs += [(x.cpu(), expected_inputs[name]) for name, x in inputs.items()]
    for a, e in pairs:
        assert a.shape == e.shape
        if e.is_floating_point():
            atol = share * float(e.nan_to_num().abs().max())
            torch.testing.assert_close(a.float(), e, rtol=0, atol=atol, equal_nan=True)
        else:
            assert torch.equal(a, e)
