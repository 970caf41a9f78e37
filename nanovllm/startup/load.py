"""From options to a warm runner: find the checkpoint, read its config, load weights, size the cache, build the programs."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanovllm import env, hub, platforms
from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler, CompileRequired
from nanovllm.compile.store import Store
from nanovllm.config import EngineConfig
from nanovllm.models import loader as weights
from nanovllm.models import registry
from nanovllm.models.formats import PLAIN
from nanovllm.models.interface import VARYING, Model
from nanovllm.platforms import attention
from nanovllm.platforms.base import MemoryBudget, Platform
from nanovllm.runner import steps
from nanovllm.runner.runner import Runner
from nanovllm.runner.spec import EngineSpec, Layout
from nanovllm.schedule.stall import StallBound
from nanovllm.startup import artifacts
from nanovllm.startup.checkpoint_cache import read_config, read_tokenizer
from nanovllm.startup.compile_farm import processes, workers
from nanovllm.startup.compile_farm.processes import Server
from nanovllm.startup.compile_farm.workers import WorkerFailed, Workers
from nanovllm.startup.memory import MemoryReport

logger = logging.getLogger(__name__)

# How long processes that compile are waited for without an answer from any; a bucket or kernel takes seconds.
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Loaded:
    runner: Runner
    tokenizer: Any | None
    eos_ids: frozenset[int]
    num_blocks: int
    memory: MemoryReport
    stall: StallBound | None
    seconds: dict[str, float]


def load(config: EngineConfig, server: Server | None = None) -> Loaded:
    """Everything between the options and the first step, with a progress bar over layers and buckets. A `server` that has begun
    for the same options is used or ended."""
    with ExitStack() as stack:
        if server is not None:
            stack.callback(server.end)
        return _load(config, stack, server)


def _load(config: EngineConfig, stack: ExitStack, server: Server | None) -> Loaded:
    laps = Laps()
    environment = env.read()
    platform = select_platform(config)
    laps.end("device")
    folder = hub.resolve(config.model, weights=not config.random_weights)
    store = artifacts.open_store(config, environment)
    early = _early_processes(config, store, platform, server)
    stack.callback(processes.end, early)
    model, hf = read_model(folder, config, platform, store)
    spec = make_spec(config, model, platform)
    laps.end("config")
    platform.prepare(
        store.folder / "cpp", environment.cxx, may_compile=config.compile_cache_mode == "auto"
    )
    num_kernels = len(platform.kernels_compiled())
    cfg, layout = model.config, spec.layout
    if not config.enforce_eager and (problem := platform.lowering()[1]):
        if config.compile_cache_mode == "require":
            raise CompileRequired(f"compile_cache_mode is 'require', but {problem}")
        if not config.fuse:
            raise ValueError(f"fuse=False leaves out passes over graphs, but {problem}")
        logger.warning(problem)
    laps.end("kernels")
    num_programs = len(layout.prefill_tokens) + len(layout.decode_rows) if layout.pad else 0
    reader = stack.enter_context(ThreadPoolExecutor(1))
    helpers = _cold_start_workers(model, config, spec, store, platform, early)
    if helpers is not None:
        stack.callback(helpers.close)
    # Beside the weights, which are not read by Python; but not while work is handed out, since imports take Python's lock.
    tokenizer = reader.submit(read_tokenizer, folder, store) if helpers is None else None
    total = cfg.num_layers + num_programs
    bar = stack.enter_context(
        tqdm(total=total, desc="loading weights", dynamic_ncols=True, leave=False)
    )
    if config.random_weights:
        params = weights.random(model, platform.device, config.seed, bar.update, spec.weight_format)
    else:
        params = weights.load(model, folder, platform.device, bar.update, spec.weight_format)
    platform.synchronize()
    laps.end("weights")
    tokenizer = tokenizer or reader.submit(read_tokenizer, folder, store)
    if helpers is not None:
        bar.set_description("compiling kernels")
        _wait(helpers)  # they also take memory, which the cache's size must not miss
        laps.end("compile")
    tokenizer.result()
    laps.end("tokenizer")

    stage = "cache"
    bar.set_description("sizing the cache")

    def building(what: str) -> None:
        nonlocal stage
        laps.end(stage)
        stage = what.partition(" ")[0]
        bar.set_description(f"building {what}")
        bar.update()

    def new_runner(spec: EngineSpec) -> Runner:
        # the rotary table can depend on max_model_len
        architecture = registry.architecture(hf.architectures)
        fitted = architecture(hf, dtype=cfg.dtype, max_model_len=spec.layout.max_model_len)
        compiler = make_compiler(config, platform, environment, model, store)
        return Runner(fitted, params, spec, platform, compiler, capture=config.capture)

    num_blocks, budget, runner = with_cache(config, spec, model, new_runner, platform)
    runner.warm_up(building)
    laps.end(stage)
    max_stall_ms = config.max_stall_ms or platform.traits.max_stall_ms
    stall = runner.measure_stall(max_stall_ms) if math.isfinite(max_stall_ms) else None
    laps.end("stall")
    if not config.enforce_eager:
        made = platform.kernels_compiled()[num_kernels:]
        # the layout as it was asked for, since the next start asks for that as well
        artifacts.finish(store, platform, config, model, spec, made)
        laps.end("seal")
    bar.close()
    logger.info(
        "%s on %s in %s: %d layers, %d cache blocks of %d tokens, %s, ready in %.1f s",
        cfg.architecture, platform.device, str(cfg.dtype).removeprefix("torch."), cfg.num_layers, num_blocks,
        layout.block_size, _programs(runner.compiler), sum(laps.seconds.values()),
    )  # fmt: skip
    memory = MemoryReport(
        weights_bytes=runner.weights_bytes,
        cache_bytes=num_blocks * runner.block_bytes,
        cache_tokens=(num_blocks - 1) * layout.block_size,
        graphs_bytes=runner.graphs_bytes,
        budget=budget,
        limited=budget is not None and num_blocks < budget.cache_bytes // runner.block_bytes,
    )
    logger.info("%s", memory)
    return Loaded(
        runner,
        tokenizer.result(),
        eos_token_ids(folder, hf),
        num_blocks,
        memory,
        stall,
        laps.seconds,
    )


class Laps:
    """Seconds by what they were spent on: device, config, kernels, weights, compile (waiting for other processes), tokenizer
    (what is left of it after these), cache, prefill, decode (captures included), stall (timing prefill steps), seal."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _early_processes(
    config: EngineConfig, store: Store, platform: Platform, server: Server | None
) -> list[processes.Process]:
    """Processes that will compile, started before anything is known of the model, where the store is quite empty: they
    import what they need while this process reads the config."""
    is_wanted = (
        not config.enforce_eager
        and config.compile_cache_mode == "auto"
        and not any(store.entries())
    )
    count = platform.compile_workers(0, 0) if is_wanted else 0
    if server is None:
        return processes.start(config, count)
    if count and store.folder == processes.store_folder(config, env.read()):
        return server.fork(count)
    server.end()  # no device that takes long, or a store in another place than the options say
    return processes.start(config, count)


def _cold_start_workers(
    model: Model,
    config: EngineConfig,
    spec: EngineSpec,
    store: Store,
    platform: Platform,
    early: list[processes.Process],
) -> Workers | None:
    """Processes that compile while this one reads weights, where compiling takes long and nobody has done it yet."""
    may_compile = (
        not config.enforce_eager
        and config.compile_cache_mode == "auto"
        and platform.lowering()[0] is not None
    )
    count = platform.compile_workers(
        workers.bytes_of_one(model, spec), model.param_bytes(spec.weight_format)
    )
    if not may_compile or count < 2 or artifacts.is_ready(store, platform, config, model, spec):
        processes.end(early)
        return None
    # this process runs every bucket itself, so that for them it is enough to compile
    return Workers(config, workers.buckets_of(spec.layout), count, early, rehearse=True)


def _wait(helpers: Workers) -> None:
    try:
        helpers.wait(lambda outcome: None, PATIENCE_S)
    except WorkerFailed as error:
        logger.warning(
            "what is missing is compiled by this process, since another failed: %s", error
        )


def _programs(compiler: Compiler) -> str:
    if compiler.lowering is None:
        return "eager"
    return (
        f"{compiler.num_compiled + compiler.num_loaded} programs ({compiler.num_compiled} compiled)"
    )


def select_platform(config: EngineConfig) -> Platform:
    return platforms.select(
        config.device,
        npu_graph_mode=config.npu_graph_mode,
        npu_graph_options=config.npu_graph_options,
        graph_batch_sizes=config.graph_batch_sizes,
    )


def read_model(
    folder: Path, config: EngineConfig, platform: Platform, store: Store | None
) -> tuple[Model, Any]:
    """The model of a checkpoint folder, and transformers' config or the store's copy of it.

    Raises ValueError for a dtype or quantization that the device does not support.
    """
    if config.quantization is not None and config.quantization not in platform.traits.quantizations:
        raise ValueError(
            f"quantization {config.quantization!r} is not supported on a {platform.traits.name} device, "
            "only on a cpu: leave it out or use device='cpu'"
        )
    hf = read_config(folder, store)
    dtype = choose_dtype(config.dtype, hf, platform)
    architecture = registry.architecture(hf.architectures)
    return architecture(hf, dtype=dtype, max_model_len=config.max_model_len), hf


def make_spec(config: EngineConfig, model: Model, platform: Platform) -> EngineSpec:
    """The engine's choices for a model. Raises ValueError for options that do not go together."""
    cfg = model.config
    windows = [kind.window for kind in model.layer_kinds]
    facts = attention.Facts(cfg.dtype, cfg.head_dim, config.kvcache_block_size, windows)
    backend = attention.choose(config.attention_backend, platform, facts)
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, model, platform)
    if backend and cache_dtype is not cfg.dtype:
        raise ValueError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r}, which attention_backend {config.attention_backend!r} cannot read: "
            "use attention_backend='auto'"
        )
    layout = make_layout(config, model, platform, backend, cache_dtype)
    return EngineSpec(layout, backend, cache_dtype, config.quantization or PLAIN)


def choose_dtype(name: str, hf: Any, platform: Platform) -> torch.dtype:
    """ "auto" is the checkpoint's own, float32 on a CPU, and float16 for bfloat16 where the device has only the former.

    Raises ValueError for one that the device does not compute in.
    """
    traits = platform.traits
    if name == "auto":
        dtype = traits.auto_dtype or getattr(hf, "dtype", None) or torch.float32
        if dtype is torch.bfloat16 and dtype not in traits.supported_dtypes:
            # its range is narrower, but models whose activations leave it are few, and float32 takes twice the memory
            logger.warning(
                "this device has no bfloat16: the checkpoint's weights are converted to float16"
            )
            dtype = torch.float16
    else:
        dtype = getattr(torch, name)
    if dtype not in traits.supported_dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in traits.supported_dtypes)
        hint = (
            ", and dtype='float16' for a bfloat16 checkpoint"
            if torch.float16 in traits.supported_dtypes
            else ""
        )
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} is not supported on this {traits.name} device: "
            f"use one of {names}{hint if dtype is torch.bfloat16 else ''}"
        )
    return dtype


def choose_cache_dtype(name: str, model: Model, platform: Platform) -> torch.dtype:
    """ "auto" is the model's dtype. Raises ValueError for a cache that device or model do not support."""
    if name == "auto":
        return model.config.dtype
    if not platform.traits.supports_fp8_cache:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which is not supported on this {platform.traits.name} device: "
            "it needs a CPU, or a GPU of compute capability 8.9 or higher"
        )
    if model.kv_scales is None:
        raise ValueError(
            f"kv_cache_dtype is {name!r}, but {model.config.architecture} has no bound for its keys and values, from which "
            "the cache's scales are computed: use kv_cache_dtype='auto'"
        )
    return torch.float8_e4m3fn


def eos_token_ids(folder: Path, hf: Any) -> frozenset[int]:
    """All ids that end an answer: generation_config.json names them, config.json where it does not."""
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    found = hf.eos_token_id if found is None else found
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def make_layout(
    config: EngineConfig, model: Model, platform: Platform, backend: str, cache_dtype: torch.dtype
) -> Layout:
    traits, max_model_len = platform.traits, config.max_model_len or model.config.max_position
    max_num_seqs = config.max_num_seqs or traits.num_seqs
    max_tokens = config.max_num_batched_tokens or traits.batched_tokens
    max_tokens = max(16, min(max_tokens, -(-max_model_len // 16) * 16 * max_num_seqs))
    pad = config.pad_batches
    # with as many bytes in a block, decode attention reads an fp8 cache in tiles of twice the tokens
    default_block_size = attention.default_block_size(backend, platform)
    default_block_size *= 1 if cache_dtype is model.config.dtype else 2
    return Layout(
        block_size=config.kvcache_block_size or default_block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        decode_rows=buckets.decode_ladder(
            config.graph_batch_sizes, max_num_seqs, traits.decode_rows
        ),
        prefill_tokens=buckets.prefill_ladder(max_tokens, traits.prefill_growth),
        max_prefill_rows=min(max_num_seqs, buckets.PREFILL_ROWS),
        verify_tokens=tuple(sorted({1 + length for length in config.draft_lengths})),
        pad=pad,
    )


def make_compiler(
    config: EngineConfig,
    platform: Platform,
    environment: env.Environment,
    model: Model,
    store: Store | None = None,
) -> Compiler:
    lowering, _ = (None, "") if config.enforce_eager else platform.lowering()
    passes = platform.passes(config.fuse) if lowering is not None else ()
    return Compiler(
        lowering,
        passes=passes,
        dump_dir=environment.dump_graphs,
        varying=() if platform.traits.whole_steps else VARYING,
        frozen=steps.FROZEN,
        strict=environment.strict,
        store=store,
        ingredients=artifacts.common_ingredients(platform, [name for name, _ in passes], model)
        if store
        else {},
        require=config.compile_cache_mode == "require",
    )


def with_cache(
    config: EngineConfig,
    spec: EngineSpec,
    model: Model,
    new_runner: Callable[[EngineSpec], Runner],
    platform: Platform,
) -> tuple[int, MemoryBudget | None, Runner]:
    """A runner with its cache: as many blocks as asked for, or as fit and can be used."""
    runner = new_runner(spec)
    layout = spec.layout
    budget = None
    if config.num_kvcache_blocks is not None:
        num_blocks, limit_bytes = config.num_kvcache_blocks, platform.cache_limit_bytes()
        if num_blocks * runner.block_bytes > limit_bytes:
            raise ValueError(
                f"num_kvcache_blocks is {num_blocks}, which takes {num_blocks * runner.block_bytes / 2**30:.2f} GiB, but "
                f"{platform.device} has {limit_bytes / 2**30:.2f} GiB for it: at most {limit_bytes // runner.block_bytes} "
                f"blocks of {layout.block_size} tokens fit"
            )
    elif platform.traits.cache_blocks is not None:
        allowed_bytes = platform.memory_budget(config.gpu_memory_utilization).cache_bytes
        num_blocks = min(platform.traits.cache_blocks, allowed_bytes // runner.block_bytes)
    else:
        budget = runner.measure_budget(config.gpu_memory_utilization)
        most_useful = 1 + layout.max_num_seqs * layout.blocks_per_row
        num_blocks = min(most_useful, budget.cache_bytes // runner.block_bytes)
        if platform.traits.whole_steps:
            num_blocks = buckets.coarse(num_blocks)
    block_size = layout.block_size
    if num_blocks < 2:
        raise ValueError(
            f"there is memory for {num_blocks} cache block(s) of {block_size} tokens ({runner.block_bytes / 2**20:.1f} MiB "
            f"each), but at least 2 are needed: raise gpu_memory_utilization ({config.gpu_memory_utilization}), or lower "
            f"kvcache_block_size ({block_size}) or max_num_batched_tokens ({layout.prefill_tokens[-1]})"
        )
    capacity = (num_blocks - 1) * block_size
    if capacity < layout.max_model_len:
        if config.max_model_len is not None:
            raise ValueError(
                f"max_model_len is {config.max_model_len}, but the cache holds {capacity} tokens "
                f"({num_blocks - 1} blocks of {block_size}): lower max_model_len or raise num_kvcache_blocks"
            )
        logger.warning(
            "max_model_len is lowered from %d to %d, what the cache holds",
            layout.max_model_len,
            capacity,
        )
        spec = make_spec(replace(config, max_model_len=capacity), model, platform)
        runner = new_runner(spec)  # its programs are of other shapes than those that measured
    runner.allocate_cache(num_blocks)
    return num_blocks, budget, runner
