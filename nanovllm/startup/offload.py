"""Chooses which experts are resident on the device if not all are (`expert_offload`)."""

from __future__ import annotations

import logging
from dataclasses import replace

from nanovllm.config import EngineConfig, num_bytes
from nanovllm.models.experts.offloaded import OffloadPlan
from nanovllm.models.lora.slots import slots_bytes
from nanovllm.models.model import Model
from nanovllm.platforms.base import Platform

logger = logging.getLogger(__name__)

# Buffers for streamed layers get at most this share of the memory that weights leave.
BUFFERS_SHARE, MAX_BUFFERS = 0.5, 2
MIB = 1 << 20


def choose_offload(config: EngineConfig, model: Model, platform: Platform) -> OffloadPlan | None:
    """The plan for the option `expert_offload`; None without it.

    Raises ValueError if the device, the model or the sizes do not go with it.
    """
    asked = config.expert_offload
    if asked is None:
        return None
    if not platform.traits.supports_offload:
        raise ValueError(
            f"expert_offload is {asked!r}, which is not supported on this {platform.traits.name} "
            "device: it needs a CPU or an NVIDIA GPU"
        )
    if model.config.moe is None or not _num_layers(model):
        raise ValueError(
            f"expert_offload is {asked!r}, but {model.config.architecture} has no experts"
            f"{'' if model.config.moe is None else ' in any layer'}"
        )
    if model.config.moe.compression is not None:
        raise ValueError(
            f"expert_offload is {asked!r}, but the experts beside the checkpoint are compressed, "
            "and those are not offloaded: leave it out, or set NANOVLLM_DISABLE_SVD=1"
        )
    if any("gate_up_bias_EG" in params for params in model.declared):
        raise ValueError(
            f"expert_offload is {asked!r}, but the experts of {model.config.architecture} have "
            "biases, and those are not offloaded: leave it out"
        )
    if model.config.moe.activation != "silu":
        raise ValueError(
            f"expert_offload is {asked!r}, but the experts of {model.config.architecture} have the "
            f"activation {model.config.moe.activation!r}, and those are not offloaded: leave it out"
        )
    if not all(stored_as.is_plain for stored_as in model.expert_formats):
        raise ValueError(
            f"expert_offload is {asked!r}, but the model's experts are quantized "
            f"({model.scheme}), and those are not offloaded: leave it out"
        )
    plan = _in_experts(asked, model) if isinstance(asked, int) else _in_bytes(asked, model)
    allowed_bytes = config.gpu_memory_utilization * platform.total_bytes()
    rest_bytes = allowed_bytes - device_bytes(model, plan)
    buffer_bytes = plan.num_entries(model.config.moe.num_experts) * _expert_bytes(model)
    fitting = int(BUFFERS_SHARE * rest_bytes // max(1, buffer_bytes))
    num_buffers = max(0, min(MAX_BUFFERS, fitting))
    return replace(plan, num_buffers=num_buffers, predicts=config.tuned.expert_prefetch)


def device_bytes(model: Model, plan: OffloadPlan | None) -> int:
    """Bytes that weights and slots for adapters take on the device, with all experts or those of a
    plan."""
    total = model.param_bytes + slots_bytes(model)
    if plan is None or model.config.moe is None:
        return total
    num_experts = model.config.moe.num_experts
    num_here = plan.num_resident + plan.num_buffers * plan.num_entries(num_experts)
    return total + (num_here - plan.num_layers * num_experts) * _expert_bytes(model)


def _in_experts(num: int, model: Model) -> OffloadPlan:
    """The plan for `num` resident experts in each layer."""
    moe = model.config.moe
    assert moe is not None
    if not moe.top_k <= num <= moe.num_experts:
        raise ValueError(
            f"expert_offload is {num}: it must be at least {moe.top_k}, the active experts of a "
            f"token, and at most {moe.num_experts}, the experts of a layer. Bytes have a unit, as "
            "in '8GiB'"
        )
    return OffloadPlan(num, _num_layers(model))


def _in_bytes(budget: str, model: Model) -> OffloadPlan:
    """The plan for as many resident experts as the budget holds, in all layers together."""
    moe, num_layers, expert_bytes = model.config.moe, _num_layers(model), _expert_bytes(model)
    assert moe is not None
    num = num_bytes(budget) // expert_bytes
    if num < moe.top_k:
        least_mib = moe.top_k * expert_bytes / MIB
        raise ValueError(
            f"expert_offload is {budget!r}, which holds {num} expert(s) of "
            f"{expert_bytes / MIB:.4g} MiB: it must hold the {moe.top_k} active experts of a "
            f"layer, {least_mib:.4g} MiB"
        )
    if num >= num_layers * moe.num_experts:
        raise ValueError(
            f"expert_offload is {budget!r}, which holds all {num_layers * moe.num_experts} experts "
            f"({num_layers * moe.num_experts * expert_bytes / MIB:.4g} MiB): leave it out"
        )
    if num >= num_layers * moe.top_k:
        return OffloadPlan(num // num_layers, num_layers)
    logger.warning(
        "expert_offload is %r, which holds %d experts: fewer than the %d active ones of %d layers. "
        "The layers share them, so few experts stay resident until the next token",
        budget, num, num_layers * moe.top_k, num_layers,
    )  # fmt: skip
    return OffloadPlan(num, num_layers, is_shared=True)


def _num_layers(model: Model) -> int:
    return sum(kind.sparse for kind in model.layer_kinds)


def _expert_bytes(model: Model) -> int:
    """Bytes of a rank's part of one expert: gate, up and down."""
    cfg = model.config
    assert cfg.moe is not None
    return 3 * cfg.hidden_size * cfg.moe.expert_size * cfg.dtype.itemsize // cfg.num_ranks
