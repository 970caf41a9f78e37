"""Makes the choices before weights are loaded: model, dtypes, attention, sizes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm import env, hub, platforms
from nanovllm.compile import buckets
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Store
from nanovllm.config import EngineConfig
from nanovllm.models import registry, svd_experts
from nanovllm.models.gguf.header import is_gguf
from nanovllm.models.gguf.scheme import GgufTypes
from nanovllm.models.layer_state import PagedKV, pages_of, recurrent_bytes
from nanovllm.models.loader import has_own_head
from nanovllm.models.lora.regions import with_lora
from nanovllm.models.lora.slots import refusal_of_experts
from nanovllm.models.model import LoraSlots, Model
from nanovllm.models.schemes import OPTIONS, UNQUANTIZED, Dequantizing
from nanovllm.models.shards import ALL, Shard
from nanovllm.models.vision.budgets import budgets
from nanovllm.platforms import attention
from nanovllm.platforms.base import Platform, Traits
from nanovllm.runner.audio_tower import BUDGETS as AUDIO_BUDGETS
from nanovllm.runner.spec import EngineSpec, Layout
from nanovllm.startup.checkpoint_cache import read_config
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.determinism import check_model, engine_passes
from nanovllm.startup.expert_parallel import with_experts_on_ranks
from nanovllm.startup.generation_config import generation_config
from nanovllm.startup.offload import choose_offload
from nanovllm.startup.startup_timer import StartupTimer
from nanovllm.startup.store_folder import open_store

if TYPE_CHECKING:
    from nanovllm.startup.pooling_modules import PoolingPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedConfig:
    """The choices for the later steps of a start.

    `folder` is the checkpoint's, `hf` transformers' config of it or the store's copy of that.
    `eos_ids` end an answer. `num_workers` processes compile while this one reads weights. `shard`
    is this process's part of the weights. `draft_folder` is the checkpoint of a second model.
    `pooling` is how the model pools (`startup.pooling.with_pooling`).
    """

    config: EngineConfig
    platform: Platform
    store: Store
    folder: Path
    hf: Any
    model: Model
    spec: EngineSpec
    eos_ids: frozenset[int]
    num_workers: int = 0
    shard: Shard = ALL
    draft_folder: Path | None = None
    pooling: PoolingPlan | None = None

    def shortened(self, max_model_len: int) -> ResolvedConfig:
        """The same for shorter requests: other sizes, and perhaps another rotary table."""
        config, cfg = replace(self.config, max_model_len=max_model_len), self.model.config
        model = make_model(config, self.hf, cfg.dtype)
        model = replace(model, config=replace(model.config, moe=cfg.moe))
        model = with_adapters(config, model.on_ranks(config.tensor_parallel_size))
        spec = replace(make_spec(config, model, self.platform), draft=self.spec.draft)
        return replace(self, config=config, model=model, spec=spec)

    def prepare_kernels(self) -> None:
        """Register the device's kernels. C++ libraries that the store lacks are compiled here."""
        may_compile = self.config.compile_cache_mode == "auto"
        environment = env.read()
        self.platform.prepare(self.store.folder / "cpp", environment.cxx, may_compile=may_compile)

    def check_graphs(self) -> None:
        """Warn if graphs are requested but impossible on this device; call `prepare_kernels` first.

        Raises CompileRequired or ValueError for options that need graphs.
        """
        problem = self.platform.lowering()[1]
        engine_passes(self.config, self.platform)
        if self.config.enforce_eager or not problem:
            return
        if self.config.compile_cache_mode == "require":
            raise CompileRequired(f"compile_cache_mode is 'require', but {problem}")
        if not self.config.tuned.fuse:
            raise ValueError(f"fuse=False leaves out passes over graphs, but {problem}")
        logger.warning(problem)


def resolve(config: EngineConfig, farm: CompileFarm, laps: StartupTimer) -> ResolvedConfig:
    """Choose everything and prepare kernels. If the store is empty, workers import meanwhile.

    Raises ValueError for options that the device or the checkpoint does not support.
    """
    platform = open_platform(config)
    laps.end("device")
    folder = hub.resolve(config.model, weights=not config.random_weights, revision=config.revision)
    store = open_store(config)
    is_cold = workers_may_help(config, store) and not any(store.entries())
    farm.start_workers(platform.compile_workers(0, 0) if is_cold else 0)
    resolved = resolve_model(config, platform, store, folder, weights=not config.random_weights)
    laps.end("config")
    resolved.prepare_kernels()
    resolved.check_graphs()
    laps.end("kernels")
    return resolved


def workers_may_help(config: EngineConfig, store: Store) -> bool:
    """True if processes may compile for this one. They open the store that the options name, so
    they cannot fill a temporary one."""
    is_shared = store.folder == env.read().store_folder(config.compile_cache)
    return is_shared and not config.enforce_eager and config.compile_cache_mode == "auto"


def resolve_model(
    config: EngineConfig, platform: Platform, store: Store, folder: Path, *, weights: bool = False
) -> ResolvedConfig:
    """The part of `resolve` that follows from the checkpoint's config. Raises ValueError.

    With `weights`, the checkpoint's tensors decide whether a tied head is one.
    """
    traits = platform.traits
    if config.quantization is not None:
        check_quantization(config.quantization, traits)
    hf = read_config(folder, store, config.hf_overrides)
    dtype = choose_dtype(config.dtype, hf, platform)
    if weights and hf.tie_word_embeddings and has_own_head(folder, dtype):
        logger.warning(
            "%s: the embeddings are not tied, in spite of tie_word_embeddings: lm_head.weight and "
            "model.embed_tokens.weight have different values", folder,
        )  # fmt: skip
        hf.tie_word_embeddings = False
    model = make_model(config, hf, dtype)
    if config.quantization is None and model.scheme != UNQUANTIZED:
        model = for_device(model, folder, platform)
    if not config.random_weights and not env.read().disable_svd:
        model = svd_experts.applied(model, folder)
    if config.state_dtype != "auto":
        model = with_state_dtype(config.state_dtype, model)
    check_model(config, model, traits)
    config = within_limit(config, model, hf)
    if config.tensor_parallel_size > 1:
        model = on_ranks(config, model)
    model = with_adapters(config, model)
    spec = make_spec(config, model, platform)
    shard = Shard(0, config.tensor_parallel_size)
    eos_ids = eos_token_ids(folder, hf)
    return ResolvedConfig(config, platform, store, folder, hf, model, spec, eos_ids, shard=shard)


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


def within_limit(config: EngineConfig, model: Model, hf: Any) -> EngineConfig:
    """The options, with max_model_len lowered to the model's longest sequence; warns if it was."""
    asked, longest = config.max_model_len, model.config.max_position
    if asked is None or asked <= longest:
        return config
    positions = hf.max_position_embeddings
    scaling = {
        "rope_type": "yarn",
        "factor": float(-(-asked // positions)),
        "original_max_position_embeddings": positions,
    }
    logger.warning(
        "max_model_len is lowered from %d to %d, the longest sequence of the checkpoint. To extend "
        "it, scale the rotary positions, for example with hf_overrides={'rope_scaling': %s}",
        asked, longest, scaling,
    )  # fmt: skip
    return replace(config, max_model_len=longest)


def resolve_without_weights(
    config: EngineConfig, platform: Platform | None = None, *, must_keep: bool = False
) -> ResolvedConfig:
    """A choice that needs the checkpoint's config.json alone, with kernels prepared.

    `must_keep` is that of `open_store`.
    """
    platform = platform or select_platform(config)
    folder = hub.resolve(config.model, weights=False, revision=config.revision)
    resolved = resolve_model(config, platform, open_store(config, must_keep=must_keep), folder)
    resolved.prepare_kernels()
    return resolved


def open_platform(config: EngineConfig) -> Platform:
    """The device of a process that holds weights. Raises ValueError if it cannot sleep and must."""
    platform = select_platform(config)
    if config.enable_sleep_mode:
        platform.enable_sleep()
    return platform


def select_platform(config: EngineConfig) -> Platform:
    platform = platforms.select(
        config.device,
        npu_graph_mode=config.npu_graph_mode,
        npu_graph_options=config.tuned.npu_graph_options,
        graph_batch_sizes=config.graph_batch_sizes,
    )
    environment = env.read()
    platform.exact_inputs = environment.exact_inputs
    return platform


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
    persistent = False if config.deterministic else config.tuned.persistent_step
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

    Raises ValueError for a dtype that the device does not support.
    """
    traits = platform.traits
    if name == "auto":
        dtype = traits.auto_dtype or getattr(hf, "dtype", None) or torch.float32
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


def eos_token_ids(folder: Path, hf: Any) -> frozenset[int]:
    """All ids that end an answer: those in generation_config.json, or else in config.json.

    Raises ValueError, with the file's name, for values that are not ids.
    """
    path = folder / "generation_config.json"
    found = generation_config(folder).get("eos_token_id")
    if found is None:
        path, found = folder if is_gguf(folder) else folder / "config.json", hf.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id is {found!r}: it must be a token id, or a list")
    return frozenset(ids)
