"""The model of a checkpoint as options and the device want it: formats, states, ranks, adapters."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.models import registry
from nanovllm.models.gguf.scheme import GgufTypes
from nanovllm.models.lora.regions import with_lora
from nanovllm.models.lora.slots import refusal_of_experts
from nanovllm.models.model import LoraSlots, Model
from nanovllm.models.schemes import OPTIONS, UNQUANTIZED, Dequantizing
from nanovllm.platforms.base import Platform, Traits
from nanovllm.startup.expert_parallel import with_experts_on_ranks

logger = logging.getLogger(__name__)


def check_quantization(option: str, traits: Traits) -> None:
    """Raises ValueError if a device has no products for the option `quantization`."""
    if option not in traits.quantizations:
        raise ValueError(
            f"quantization {option!r} is not supported on a {traits.name} device "
            f"(supported: {', '.join(map(repr, traits.quantizations)) or 'none'}): leave it out or "
            "use device='cpu'"
        )


def for_device(model: Model, folder: Path, platform: Platform) -> Model:
    """The model of a quantized checkpoint: a device without products for it has plain weights."""
    if platform.traits.takes_quantized:
        logger.warning(
            "%s: weights stay quantized (%s), see docs/quantization.md", folder, model.scheme
        )
        if isinstance(model.scheme, GgufTypes) and not platform.traits.takes_blocks:
            return model.with_scheme(replace(model.scheme, keeps_blocks=False))
        return model
    dtype = str(model.config.dtype).removeprefix("torch.")
    logger.warning(
        "%s: weights are dequantized to %s (%s): a %s device has no products of quantized weights",
        folder, dtype, model.scheme, platform.traits.name,
    )  # fmt: skip
    return model.with_scheme(Dequantizing(model.scheme))


def make_model(config: EngineConfig, hf: Any, dtype: torch.dtype) -> Model:
    """The model of a checkpoint's config, with the formats of the checkpoint or of the option
    `quantization`. Raises ValueError if they do not fit the model, or if both choose formats."""
    architecture = registry.architecture(hf.architectures, pools=config.pools)
    model = architecture(hf, dtype=dtype, max_model_len=config.max_model_len)
    if config.quantization is None:
        return model
    if model.scheme != UNQUANTIZED:
        raise ValueError(
            f"quantization is {config.quantization!r}, but the checkpoint is quantized already "
            f"({model.scheme}): leave it out"
        )
    scheme = OPTIONS[config.quantization]
    if model.config.moe is not None and "experts" not in scheme.linear.kinds:
        raise ValueError(
            f"quantization {config.quantization!r} is not supported for a model with experts "
            f"({model.config.architecture})"
        )
    return model.with_scheme(scheme)


def with_state_dtype(name: str, model: Model) -> Model:
    """The model with its recurrent states in this dtype. Raises ValueError if it has none."""
    if not model.is_recurrent:
        raise ValueError(
            f"state_dtype is {name!r}, but {model.config.architecture} has no recurrent states: "
            "leave it out"
        )
    return model.with_state_dtype(getattr(torch, name))


def on_ranks(config: EngineConfig, model: Model) -> Model:
    """The model as each rank has it. Raises ValueError for options that need one rank, or if the
    model cannot be divided."""
    size, moe = config.tensor_parallel_size, model.config.moe
    asked = f"tensor_parallel_size is {size}"
    whole_offloaded = config.expert_offload is not None and config.expert_parallel is True
    alone = {
        "expert_offload and expert_parallel=True, since each rank fetches its part of every "
        "expert": whole_offloaded,
        f"device={config.device!r}": ":" in config.device,
        "compressed experts": moe is not None and moe.compression is not None,
    }
    if unsupported := next((what for what, is_used in alone.items() if is_used), None):
        raise ValueError(f"{asked}, which does not go with {unsupported}")
    parallel = False if config.expert_offload is not None else config.expert_parallel
    return with_experts_on_ranks(parallel, model, size).on_ranks(size)


def with_adapters(config: EngineConfig, model: Model) -> Model:
    """The model with slots for adapters, if the options ask for them."""
    if not config.enable_lora:
        return model
    refusal = refusal_of_experts(model) if config.lora_experts else None
    if refusal is not None or (config.lora_experts and config.expert_offload is not None):
        why = refusal or "its experts are offloaded"
        raise ValueError(f"lora_experts=True is not supported for {config.model!r}: {why}")
    slots = LoraSlots(
        config.max_loras,
        config.max_lora_rank,
        experts=config.lora_experts,
        biases=config.lora_biases,
        embeddings=config.lora_embeddings,
    )
    return with_lora(model, slots)
