"""From a checkpoint's `quantization_config` to a scheme, by its `quant_method`.

What an option of a config asks for and is not done here is refused with its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm.models import auto_round_config, compressed_config, modelopt_config
from nanovllm.models.formats.bitsandbytes import Bnb4, Bnb8
from nanovllm.models.formats.fp4 import MxFp4Experts
from nanovllm.models.formats.fp8 import Fp8
from nanovllm.models.formats.grouped import Awq, Gptq
from nanovllm.models.gguf.scheme import GgufTypes
from nanovllm.models.quant_config import Config, block, group, require
from nanovllm.models.schemes import REGEX, UNQUANTIZED, Modules, Packed, Scheme

SCALE, INVERSE = "weight_scale", "weight_scale_inv"
# Before the expressions of GPTQ's `dynamic`: these modules are not quantized, or are, by default.
NEGATIVE, POSITIVE = "-:", "+:"
OLD_AUTO_ROUND = "intel/auto-round"
# What GPTQ's numbers depend on when they are read.
STORED_BY = frozenset(
    {"bits", "group_size", "desc_act", "sym", "format", "checkpoint_format", "quant_method",
     "pack_dtype"}
)  # fmt: skip


def fp8(config: Config) -> Scheme:
    """`weight_scale_inv` for blocks, either name for whole tensors; both multiply."""
    require(config, "activation_scheme", "dynamic", "static")
    require(config, "fmt", "e4m3")
    size = config.get("weight_block_size")
    stored = Fp8((0, 0), SCALE, INVERSE) if size is None else Fp8(block(size), INVERSE)
    return Packed("fp8", stored, _plain(config, "modules_to_not_convert", "ignored_layers"))


def gptq(config: Config) -> Scheme:
    require(config, "bits", 4, 8)
    require(config, "modules_in_block_to_quantize", None)
    is_v2 = config.get("checkpoint_format") == "gptq_v2"
    require(config, "checkpoint_format", None, "gptq", "gptq_v2")
    has_order = bool(config.get("desc_act")) and config.get("group_size") != -1
    is_symmetric = config.get("sym") is True
    stored = Gptq(config["bits"], group(config), 0 if is_v2 else 1, has_order, is_symmetric)
    return Packed("gptq", stored, _dynamic(config), has_head=bool(config.get("lm_head")))


def awq(config: Config) -> Scheme:
    require(config, "bits", 4)
    require(config, "version", "gemm", "GEMM")
    require(config, "zero_point", True)
    return Packed("awq", Awq(4, group(config)), _plain(config, "modules_to_not_convert"))


def mxfp4(config: Config) -> Scheme:
    """Experts alone are packed, as in gpt-oss."""
    plain = _plain(config, "modules_to_not_convert")
    return Packed("mxfp4", MxFp4Experts(), plain, kinds=frozenset({"experts"}))


def bitsandbytes(config: Config) -> Scheme:
    """The head is plain; so are the modules that `llm_int8_skip_modules` names."""
    plain = _plain(config, "llm_int8_skip_modules")
    is_4, is_8 = bool(config.get("load_in_4bit")), bool(config.get("load_in_8bit"))
    if is_4 == is_8:
        raise ValueError(
            f"quantization_config has load_in_4bit {is_4} and load_in_8bit {is_8}: one must be True"
        )
    if is_8:
        return Packed("bitsandbytes", Bnb8(), plain)
    require(config, "bnb_4bit_quant_type", "nf4", "fp4")
    require(config, "bnb_4bit_quant_storage", None, "uint8")
    is_nested = bool(config.get("bnb_4bit_use_double_quant"))
    return Packed("bitsandbytes", Bnb4(config["bnb_4bit_quant_type"], is_nested), plain)


def gguf(config: Config) -> Scheme:
    """`types` has the type of each matrix in codes, by its name; the others are plain. The config
    of a GGUF file has it (`gguf.config`)."""
    types = config.get("types")
    if not isinstance(types, Mapping):
        raise ValueError(f"quantization_config has types {types!r:.80}: it must be an object")
    return GgufTypes(tuple(sorted((str(name), str(one)) for name, one in types.items())))


CHECKPOINTS: dict[str, Callable[[Config], Scheme]] = {
    "fp8": fp8,
    "compressed-tensors": compressed_config.scheme,
    "gptq": gptq,
    "awq": awq,
    "gguf": gguf,
    "mxfp4": mxfp4,
    "bitsandbytes": bitsandbytes,
    "auto-round": auto_round_config.scheme,
    OLD_AUTO_ROUND: auto_round_config.scheme,
    modelopt_config.METHOD: modelopt_config.scheme,
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


def _dynamic(config: Config) -> Modules:
    """The modules that stay plain by GPTQ's `dynamic`: expressions after "-:". The first entry that
    matches a module decides, so that another one protects it from those after it."""
    entries = config.get("dynamic") or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"quantization_config has dynamic {entries!r:.80}: it must be an object")
    plain: list[str] = []
    earlier = ""
    for key, values in entries.items():
        if key.startswith(NEGATIVE):
            plain.append(f"{REGEX}{earlier}(?:{key.removeprefix(NEGATIVE)})")
            continue
        _require_same(config, key, values)
        earlier += f"(?!{key.removeprefix(POSITIVE)})"
    return Modules(plain)


def _require_same(config: Config, key: str, values: Any) -> None:
    """Refuse an entry of `dynamic` that changes how modules are stored."""
    if values and not isinstance(values, Mapping):
        raise ValueError(f"quantization_config has dynamic {key!r} {values!r:.80}: not an object")
    for name, value in (values or {}).items():
        if name in STORED_BY and value != config.get(name):
            raise ValueError(
                f"quantization_config has dynamic {key!r} with {name} {value!r}, which is not "
                f"supported: only {config.get(name)!r}, as for the other modules"
            )


def _plain(config: Config, *names: str) -> Modules:
    """The modules that one of these fields names."""
    return Modules(next((config[name] for name in names if config.get(name)), ()))
