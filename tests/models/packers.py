"""Packs matrices as checkpoints store them, and gives the numbers that they stand for.

compressed-tensors packs by its own library; the others are loops that follow the descriptions of
their layouts, and share nothing with the formats that read them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Compressed:
    """Packs by compressed-tensors, with its own `weights` and name of a format."""

    format: str
    weights: dict[str, Any]

    def __call__(self, weight: Tensor) -> Packed:
        args = QuantizationArgs(**self.weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(self.format)
        state: dict[str, Any] = {"weight": weight.clone(), **self._scales(weight, args)}
        state = compressor.compress(state, scheme)
        if args.type == "float" and args.num_bits == 4:
            return state, _of_fp4(state)
        real = compressor.decompress(dict(state), scheme)["weight"]
        return state, real.float()

    def _scales(self, weight: Tensor, args: Any) -> dict[str, Tensor]:
        size = {"channel": weight.shape[1], "tensor": weight.numel()}.get(args.strategy)
        groups = weight.reshape(1, -1) if args.strategy == "tensor" else weight
        groups = groups.unflatten(-1, (-1, size or args.group_size))
        low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
        largest = torch.maximum(-low, high)
        if args.type == "float" and args.num_bits == 4:
            if args.group_size == 32:
                return {"weight_scale": torch.exp2(torch.ceil(torch.log2(largest / 6)))}
            whole = 448 * 6 / largest.max()
            scale = (whole * largest / 6).to(torch.float8_e4m3fn).float()
            return {"weight_scale": scale, "weight_global_scale": whole.view(1)}
        if args.type == "float":
            return {"weight_scale": (largest / 448).squeeze(0 if args.strategy == "tensor" else [])}
        levels = 2**args.num_bits - 1
        scale = (largest * 2 / levels if args.symmetric else (high - low) / levels).bfloat16()
        found = {"weight_scale": scale.float()}
        if not args.symmetric:
            zero = (-(2 ** (args.num_bits - 1)) - low / scale.float()).round()
            found["weight_zero_point"] = zero.clamp(-(levels // 2) - 1, levels // 2).to(torch.int8)
        return {k: v.reshape(-1) for k, v in found.items()} if size == weight.numel() else found

    @property
    def config(self) -> dict[str, Any]:
        return of_groups({"group_0": {"targets": ["Linear"], "weights": self.weights}}, self.format)


def of_groups(groups: dict[str, Any], stored: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "sparsity_config": {"format": "dense"},
        **more,
    }


def _of_fp4(state: dict[str, Any]) -> Tensor:
    """In fp32; the library's own `decompress` rounds to bf16."""
    packed, scale = state["weight_packed"], state["weight_scale"]
    level = unpack_fp4_from_uint8(packed, len(packed), packed.shape[1] * 2, dtype=torch.float32)
    of_groups = torch.exp2(scale.float() - 127)
    if "weight_global_scale" in state:
        of_groups = scale.float() / state["weight_global_scale"]
    return level * of_groups.repeat_interleave(level.shape[1] // scale.shape[1], 1)


def words(values: Tensor, bits: int) -> Tensor:
    """Words of 32 bits along the last axis, the first number lowest."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % per_word))
    found = torch.zeros(values.shape[0], values.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        found |= values[:, i::per_word] << (bits * i)
    return torch.where(found >= 2**31, found - 2**32, found).int()


def with_g_idx(weight: Tensor, group: int) -> Packed:
    """pack-quantized with actorder "group": groups of inputs that are not neighbours."""
    num_rows, depth = weight.shape
    group_D = (torch.arange(depth) // group)[torch.randperm(depth)]
    value, scale = torch.empty(num_rows, depth), torch.empty(num_rows, depth // group)
    for g in range(depth // group):
        own = weight[:, group_D == g].float()
        scale[:, g] = (own.abs().amax(1) / 7.5).bfloat16().float()
        value[:, group_D == g] = (own / scale[:, g, None]).round().clamp(-8, 7)
    return {
        "weight_packed": words(value + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([num_rows, depth]),
        "weight_g_idx": group_D.int(),
    }, value * scale[:, group_D]


def nvfp4_of_modelopt(weight: Tensor) -> Packed:
    """Scales of 16 columns are multiplied by that of the matrix."""
    level = torch.tensor([*E2M1, *(-one for one in E2M1)])
    groups = weight.float().unflatten(1, (-1, 16))
    whole = groups.abs().max() / (448 * 6)
    scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    of_groups = (scale.float() * whole)[:, :, None]
    code = ((groups / of_groups)[..., None] - level).abs().argmin(-1)
    flat = code.flatten(1)
    found = {
        "weight": (flat[:, ::2] | (flat[:, 1::2] << 4)).to(torch.uint8), "weight_scale": scale,
        "weight_scale_2": whole, "input_scale": torch.ones(()),
    }  # fmt: skip
    return found, (level[code] * of_groups).flatten(1)


def mxfp4(weight: Tensor, *, interleaved: bool) -> Packed:
    """The blocks and scales of an expert of gpt-oss; the rows of gate and up take turns."""
    num_rows, depth = weight.shape
    stored = weight.float()
    if interleaved:
        stored = torch.stack(stored.chunk(2), 1).flatten(0, 1)
    level = torch.tensor([*E2M1, *(-one for one in E2M1)])
    blocks = torch.zeros(num_rows, depth // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(num_rows, depth // 32, dtype=torch.uint8)
    real = torch.empty(num_rows, depth)
    for b in range(depth // 32):
        part = stored[:, b * 32 : b * 32 + 32]
        exponent = torch.ceil(torch.log2(part.abs().amax(1) / 6))
        scales[:, b] = (exponent + 127).to(torch.uint8)
        scaled = part / torch.exp2(exponent)[:, None]
        code = (scaled[:, :, None] - level).abs().argmin(-1)
        real[:, b * 32 : b * 32 + 32] = level[code] * torch.exp2(exponent)[:, None]
        blocks[:, b] = (code[:, ::2] | (code[:, 1::2] << 4)).to(torch.uint8)
    if interleaved:
        real = torch.cat((real[::2], real[1::2]))
    return {"blocks": blocks, "scales": scales}, real


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
# sign, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]


def bnb4(weight: Tensor, kind: str, *, nested: bool) -> Packed:
    """nf4 or fp4 of bitsandbytes, in blocks of 64 of all numbers."""
    levels = torch.tensor(NF4 if kind == "nf4" else [*FP4, *(-one for one in FP4)])
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    found = {"weight.quant_map": levels}
    if nested:
        offset, known = absmax.mean(), torch.linspace(-1, 1, 256)
        of_blocks = (absmax - offset).split(256)
        maxima = torch.stack([one.abs().max() for one in of_blocks])
        codes = [(one[:, None] / m - known).abs().argmin(1) for one, m in zip(of_blocks, maxima)]
        absmax = torch.cat([known[c] * m for c, m in zip(codes, maxima)]) + offset
        found |= {"weight.absmax": torch.cat(codes).to(torch.uint8)}
        found |= {"weight.nested_absmax": maxima, "weight.nested_quant_map": known}
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
    else:
        found["weight.absmax"] = absmax
    code = ((blocks / absmax[:, None])[:, :, None] - levels).abs().argmin(-1)
    flat = code.flatten()
    found["weight"] = ((flat[::2] << 4) | flat[1::2]).to(torch.uint8).unsqueeze(1)
    text = json.dumps(state).encode()
    found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found, (levels[code] * absmax[:, None]).reshape(weight.shape)


def bnb8(weight: Tensor) -> Packed:
    largest = weight.float().abs().amax(1)
    value = (weight.float() * 127 / largest[:, None]).round()
    found = {"weight": value.to(torch.int8), "SCB": largest}
    found["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return found, value * largest[:, None] / 127
