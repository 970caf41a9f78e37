"""From an AutoRound `quantization_config` to a scheme: its tensors are those of GPTQ or AWQ.

`packing_format`, or `backend` in older files, says which. `extra_config` has what single modules
have instead, by their names or by regular expressions that are found in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.models.checkpoint import HEAD, plain_name
from nanovllm.models.formats.grouped import Awq, Gptq, Grouped
from nanovllm.models.quant_config import Config, group, require
from nanovllm.models.schemes import REGEX, Modules, Packed

GPTQ = "auto_round:auto_gptq"
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")
# Zeros are smaller by 1, as GPTQ's first version has them, or as they are.
LESS = (GPTQ, "auto_round:gptq", "auto_round:gptq:exllamav2", "auto_round:gptqmodel")
EXACT = ("auto_round", "auto_round:exllamav2", "auto_round:triton", "auto_round:tritonv2")
DEFAULTS = ("auto", "gptq")  # backends that say nothing about it
STORED_BY = ("bits", "group_size", "sym", "data_type")
LEAST_PLAIN_BITS = 16
SPECIAL = frozenset("*+?^$()[]{}|\\")  # in a regular expression, not in a name


def scheme(config: Config) -> Packed:
    """The head is plain unless `extra_config` has it with few bits."""
    require(config, "data_type", None, "int")
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(
            f"quantization_config has extra_config {extra!r:.80}: it must be an object"
        )
    plain = [key for key, values in extra.items() if _is_plain(config, key, values)]
    has_head = any(plain_name(key) == HEAD for key in extra if key not in plain)
    patterns = Modules(f"{REGEX}.*(?:{one})" if SPECIAL & {*one} else one for one in plain)
    return Packed("auto-round", _format(config), patterns, has_head=has_head)


def _format(config: Config) -> Grouped:
    packing = config.get("packing_format") or config.get("backend")
    packing = GPTQ if packing is None or packing in DEFAULTS else packing
    require({"packing_format": packing}, "packing_format", *LESS, *EXACT, *AWQ_PACKINGS)
    if packing in AWQ_PACKINGS:
        require(config, "bits", 4)
        return Awq(4, group(config))
    require(config, "bits", 4, 8)
    is_symmetric = config.get("sym") is True
    return Gptq(config["bits"], group(config), int(packing in LESS), symmetric=is_symmetric)


def _is_plain(config: Config, key: str, values: Any) -> bool:
    """Whether an entry keeps modules plain. Refuses one that stores them in another way."""
    if not isinstance(values, Mapping):
        raise ValueError(f"quantization_config has extra_config {key!r} {values!r:.80}: no object")
    bits = values.get("bits")
    if isinstance(bits, int) and bits >= LEAST_PLAIN_BITS:
        return True
    for name in STORED_BY:
        wanted = config.get(name, "int" if name == "data_type" else None)
        if name in values and values[name] != wanted:
            raise ValueError(
                f"quantization_config has extra_config {key!r} with {name} {values[name]!r}, which "
                f"is not supported: only {wanted!r}, as for the other modules, or "
                f"{LEAST_PLAIN_BITS} bits"
            )
    return False
