"""Products with packed weights to check and time: shapes of Qwen3 models, kinds, tiles, inputs."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import packed_wgmma
from nanovllm.kernels.cuda.packed_linear import Tile, packed_linear
from nanovllm.kernels.cuda.packed_stream import packed_stream
from nanovllm.kernels.triton import linear as triton_linear
from nanovllm.kernels.triton import packed_codes
from nanovllm.kernels.triton.norm_act import rms_norm, silu_mul
from nanovllm.kernels.triton.packed_codes import Codes
from nanovllm.tools.shapes import CONFIGS

DTYPE = torch.bfloat16
EPS = 1e-6
DEVICE = "cuda"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = {"8b": "Qwen3-8B", "30b": "Qwen3-30B-A3B", "0.6b": "Qwen3-0.6B"}
KINDS = ("int4", "fp8")


class Shape(NamedTuple):
    """A weight's rows and depth; what is fused at one row, and after the product."""

    num_lines: int
    depth: int
    norm: bool = False
    silu: bool = False


def shapes(model: str) -> dict[str, Shape]:
    """The dense products of a layer."""
    config = CONFIGS[MODELS[model]]
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query = config["num_attention_heads"] * head_dim
    qkv = query + 2 * config["num_key_value_heads"] * head_dim
    found = {"qkv": Shape(qkv, hidden, norm=True), "out": Shape(hidden, query)}
    if "num_experts" not in config:
        ffn = config["intermediate_size"]
        found["gate_up"] = Shape(2 * ffn, hidden, norm=True, silu=True)
        found["down"] = Shape(hidden, ffn)
    return found


def random_codes(kind: str, num_lines: int, depth: int, outer: tuple[int, ...] = ()) -> Codes:
    """int4 with groups of 128 and offsets in bf16, or fp8 with blocks of 128 × 128."""
    if kind == "fp8":
        weight = torch.randn(*outer, num_lines, depth, device=DEVICE).to(torch.float8_e4m3fn)
        blocks = (*outer, -(-num_lines // 128), -(-depth // 128))
        scale = (torch.rand(blocks, device=DEVICE) + 0.5) / depth**0.5
        return packed_codes.of_fp8(weight, scale, 128, 128)
    shape = (*outer, num_lines, depth // 2)
    code = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    groups = (*outer, num_lines, depth // 128)
    scale = ((torch.rand(groups, device=DEVICE) + 0.5) / depth**0.5 / 4).to(DTYPE)
    return packed_codes.of_packed(code, scale, -8 * scale, None, 4, 128)


def real(codes: Codes, depth: int) -> Tensor:
    """The real values in fp32."""
    code, scale, offset, table, bits, rows, group, is_fp8 = codes
    if is_fp8:
        return reference.packed.of_fp8(code.view(torch.float8_e4m3fn), scale, rows, group)
    return reference.packed.unpacked(code, scale, offset, table, bits, group, depth)


def num_bytes(codes: Codes) -> int:
    return sum(one.nbytes for one in codes[:4] if isinstance(one, Tensor))


class Case:
    """A product with enough weights to exceed the L2, in a kind and in bf16."""

    def __init__(self, shape: Shape, kind: str, rotated_bytes: int = 320 << 20) -> None:
        self.shape, self.kind = shape, kind
        first = random_codes(kind, *shape[:2])
        copies = max(1, min(28, -(-rotated_bytes // num_bytes(first))))
        self.codes = [first, *(self._copy(first) for _ in range(copies - 1))]
        self.norm = torch.rand(shape.depth, device=DEVICE).to(DTYPE) + 0.5

    @staticmethod
    def _copy(codes: Codes) -> Codes:
        return codes._replace(code=codes.code.clone(), scale=codes.scale.clone())

    def inputs(self, num_rows: int) -> None:
        num_outs = self.shape.num_lines // (2 if self.shape.silu else 1)
        self.x = torch.randn(num_rows, self.shape.depth, device=DEVICE).to(DTYPE)
        has_residual = not self.shape.norm
        self.residual = (
            torch.randn(num_rows, num_outs, device=DEVICE).to(DTYPE) if has_residual else None
        )

    def run(self, idx: int, tile: Tile | None = None) -> Tensor:
        """As in a step: at one row with the norm before it."""
        return packed_linear(
            self.x,
            self.codes[idx],
            norm_D=self.norm if self.shape.norm and len(self.x) == 1 else None,
            eps=EPS,
            residual_TO=self.residual,
            silu_mul=self.shape.silu,
            tile=tile,
        )

    def stream(self, idx: int, norm: bool = False) -> Tensor:
        """The same by packed_stream.cu, where `packed_stream.fits` is true; with a norm of several
        rows if `norm`."""
        return packed_stream(
            self.x,
            self.codes[idx],
            norm_D=self.norm if self.shape.norm and (norm or len(self.x) == 1) else None,
            eps=EPS,
            residual_TO=self.residual,
            silu_mul=self.shape.silu,
        )

    def wgmma(self, idx: int, tile: packed_wgmma.Tile) -> Tensor:
        return packed_wgmma.packed_wgmma(
            self.x, self.codes[idx], tile, residual_TO=self.residual, silu_mul=self.shape.silu
        )

    def launches(self) -> list[int]:
        return [i % len(self.codes) for i in range(28)]

    @cached_property
    def real_OD(self) -> Tensor:
        return real(self.codes[0], self.shape.depth)

    def error(self, y: Tensor, norm: bool) -> float:
        x = self.x.float()
        if norm and self.shape.norm:
            x = reference.norm_act.rms_norm(x, self.norm.float(), EPS)
        exact = linear(x, self.real_OD)
        exact = reference.norm_act.silu_mul(exact) if self.shape.silu else exact
        exact = exact if self.residual is None else exact + self.residual.float()
        return float((y.float() - exact).norm() / exact.norm())


class Plain:
    """The same product in bf16, by the kernels of today."""

    def __init__(self, shape: Shape, rotated_bytes: int = 320 << 20) -> None:
        self.shape = shape
        copies = max(1, min(14, -(-rotated_bytes // (shape.num_lines * shape.depth * 2))))
        size = (shape.num_lines, shape.depth)
        self.weights = [torch.randn(size, device=DEVICE, dtype=DTYPE) for _ in range(copies)]

    def run(self, idx: int, x: Tensor, norm: Tensor | None, residual: Tensor | None) -> Tensor:
        weight, silu = self.weights[idx % len(self.weights)], self.shape.silu
        if norm is not None and not triton_linear.takes(x, weight, True, silu):
            x, norm = rms_norm(x, norm, EPS), None
        if triton_linear.takes(x, weight, norm is not None, silu):
            return triton_linear.fused_linear(x, norm, weight, None, residual, EPS, silu)
        if residual is not None:
            return torch.addmm(residual, x, weight.t())
        y = linear(x, weight)
        return silu_mul(y) if silu else y


# Candidates by rows of x: up to 8, up to 16, and more.
TILES = (
    ((1, 4, 4, 1, 2), (1, 8, 4), (1, 8, 2, 1, 2), (1, 8, 2, 1, 3), (2, 4, 2), (2, 4, 2, 1, 3),
     (2, 8, 2), (2, 8, 2, 1, 2), (2, 16, 1), (2, 16, 2), (4, 8, 1), (4, 4, 2, 1, 2), (2, 4, 4)),
    ((2, 4, 2), (2, 4, 2, 1, 2), (2, 8, 2), (2, 16, 1), (2, 4, 2, 2), (2, 8, 1, 2), (2, 2, 2, 4),
     (1, 8, 2, 2), (1, 4, 4, 2), (4, 4, 1, 2), (4, 8, 1), (1, 8, 4), (2, 8, 2, 2), (1, 4, 2, 4)),
    ((2, 2, 2, 4), (2, 4, 2, 2), (2, 4, 1, 2), (2, 2, 1, 4), (1, 4, 2, 2), (1, 2, 2, 4),
     (1, 4, 2, 4), (1, 4, 1, 4), (1, 8, 1, 2), (2, 8, 2), (1, 8, 2, 2), (2, 8, 1, 2)),
)  # fmt: skip


def tiles(num_rows: int) -> list[Tile]:
    some = TILES[0 if num_rows <= 8 else 1 if num_rows <= 16 else 2]
    return [Tile(*one) for one in some]
