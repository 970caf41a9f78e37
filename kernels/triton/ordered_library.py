"""The library's products in deterministic engines, for sizes with which it has the bits of ours.

An output of cuBLAS is the same chain of instructions along the depth as ours, unless it cuts the
depth into parts. Its own rules choose by the sizes, so the first product of each size is computed
both ways for random rows, and by a captured graph too. If a bit differs, that size stays with our
kernel.

Shapes: T rows | D depth | O outputs, F half of them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanovllm.kernels.triton import common
from nanovllm.kernels.triton.norm_act import silu_mul

MIN_ROWS = 33  # with fewer, tiles of ours are as fast


class Product(NamedTuple):
    """The arguments of `reference.ordered.ordered_linear`."""

    x_TD: Tensor
    weight_OD: Tensor
    bias_O: Tensor | None
    residual_TO: Tensor | None
    is_gated: bool

    @property
    def sizes(self) -> Sizes:
        num_rows, depth = self.x_TD.shape
        return Sizes(
            self.x_TD.device, self.x_TD.dtype, num_rows, depth, self.weight_OD.shape[0],
            self.bias_O is not None, self.is_gated,
        )  # fmt: skip


class Sizes(NamedTuple):
    """What cuBLAS may choose by."""

    device: torch.device
    dtype: torch.dtype
    num_rows: int
    depth: int
    num_lines: int
    has_bias: bool
    is_gated: bool


Ours = Callable[[Product], Tensor]
_agrees: dict[Sizes, bool] = {}


def takes(product: Product) -> bool:
    """Whether the library may compute such a product."""
    x_TD, weight_OD = product.x_TD, product.weight_OD
    is_plain = x_TD.is_contiguous() and weight_OD.is_contiguous()
    return x_TD.device.type == "cuda" and x_TD.shape[0] >= MIN_ROWS and is_plain


def fastest(product: Product, ours: Ours) -> Tensor:
    """The product by the library if its bits are those of `ours`. In the capture of a graph a
    product of a new size is ours, since nothing can be compared there."""
    if common.counters_are_fake:  # a dry run, for the kernels of both
        by_library(product)
        return ours(product)
    sizes = product.sizes
    if sizes not in _agrees:
        if torch.cuda.is_current_stream_capturing():
            return ours(product)
        _agrees[sizes] = _has_same_bits(product, ours)
    return by_library(product) if _agrees[sizes] else ours(product)


def by_library(product: Product) -> Tensor:
    """Rounds where ours rounds."""
    y_TO = linear(product.x_TD, product.weight_OD, product.bias_O)
    if product.is_gated:
        return silu_mul(y_TO)
    return y_TO if product.residual_TO is None else y_TO.add_(product.residual_TO)


def _has_same_bits(product: Product, ours: Ours) -> bool:
    """Compares for random rows, with the weight and the bias of the product."""
    x_TD = product.x_TD
    generator = torch.Generator(x_TD.device).manual_seed(0)
    drawn_TD = torch.randn(x_TD.shape, device=x_TD.device, generator=generator).to(x_TD.dtype)
    drawn = product._replace(x_TD=drawn_TD, residual_TO=None)
    expected = ours(drawn)
    if not torch.equal(by_library(drawn), expected):
        return False
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        captured = by_library(drawn)
        graph.capture_end()
        graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    return torch.equal(captured, expected)
