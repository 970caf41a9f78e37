"""The choices of an engine for a model: dtypes, attention, sizes of the cache and of steps."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from nanovllm.compile import buckets
from nanovllm.config import EngineConfig
from nanovllm.models.layer_state import PagedKV, pages_of, recurrent_bytes
from nanovllm.models.model import Model
from nanovllm.models.vision.budgets import budgets
from nanovllm.platforms import attention
from nanovllm.platforms.base import Platform
from nanovllm.runner.audio_tower import BUDGETS as AUDIO_BUDGETS
from nanovllm.runner.spec import EngineSpec, Layout
from nanovllm.startup.offload import choose_offload

logger = logging.getLogger(__name__)


def make_spec(config: EngineConfig, model: Model, platform: Platform) -> EngineSpec:
    """The engine's choices for a model. Raises ValueError for options that do not go together."""
    cfg = model.config
    model.page_groups.check()
    if model.has_latents and not platform.traits.supports_latents:
        raise ValueError(
            f"{cfg.architecture} keeps latents, and attention over them is not supported on this "
            f"{platform.traits.name} device"
        )
    if config.enable_lora and not platform.traits.supports_adapters:
        raise ValueError(
            f"enable_lora=True is not supported on the device {platform.traits.name}: serve a "
            "checkpoint into which the adapter was merged"
        )
    windows = [kind.window for kind in model.layer_kinds]
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, model, platform)
    has_sinks = any(kind.has_sinks for kind in model.layer_kinds)
    if has_sinks and not (config.enforce_eager or platform.traits.graphs_have_sinks):
        raise ValueError(
            f"the attention of {cfg.architecture} has sinks, which graphs on the device "
            f"{platform.traits.name} do not support: set enforce_eager=True"
        )
    if platform.traits.whole_steps:
        _refuse_in_whole_steps(model, platform.traits.name, is_eager=config.enforce_eager)
    head_dim = largest_head(model)
    facts = attention.AttentionNeeds(
        cfg.dtype,
        head_dim,
        config.kvcache_block_size,
        windows,
        cache_dtype,
        model.has_latents,
        has_sinks,
    )
    backend = attention.choose(config.attention_backend, platform, facts)
    if config.deterministic:  # `order_sums` replaces our own kernels
        backend = attention.Attention()
    if backend != attention.Attention() and cache_dtype is not cfg.dtype:
        raise ValueError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r}, which attention_backend "
            f"{config.attention_backend!r} cannot read: use attention_backend='auto'"
        )
    block_size = config.kvcache_block_size or attention.default_block_size(
        backend, platform, head_dim, cache_dtype
    )
    layout = make_layout(config, cfg.max_position, platform, block_size)
    layout = replace(
        layout,
        vision_patches=vision_patches(config, model),
        audio_chunks=() if model.audio_tower is None else AUDIO_BUDGETS,
    )
    offload = choose_offload(config, model, platform)
    embedding_bytes = config.media.embedding_cache_bytes if model.takes_embeddings else 0
    slots = _snapshot_slots(config, model, layout)
    spec = EngineSpec(layout, backend, cache_dtype, offload, embedding_bytes)
    persistent = config.tuned.persistent_step if config.not_persistent is None else False
    return replace(spec, snapshot_slots=slots, persistent=persistent)


def _refuse_in_whole_steps(model: Model, device: str, *, is_eager: bool) -> None:
    """Raise ValueError for what no platform supports whose steps are one graph."""
    groups, name = model.page_groups.groups, model.config.architecture
    if model.config.sees_ahead:
        raise ValueError(
            f"{name} has tokens of images that see later ones, which is not supported on the "
            f"device {device}"
        )
    in_graphs = {
        "attention windows": any(kind.window for kind in model.layer_kinds),
        "layers that keep pages of different sizes": any(one.per_tensor > 1 for one in groups),
        "layers that read the caches of others": any(one.readers for one in groups),
        "layers with inputs of their own": model.layer_inputs is not None,
        "slots for adapters of table and head": model.lora is not None and model.lora.embeddings,
    }
    for what, is_so in in_graphs.items():
        if is_so and not is_eager:
            raise ValueError(
                f"{name} has {what}, which graphs on the device {device} do not support: set "
                "enforce_eager=True"
            )


def largest_head(model: Model) -> int:
    """The largest head size of a model's layers, which may differ."""
    pages = map(pages_of, model.kept)
    sizes = (one.key_size for one in pages if isinstance(one, PagedKV))
    return max(sizes, default=model.config.head_dim)


def _snapshot_slots(config: EngineConfig, model: Model, layout: Layout) -> int:
    """How many snapshots of rows' states fit in the bytes for them."""
    state_bytes = recurrent_bytes(model.kept, model.config.dtype)
    if not state_bytes or not config.enable_prefix_caching:
        return 0
    return min(config.tuned.snapshot_bytes // state_bytes, 4 * layout.max_num_seqs)


def vision_patches(config: EngineConfig, model: Model) -> tuple[int, ...]:
    """The budgets of the model's tower, none without one. Raises ValueError for an option that does
    not go with the model."""
    asked = config.tuned.vision_patch_budgets
    if model.tower is not None:
        return budgets(model.tower.config, asked)
    if asked is not None:
        raise ValueError(
            f"vision_patch_budgets is {list(asked)}, but {model.config.architecture} has no vision "
            "tower: leave it out"
        )
    return ()


def choose_dtype(name: str, hf: Any, platform: Platform) -> torch.dtype:
    """ "auto" is the device's, else the checkpoint's; float16 for bfloat16 on a device without it.
    float32 if neither names one.

    Raises ValueError for a dtype that the device does not support.
    """
    traits = platform.traits
    if name == "auto":
        dtype = traits.auto_dtype or hf.dtype
        if dtype is None:
            logger.warning("the checkpoint names no dtype: it runs in float32 (option dtype)")
            dtype = torch.float32
        if dtype is torch.bfloat16 and dtype not in traits.supported_dtypes:
            # few models have activations beyond float16's range, and float32 takes twice the memory
            message = (
                "this device has no bfloat16: the checkpoint's weights are converted to float16"
            )
            logger.warning(message)
            dtype = torch.float16
    else:
        dtype = getattr(torch, name)
    if dtype not in traits.supported_dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in traits.supported_dtypes)
        hint = ""
        if dtype is torch.bfloat16 and torch.float16 in traits.supported_dtypes:
            hint = ", and dtype='float16' for a bfloat16 checkpoint"
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} is not supported on this {traits.name} device: "
            f"use one of {names}{hint}"
        )
    return dtype


def choose_cache_dtype(name: str, model: Model, platform: Platform) -> torch.dtype:
    """ "auto" is the model's dtype.

    Raises ValueError for a cache that the device or the model does not support.
    """
    if name == "auto":
        return model.config.dtype
    if not platform.traits.supports_fp8_cache:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which is not supported on this {platform.traits.name} "
            "device: it needs a CPU, or a GPU of compute capability 8.9 or higher"
        )
    if model.kv_scales is None:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, but {model.config.architecture} has no bound for its "
            "keys and values, from which the cache's scales are computed: use kv_cache_dtype='auto'"
        )
    return torch.float8_e4m3fn


def make_layout(
    config: EngineConfig, max_position: int, platform: Platform, block_size: int
) -> Layout:
    traits, max_model_len = platform.traits, config.max_model_len or max_position
    max_num_seqs = config.max_num_seqs or traits.num_seqs
    max_tokens = config.max_num_batched_tokens or traits.batched_tokens
    max_tokens = max(16, min(max_tokens, -(-max_model_len // 16) * 16 * max_num_seqs))
    requested = config.graph_batch_sizes
    return Layout(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        decode_rows=buckets.decode_ladder(requested, max_num_seqs, traits.decode_rows),
        prefill_tokens=buckets.prefill_ladder(max_tokens, traits.prefill_growth),
        max_prefill_rows=min(max_num_seqs, buckets.PREFILL_ROWS),
        verify_tokens=tuple(1 + length for length in config.verified_lengths),
        pad=config.tuned.pad_batches,
    )
