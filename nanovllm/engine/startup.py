"""From options to a warm runner: find the checkpoint, read its config, load weights, size the cache, build the programs."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from nanovllm import env, hub, platforms
from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler
from nanovllm.config import EngineConfig
from nanovllm.engine.memory import MemoryReport
from nanovllm.engine.runner import Layout, Runner
from nanovllm.engine.stall import StallBound
from nanovllm.models import registry, weights
from nanovllm.models.config import ModelConfig
from nanovllm.platforms import Platform
from nanovllm.platforms.base import MemoryBudget
from nanovllm.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Inputs whose first dimension is no reason to compile again: cache blocks, rows of the rotary table.
VARYING = ("k_CBKH", "v_CBKH", "cos_sin_MH")


@dataclass(frozen=True)
class Loaded:
    runner: Runner
    tokenizer: Any | None
    eos_ids: frozenset[int]
    num_blocks: int
    memory: MemoryReport
    stall: StallBound | None
    seconds: dict[str, float]


def load(config: EngineConfig) -> Loaded:
    """Everything between the options and the first step, with a progress bar over layers and buckets."""
    started = time.perf_counter()
    environment = env.read()
    platform = platforms.select(
        config.device,
        npu_graph_mode=config.npu_graph_mode,
        npu_graph_options=config.npu_graph_options,
        graph_batch_sizes=config.graph_batch_sizes,
        cache=environment.cache,
    )
    folder = hub.resolve(config.model, weights=not config.random_weights)
    model, cfg, hf = read_model_config(folder, config, platform)
    tokenizer = load_tokenizer(folder)
    use_private_cache(environment.cache)
    platform.prepare()
    layout = make_layout(config, cfg, platform)
    if not config.enforce_eager and (problem := platform.lowering()[1]):
        logger.warning(problem)
    num_programs = len(layout.prefill_tokens) + len(layout.decode_rows) if layout.pad else 0
    with tqdm(total=cfg.num_layers + num_programs, desc="loading weights", dynamic_ncols=True, leave=False) as bar:
        if config.random_weights:
            params = weights.random(model, cfg, platform.device, config.seed, bar.update)
        else:
            params = weights.load(model, cfg, folder, platform.device, bar.update)
        platform.synchronize()
        weights_done = time.perf_counter()

        def building(what: str) -> None:
            bar.set_description(f"building {what}")
            bar.update()

        bar.set_description("sizing the cache")

        def new_runner(layout: Layout) -> Runner:
            # a layout for shorter requests can mean another rotary table
            fitted = model.config(hf, dtype=cfg.dtype, max_model_len=layout.max_model_len)
            compiler = make_compiler(config, platform, environment)
            return Runner(model, fitted, params, layout, platform, compiler, capture=config.capture)

        layout, num_blocks, budget, runner = _with_cache(config, layout, cfg, new_runner, platform)
        runner.warm_up(building)
        max_stall_ms = platform.max_stall_ms if config.max_stall_ms is None else config.max_stall_ms
        stall = runner.measure_stall(max_stall_ms) if math.isfinite(max_stall_ms) else None
    seconds = {"weights": weights_done - started, "warm_up": time.perf_counter() - weights_done}
    logger.info(
        "%s on %s in %s: %d layers, %d cache blocks of %d tokens, %s, ready in %.1f s",
        cfg.architecture, platform.device, str(cfg.dtype).removeprefix("torch."), cfg.num_layers, num_blocks,
        layout.block_size, f"{runner.compiler.num_compiled} programs" if runner.compiler.lowering else "eager",
        sum(seconds.values()),
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
    return Loaded(runner, tokenizer, eos_token_ids(folder, hf), num_blocks, memory, stall, seconds)


def read_model_config(folder: Path, config: EngineConfig, platform: Platform) -> tuple[ModuleType, ModelConfig, Any]:
    """The model file, its config and transformers' config for a checkpoint folder."""
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(folder)
    model = registry.architecture(hf.architectures)
    return (
        model,
        model.config(hf, dtype=choose_dtype(config.dtype, hf, platform), max_model_len=config.max_model_len),
        hf,
    )


def choose_dtype(name: str, hf: Any, platform: Platform) -> torch.dtype:
    """ "auto" is the checkpoint's own, float32 on a CPU; ValueError for one that the device does not compute in."""
    if name == "auto":
        dtype = torch.float32 if platform.name == "cpu" else getattr(hf, "dtype", None) or torch.float32
    else:
        dtype = getattr(torch, name)
    if dtype not in platform.supported_dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in platform.supported_dtypes)
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} is not supported on this {platform.name} device: use one of {names}"
        )
    return dtype


def eos_token_ids(folder: Path, hf: Any) -> frozenset[int]:
    """All ids that end an answer: generation_config.json names them, config.json where it does not."""
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    found = hf.eos_token_id if found is None else found
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def make_layout(config: EngineConfig, cfg: ModelConfig, platform: Platform) -> Layout:
    max_model_len = config.max_model_len or cfg.max_position
    max_num_seqs = config.max_num_seqs or platform.default_num_seqs
    max_tokens = config.max_num_batched_tokens or platform.default_batched_tokens
    max_tokens = max(16, min(max_tokens, -(-max_model_len // 16) * 16 * max_num_seqs))
    pad = config.pad_batches
    return Layout(
        block_size=config.kvcache_block_size or platform.default_block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        decode_rows=buckets.decode_ladder(config.graph_batch_sizes, max_num_seqs, platform.name),
        prefill_tokens=buckets.prefill_ladder(max_tokens),
        max_prefill_rows=min(max_num_seqs, buckets.PREFILL_ROWS),
        pad=pad,
    )


def make_compiler(config: EngineConfig, platform: Platform, environment: env.Environment) -> Compiler:
    lowering, _ = (None, "") if config.enforce_eager else platform.lowering()
    return Compiler(
        lowering,
        passes=platform.passes(config.fuse) if lowering is not None else (),
        dump_dir=environment.dump_graphs,
        varying=() if platform.whole_steps else VARYING,
        strict=environment.strict,
    )


def use_private_cache(folder: Path) -> None:
    """Compiled code goes into a folder that only its owner can write: others could make us run theirs.

    Raises ValueError for a folder that others own or may write to. Where none can be made, a temporary one serves.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    try:
        # one by one: `parents` leaves the mode of the folders above to the umask
        for path in (folder, folder / "inductor", folder / "triton"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        logger.warning("compiled code is not kept: %s (NANOVLLM_CACHE names the folder)", error)
        folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    for path in (folder, folder / "inductor", folder / "triton"):
        _refuse_if_shared(path)
    # importing Dynamo anywhere writes torch's own choice, a folder in /tmp, into the environment
    env.set_default("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"), also_over=default_cache_dir())
    env.set_default("TRITON_CACHE_DIR", str(folder / "triton"))


def _refuse_if_shared(path: Path) -> None:
    if not path.exists() or not hasattr(os, "getuid"):
        return
    owner, mode = path.stat().st_uid, path.stat().st_mode & 0o777
    if owner != os.getuid() or mode & 0o022:
        raise ValueError(
            f"{path} is for compiled code, but user {owner} owns it and its mode is {mode:o}: it must belong to user "
            f"{os.getuid()} and be writable by nobody else (chmod 700, or another folder through NANOVLLM_CACHE)"
        )


def _with_cache(
    config: EngineConfig,
    layout: Layout,
    cfg: ModelConfig,
    new_runner: Callable[[Layout], Runner],
    platform: Platform,
) -> tuple[Layout, int, MemoryBudget | None, Runner]:
    """A runner with its cache: as many blocks as asked for, or as fit and can be used."""
    runner = new_runner(layout)
    budget = None
    if config.num_kvcache_blocks is not None:
        num_blocks = config.num_kvcache_blocks
    else:
        budget = runner.measure_budget(config.gpu_memory_utilization)
        most_useful = 1 + layout.max_num_seqs * layout.blocks_per_row
        num_blocks = min(most_useful, budget.cache_bytes // runner.block_bytes)
        if platform.whole_steps:
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
        logger.warning("max_model_len is lowered from %d to %d, what the cache holds", layout.max_model_len, capacity)
        layout = make_layout(replace(config, max_model_len=capacity), cfg, platform)
        runner = new_runner(layout)  # its programs are of other shapes than those that measured
    runner.allocate_cache(num_blocks)
    return layout, num_blocks, budget, runner
