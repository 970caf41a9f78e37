"""From a checkpoint's `quantization_config` to a scheme, by its `quant_method`.

What an option of a config asks for and is not done here is refused with its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm.models.formats.fp8 import Fp8
from nanovllm.models.formats.grouped import Awq, Gptq
from nanovllm.models.gguf.scheme import GgufTypes
from nanovllm.models.schemes import UNQUANTIZED, Modules, Packed, Scheme

Config = Mapping[str, Any]
SCALE, INVERSE = "weight_scale", "weight_scale_inv"


def fp8(config: Config) -> Scheme:
    """`weight_scale_inv` for blocks, `weight_scale` for whole tensors; both multiply."""
    _require(config, "activation_scheme", "dynamic", "static")
    _require(config, "fmt", "e4m3")
    plain = Modules(config.get("modules_to_not_convert") or config.get("ignored_layers") or ())
    size = config.get("weight_block_size")
    stored = Fp8((0, 0), SCALE) if size is None else Fp8(_block(size), INVERSE)
    return Packed("fp8", stored, plain)


def compressed_tensors(config: Config) -> Scheme:
    """fp8 weights of the library compressed-tensors: one group of linear layers."""
    _require(config, "format", "float-quantized", "naive-quantized")
    _require(config, "quantization_status", "compressed")
    _require(config, "kv_cache_scheme", None)
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise ValueError(
            f"quantization_config has the groups {groups}: only one with the targets ['Linear'] is "
            "supported"
        )
    weights = groups[0].get("weights") or {}
    _require(weights, "type", "float")
    _require(weights, "num_bits", 8)
    _require(weights, "symmetric", True)
    _require(weights, "strategy", "tensor", "channel", "block")
    blocks = {"tensor": (0, 0), "channel": (1, 0)}
    found = blocks.get(weights["strategy"]) or _block(weights.get("block_structure"))
    ignored = Modules(config.get("ignore") or ())
    return Packed("compressed-tensors", Fp8(found, SCALE), ignored, has_head=True)


def gptq(config: Config) -> Scheme:
    _require(config, "bits", 4, 8)
    _require(config, "dynamic", None, {})
    _require(config, "modules_in_block_to_quantize", None)
    is_v2 = config.get("checkpoint_format") == "gptq_v2"
    _require(config, "checkpoint_format", None, "gptq", "gptq_v2")
    has_order = bool(config.get("desc_act")) and config.get("group_size") != -1
    stored = Gptq(
        config["bits"], _group(config), 0 if is_v2 else 1, has_order, config.get("sym") is True
    )
    return Packed("gptq", stored, has_head=bool(config.get("lm_head")))


def awq(config: Config) -> Scheme:
    _require(config, "bits", 4)
    _require(config, "version", "gemm", "GEMM")
    _require(config, "zero_point", True)
    plain = Modules(config.get("modules_to_not_convert") or ())
    return Packed("awq", Awq(4, _group(config)), plain)


def gguf(config: Config) -> Scheme:
    """`types` has the type of each matrix in codes, by its name; the others are plain. The config
    of a GGUF file has it (`gguf.config`)."""
    types = config.get("types")
    if not isinstance(types, Mapping):
        raise ValueError(f"quantization_config has types {types!r:.80}: it must be an object")
    return GgufTypes(tuple(sorted((str(name), str(one)) for name, one in types.items())))


CHECKPOINTS: dict[str, Callable[[Config], Scheme]] = {
    "fp8": fp8,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "gguf": gguf,
}


def of_checkpoint(hf: Any) -> Scheme:
    """The scheme of a checkpoint, from transformers' config of it.

    Raises ValueError for an unknown `quant_method`, and for values that its scheme refuses.
    """
    found = getattr(hf, "quantization_config", None)
    if not found:
        return UNQUANTIZED
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if not isinstance(method, str) or method not in CHECKPOINTS:
        raise ValueError(
            f"quantization_config has quant_method {method!r}, which is not supported (only "
            f"{', '.join(map(repr, CHECKPOINTS))}): use another checkpoint of this model"
        )
    return CHECKPOINTS[method](found)


def _require(config: Config, name: str, *allowed: object) -> None:
    """Refuse a value that is there and is not allowed. `allowed` with None: it may be missing."""
    found = config.get(name)
    is_optional = name in ("fmt", "activation_scheme", "quantization_status", "symmetric")
    if found not in allowed and not (found is None and is_optional):
        raise ValueError(
            f"quantization_config has {name} {found!r}, which is not supported: only "
            f"{', '.join(map(repr, allowed))}"
        )


def _block(size: Any) -> tuple[int, int]:
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(isinstance(one, int) and one > 0 for one in size):
        raise ValueError(
            f"quantization_config has blocks of {size!r}: it must be two numbers above 0"
        )
    return size[0], size[1]


def _group(config: Config) -> int:
    found = config.get("group_size")
    if not isinstance(found, int) or not (found > 0 or found == -1):
        raise ValueError(
            f"quantization_config has group_size {found!r}: it must be a number above 0, or -1"
        )
    return found
