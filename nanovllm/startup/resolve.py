"""Makes the choices before weights are loaded: model, dtypes, attention, sizes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import env, hub, platforms
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Store
from nanovllm.config import EngineConfig
from nanovllm.models import svd_experts
from nanovllm.models.loader import has_own_head
from nanovllm.models.model import Model
from nanovllm.models.schemes import UNQUANTIZED
from nanovllm.models.shards import ALL, Shard
from nanovllm.platforms.base import Platform
from nanovllm.runner.spec import EngineSpec
from nanovllm.startup.checkpoint_cache import read_config
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.determinism import check_model, engine_passes
from nanovllm.startup.engine_spec import choose_dtype, make_spec
from nanovllm.startup.generation_config import eos_token_ids
from nanovllm.startup.model_options import (
    check_quantization,
    for_device,
    make_model,
    on_ranks,
    with_adapters,
    with_state_dtype,
)
from nanovllm.startup.startup_timer import StartupTimer
from nanovllm.startup.store_folder import open_store
from nanovllm.startup.stored_dtype import stored_dtype

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
    if config.dtype == "auto" and traits.auto_dtype is None and hf.dtype is None:
        hf.dtype = stored_dtype(folder)
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
