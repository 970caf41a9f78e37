"""Start-up from top to bottom: choose, load weights and tokenizer, build."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from nanovllm import env, hub
from nanovllm.compile.store import Store
from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.interface import Model, Params
from nanovllm.runner.runner import Runner
from nanovllm.runner.spec import EngineSpec
from nanovllm.schedule.stall import StallBound
from nanovllm.startup import artifacts
from nanovllm.startup.build import Built, build
from nanovllm.startup.checkpoint_cache import read_tokenizer
from nanovllm.startup.choose import Choice, choose, eos_token_ids, select_platform
from nanovllm.startup.compile_farm.farm import CompileFarm, WorkerFailed
from nanovllm.startup.memory import MemoryReport

logger = logging.getLogger(__name__)

# If no worker answers for so long, this process goes on alone. A bucket or kernel takes seconds.
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Loaded:
    """The parts of a warm engine. `tokenizer` is None if the checkpoint has none; see `Laps`."""

    config: EngineConfig
    model: Model
    spec: EngineSpec
    runner: Runner
    tokenizer: Any | None
    eos_ids: frozenset[int]
    num_blocks: int
    memory: MemoryReport
    stall: StallBound | None
    seconds: dict[str, float]


class Laps:
    """Seconds by stage: device, config, kernels, weights, compile (waiting for workers), tokenizer
    (waiting for it), cache, prefill, decode (captures included), stall (timing prefill), seal."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def load(config: EngineConfig, farm: CompileFarm | None = None) -> Loaded:
    """Turn options into the parts of a warm engine; shows a progress bar over layers and buckets.

    `farm` was started for the same options, and the caller closes it. Raises ValueError for options
    that the device or checkpoint does not support, CheckpointError, and CompileRequired.
    """
    laps = Laps()
    with ExitStack() as stack:
        farm = farm or stack.enter_context(closing(CompileFarm(config)))
        choice = _choose(config, farm, laps)
        num_kernels = len(choice.platform.kernels_compiled())
        num_buckets = len(choice.buckets) if choice.spec.layout.pad else 0
        total = choice.model.config.num_layers + num_buckets

        _compile_elsewhere(choice, farm)
        bar = tqdm(total=total, desc="loading weights", dynamic_ncols=True, leave=False)
        stack.enter_context(bar)
        params, tokenizer = _load_weights(choice, farm, bar, laps)

        built = _build(choice, params, bar, laps)
        if not config.enforce_eager:
            artifacts.finish(choice, choice.platform.kernels_compiled()[num_kernels:])
            laps.end("seal")
    _log_start(built, sum(laps.seconds.values()))
    runner = built.runner
    eos_ids = eos_token_ids(choice.folder, choice.hf)
    return Loaded(
        config, runner.model, runner.spec, runner, tokenizer, eos_ids, built.num_blocks,
        built.memory, built.stall, laps.seconds,
    )  # fmt: skip


def _choose(config: EngineConfig, farm: CompileFarm, laps: Laps) -> Choice:
    """A choice with kernels prepared. If the store is empty, workers import in the meantime."""
    platform = select_platform(config)
    laps.end("device")
    folder = hub.resolve(config.model, weights=not config.random_weights)
    store = artifacts.open_store(config)
    is_cold = _may_compile_elsewhere(config, store) and not any(store.entries())
    farm.start_workers(platform.compile_workers(0, 0) if is_cold else 0)
    choice = choose(config, platform, store, folder)
    laps.end("config")
    choice.prepare_kernels()
    choice.check_graphs()
    laps.end("kernels")
    return choice


def _may_compile_elsewhere(config: EngineConfig, store: Store) -> bool:
    """False for a temporary store too: workers open the store that the options name."""
    is_shared = store.folder == env.read().store_folder(config.compile_cache)
    return is_shared and not config.enforce_eager and config.compile_cache_mode == "auto"


def _compile_elsewhere(choice: Choice, farm: CompileFarm) -> None:
    """Start compiling in workers if compiling takes long on this device and was never done."""
    platform, spec, count = choice.platform, choice.spec, 0
    if _may_compile_elsewhere(choice.config, choice.store) and platform.lowering()[0] is not None:
        own_bytes = choice.model.param_bytes(spec.weight_format)
        count = platform.compile_workers(_worker_bytes(choice), own_bytes)
    if count < 2 or artifacts.is_ready(choice):
        farm.close()
    else:
        # this process runs every bucket itself, so workers need not run them
        farm.build(choice.buckets, count, rehearse=True)


def _worker_bytes(choice: Choice) -> int:
    """About the device memory of a worker: reduced model, largest step, the device's context."""
    cfg, layout = choice.model.config, choice.spec.layout
    token_size = 4 * cfg.ffn_size + 8 * cfg.hidden_size + 3 * cfg.qkv_size
    scratch_bytes = layout.prefill_tokens[-1] * token_size * cfg.dtype.itemsize
    params_bytes = choice.model.reduced().param_bytes(choice.spec.weight_format)
    return params_bytes + scratch_bytes + (1 << 30)


def _load_weights(
    choice: Choice, farm: CompileFarm, bar: tqdm, laps: Laps
) -> tuple[Params, Any | None]:
    """Weights and tokenizer; waits for workers, if any."""
    model, device, weight_format = choice.model, choice.platform.device, choice.spec.weight_format
    with ThreadPoolExecutor(1) as reader:
        read = partial(reader.submit, read_tokenizer, choice.folder, choice.store)
        # Imports hold Python's lock, and reading weights does not. So the tokenizer is read beside
        # the weights, unless threads hand out tasks at the same time.
        tokenizer = None if farm.is_building else read()
        if choice.config.random_weights:
            params = loader.random(model, device, choice.config.seed, bar.update, weight_format)
        else:
            params = loader.load(model, choice.folder, device, bar.update, weight_format)
        choice.platform.synchronize()
        laps.end("weights")
        tokenizer = tokenizer or read()
        if farm.is_building:
            bar.set_description("compiling kernels")
            _wait(farm)
            laps.end("compile")
        found = tokenizer.result()
    laps.end("tokenizer")
    return params, found


def _wait(farm: CompileFarm) -> None:
    """Wait until the store has what workers compile, and the device has the memory they took."""
    try:
        farm.wait(lambda outcome: None, PATIENCE_S)
    except WorkerFailed as error:
        logger.warning("a worker failed, and this process compiles what is missing: %s", error)


def _build(choice: Choice, params: Params, bar: tqdm, laps: Laps) -> Built:
    stage = "cache"
    bar.set_description("sizing the cache")

    def begin(what: str) -> None:
        nonlocal stage
        laps.end(stage)
        stage = what.partition(" ")[0]
        if stage != "stall":
            bar.set_description(f"building {what}")
            bar.update()

    built = build(choice, params, begin)
    laps.end(stage)
    return built


def _log_start(built: Built, seconds: float) -> None:
    runner, cfg, compiler = built.runner, built.runner.model.config, built.runner.compiler
    num_programs = compiler.num_compiled + compiler.num_loaded
    programs = f"{num_programs} programs ({compiler.num_compiled} compiled)"
    logger.info(
        "%s on %s in %s: %d layers, %d cache blocks of %d tokens, %s, ready in %.1f s",
        cfg.architecture, runner.platform.device, str(cfg.dtype).removeprefix("torch."),
        cfg.num_layers, built.num_blocks, runner.layout.block_size,
        "eager" if compiler.lowering is None else programs, seconds,
    )  # fmt: skip
    logger.info("%s", built.memory)
