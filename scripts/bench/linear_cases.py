"""Inputs of one fused product, and ways to compute it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanovllm.kernels import reference
from nanovllm.kernels.triton.gated_gemm import GatedTile, gated_gemm
from nanovllm.kernels.triton.norm_act import rms_norm, silu_mul
from nanovllm.kernels.triton.skinny_gemm import skinny_gemm
from nanovllm.kernels.triton.split_k_gemm import SplitKTile, split_k_gemm
from scripts.bench.linear_tiles import Shape, Tile

DTYPE = torch.bfloat16
ROTATED_BYTES = 400 << 20  # launches rotate over at least this many bytes of weights


class Case:
    """A product's inputs, with enough weights to exceed the L2."""

    def __init__(self, shape: Shape, num_rows: int, weights: list[Tensor] | None = None) -> None:
        num_outs, depth, norm, self.silu = shape
        self.shape, self.num_rows = shape, num_rows
        rows = 2 * num_outs if self.silu else num_outs
        self.weight_bytes = rows * depth * 2
        copies = max(3, min(28, -(-ROTATED_BYTES // self.weight_bytes)))
        self.weights = weights or [
            (torch.randn(rows, depth, device="cuda") / depth**0.5).to(DTYPE) for _ in range(copies)
        ]
        self.x = torch.randn(num_rows, depth, device="cuda").to(DTYPE)
        # as in a model: out and down are added to the residual stream
        self.residual = (
            None
            if num_outs > depth or self.silu
            else torch.randn(num_rows, num_outs, device="cuda").to(DTYPE)
        )
        self.norms = (
            [(torch.rand(depth, device="cuda") + 0.5).to(DTYPE) for _ in self.weights]
            if norm
            else None
        )

    def launches(self) -> list[int]:
        """The index of the weight of each launch."""
        return [i % len(self.weights) for i in range(28)]

    def fused(self, idx: int, tile: Tile, pdl: bool | None = None) -> Tensor:
        """The fused kernel of this tile. `pdl`: programmatic dependent launch or the default."""
        norm = self.norms[idx] if self.norms else None
        if isinstance(tile, GatedTile):
            return gated_gemm(self.x, self.weights[idx], None, launch=tile, pdl=pdl)
        if isinstance(tile, SplitKTile):
            return split_k_gemm(
                self.x, self.weights[idx], None, self.residual, self.silu, launch=tile, pdl=pdl
            )
        return skinny_gemm(
            self.x,
            norm,
            self.weights[idx],
            None,
            self.residual,
            1e-6,
            self.silu,
            launch=tile,
            pdl=pdl,
        )

    def apart(self, idx: int) -> Tensor:
        """cuBLAS, with separate kernels for the norm and the activation."""
        x = rms_norm(self.x, self.norms[idx], 1e-6) if self.norms else self.x
        if self.residual is not None:
            return torch.addmm(self.residual, x, self.weights[idx].t())
        y = linear(x, self.weights[idx])
        return silu_mul(y) if self.silu else y

    @cached_property
    def exact(self) -> Tensor:
        x = self.x.double()
        if self.norms:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norms[0].double()
        exact = x @ self.weights[0].double().T
        exact = reference.norm_act.silu_mul(exact) if self.silu else exact
        return exact if self.residual is None else exact + self.residual.double()

    def error(self, y: Tensor) -> float:
        return float((y.double() - self.exact).norm() / self.exact.norm())


class Small(Case):
    """One weight of zeros: enough to compile a kernel, which depends on shapes only."""

    def __init__(self, shape: Shape, num_rows: int) -> None:
        num_outs, depth, norm, self.silu = shape
        rows = 2 * num_outs if self.silu else num_outs
        self.weights = [torch.zeros(rows, depth, device="cuda", dtype=DTYPE)]
        self.x = torch.zeros(num_rows, depth, device="cuda", dtype=DTYPE)
        self.residual = (
            None
            if num_outs > depth or self.silu
            else torch.zeros(num_rows, num_outs, device="cuda", dtype=DTYPE)
        )
        self.norms = [torch.zeros(depth, device="cuda", dtype=DTYPE)] if norm else None
