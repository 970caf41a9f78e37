"""The formats that `nanovllm quantize` writes: what becomes of a matrix, and what a config says.

O outputs | D depth | G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.models.formats.format import Extent
from nanovllm.models.formats.fp8 import Fp8
from nanovllm.models.formats.grouped import WORD_BITS
from nanovllm.models.formats.rounded import GROUP, rounded

FP8_BLOCK = (128, 128)
Shape = tuple[int, int]


class Kind(NamedTuple):
    """`matrix` gives the tensors of a matrix, by the ends of their names, from its name and its
    numbers; `config` the `quantization_config`, from the modules that stay as they are; `refusal`
    says why a matrix of a shape cannot be stored, if it cannot."""

    matrix: Callable[[str, Tensor], dict[str, Tensor]]
    config: Callable[[Sequence[str]], dict[str, Any]]
    refusal: Callable[[Shape], str | None]


def words(code_OD: Tensor, bits: int) -> Tensor:
    """Words of 32 bits along the last axis, the first code in the lowest bits."""
    per_word = WORD_BITS // bits
    padded = torch.nn.functional.pad(code_OD.to(torch.int32), (0, -code_OD.shape[1] % per_word))
    shift = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    # codes do not overlap, so a sum is an or
    return (padded.unflatten(1, (-1, per_word)) << shift).sum(-1, dtype=torch.int32)


def _words(name: str, weight_OD: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    depth = weight_OD.shape[1]
    # scales that two bytes hold, as the engine has them
    dtype = torch.float16 if weight_OD.dtype is torch.float32 else weight_OD.dtype
    code_OD, scale_OG = rounded(name, weight_OD, bits, group or depth, dtype)
    return {
        "weight_packed": words(code_OD, bits),
        "weight_scale": scale_OG.to(weight_OD.dtype),
        "weight_shape": torch.tensor(weight_OD.shape),
    }


def _int8(name: str, weight_OD: Tensor) -> dict[str, Tensor]:
    code_OD, scale_O1 = rounded(name, weight_OD, 8, weight_OD.shape[1], weight_OD.dtype)
    return {"weight": (code_OD.int() - 128).to(torch.int8), "weight_scale": scale_O1}


def _fp8(name: str, weight_OD: Tensor) -> dict[str, Tensor]:
    extent = Extent(tuple(weight_OD.shape), torch.float32)
    found = Fp8(FP8_BLOCK, "weight_scale_inv").quantized(name, weight_OD, extent)
    return {"weight": found.values_OD, "weight_scale_inv": found.scale_RG}


def _fp8_config(plain: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(FP8_BLOCK),
        "modules_to_not_convert": list(plain),
    }


def _compressed(stored: str, bits: int, strategy: str, plain: Sequence[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False,
        "group_size": GROUP if strategy == "group" else None,
    }  # fmt: skip
    inputs: dict[str, Any] | None = None
    if stored == "int-quantized":
        inputs = {**weights, "strategy": "token", "dynamic": True, "group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }


def _any(shape: Shape) -> str | None:
    return None


def _in_groups(shape: Shape) -> str | None:
    return None if shape[1] % GROUP == 0 else f"its {shape[1]} inputs are no multiple of {GROUP}"


PACKED, INT8 = "pack-quantized", "int-quantized"
KINDS: Mapping[str, Kind] = {
    "fp8": Kind(_fp8, _fp8_config, _any),
    "w4a16": Kind(lambda name, weight: _words(name, weight, 4, GROUP),
                  lambda plain: _compressed(PACKED, 4, "group", plain), _in_groups),
    "w8a16": Kind(lambda name, weight: _words(name, weight, 8, 0),
                  lambda plain: _compressed(PACKED, 8, "channel", plain), _any),
    "int8": Kind(_int8, lambda plain: _compressed(INT8, 8, "channel", plain), _any),
}  # fmt: skip
