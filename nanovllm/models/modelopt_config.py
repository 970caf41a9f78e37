"""From the `quantization_config` of NVIDIA's ModelOpt to a scheme.

Older exports have it in `MODELOPT_FILE` alone, with other names of fields (`of_file`).
Names of modules that stay plain may be globs. Scales of inputs are not read.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping
from typing import Any

from nanovllm.models.formats.format import Format
from nanovllm.models.formats.fp4 import NV_GROUP, NvFp4OfModelOpt
from nanovllm.models.formats.fp8 import Fp8
from nanovllm.models.quant_config import Config, require
from nanovllm.models.schemes import REGEX, UNQUANTIZED, Modules, Packed, Scheme

logger = logging.getLogger(__name__)
METHOD = "modelopt"
# "W4A16" only says that inputs are not quantized.
FORMATS: dict[str, Format] = {
    "FP8": Fp8((0, 0), "weight_scale"),
    "NVFP4": NvFp4OfModelOpt(),
    "W4A16_NVFP4": NvFp4OfModelOpt(),
}


def of_file(content: Config) -> dict[str, Any]:
    """The `quantization_config` that a `MODELOPT_FILE` stands for."""
    return {**content, "quant_method": METHOD}


def scheme(config: Config) -> Scheme:
    """The head is packed unless it is among the plain modules."""
    found = config.get("quantization", config)
    if not isinstance(found, Mapping):
        raise ValueError(f"quantization_config has quantization {found!r:.80}: not an object")
    if found.get("kv_cache_scheme") or found.get("kv_cache_quant_algo"):
        logger.info("the checkpoint was made for an 8-bit cache: kv_cache_dtype='fp8' gives one")
    if "quant_algo" in found and found["quant_algo"] is None:  # it was made for a cache alone
        return UNQUANTIZED
    require(found, "quant_algo", *FORMATS)
    stored = FORMATS[found["quant_algo"]]
    if isinstance(stored, NvFp4OfModelOpt):
        require({"group_size": found.get("group_size", NV_GROUP)}, "group_size", NV_GROUP)
    return Packed(METHOD, stored, _plain(found), has_head=True)


def _plain(found: Config) -> Modules:
    names = found.get("ignore") or found.get("exclude_modules") or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise ValueError(f"quantization_config has plain modules {names!r:.80}: they must be names")
    globs = (REGEX + fnmatch.translate(one) if "*" in one or "?" in one else one for one in names)
    return Modules(globs)
