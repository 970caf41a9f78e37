"""Start-up from top to bottom: choose, load weights and tokenizer, build."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import env, progress
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import BUILDING
from nanovllm.kernels.collectives import Communicator
from nanovllm.media import settings
from nanovllm.media.settings import VisionSettings
from nanovllm.models import loader
from nanovllm.models.experts.offloaded import Offloader
from nanovllm.models.model import Model, Params
from nanovllm.models.vision import weights
from nanovllm.models.vision.weights import AnyParams, AnyTower
from nanovllm.platforms.regions import Place, Region
from nanovllm.runner.expert_stats import ExpertStats
from nanovllm.runner.runner import Runner
from nanovllm.runner.sleep import Sleeper
from nanovllm.runner.spec import EngineSpec
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.draft_length import StepTimes
from nanovllm.schedule.pace import DecodePace
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.startup import ranks
from nanovllm.startup.build import build
from nanovllm.startup.checkpoint_cache import read_tokenizer_of
from nanovllm.startup.compile_farm.farm import CompileFarm, WorkerFailed
from nanovllm.startup.compile_workers import num_workers
from nanovllm.startup.draft import Drafts, with_draft
from nanovllm.startup.generation_config import default_params, generation_config
from nanovllm.startup.memory import MemoryReport
from nanovllm.startup.resolve import ResolvedConfig, resolve
from nanovllm.startup.speculation import with_speculation
from nanovllm.startup.startup_timer import StartupTimer
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# After this time without an answer of a worker, this process compiles alone. A bucket or kernel
# takes seconds.
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Loaded:
    """The parts of a warm engine. `tokenizer` and `vision` are None if the checkpoint has none; see
    `StartupTimer`."""

    config: EngineConfig
    model: Model
    spec: EngineSpec
    runner: Runner
    sleeper: Sleeper
    tokenizer: Tokenizer | None
    vision: VisionSettings | None
    eos_ids: frozenset[int]
    default_params: SamplingParams
    num_blocks: int
    cache_groups: CacheGroups
    memory: MemoryReport
    stall: PrefillLatencyBound | None
    pace: DecodePace
    step_times: StepTimes | None
    expert_stats: ExpertStats | None
    seconds: dict[str, float]


def load(
    config: EngineConfig,
    farm: CompileFarm | None = None,
    *,
    show_progress: bool = True,
    draft: Drafts | None = None,
) -> Loaded:
    """Turn options into the parts of a warm engine; shows a progress bar over layers, then buckets.

    `farm` was started for the same options, and the caller closes it. `draft` proposes tokens on
    the device, on one rank, in place of what the options name. Raises ValueError for options that
    the device or checkpoint does not support, CheckpointError, and CompileRequired.
    """
    if option := config.replicas_option:
        raise ValueError(f"{option} is for LLM and LLMEngine, which run engines elsewhere")
    laps = StartupTimer()
    with ExitStack() as stack:
        farm = farm or stack.enter_context(closing(CompileFarm(config)))
        resolved = resolve(config, farm, laps)
        if draft is not None and resolved.shard.size > 1:
            raise ValueError(
                f"tensor_parallel_size is {resolved.shard.size}: other ranks know the proposer of "
                "speculative_config alone"
            )
        resolved = with_speculation(resolved) if draft is None else with_draft(resolved, draft)
        resolved = replace(resolved, num_workers=num_workers(resolved))
        if resolved.shard.size == 1:
            return load_chosen(resolved, farm, laps, show_progress=show_progress)
        team = ranks.start(resolved)
        try:
            return load_chosen(
                resolved, farm, laps, team.connect, team.make_runner, show_progress=show_progress
            )
        except BaseException:
            team.close()
            raise


def load_chosen(
    resolved: ResolvedConfig,
    farm: CompileFarm,
    laps: StartupTimer,
    connect: Callable[[], Communicator | None] = lambda: None,
    make: Callable[..., Runner] = Runner,
    *,
    show_progress: bool = True,
) -> Loaded:
    """The rest of `load`, for one rank: `connect` waits for the others and returns their group,
    None on one rank. `make` makes the runner."""
    config = resolved.config
    with ExitStack() as stack:
        bar = stack.enter_context(begin(resolved, farm, show_progress=show_progress))
        weights, place = _memory(resolved)
        params, tokenizer = _load_weights(resolved, place, farm, bar, laps)
        count_buckets(resolved, bar)
        stack.enter_context(env.folder_of_compilers(resolved.store.folder / "cpp", BUILDING))
        built = build(resolved, params, bar, laps, connect(), make)
    if resolved.spec.offload is not None:
        logger.info("experts: %s", resolved.spec.offload)
    num_bytes = resolved.model.param_bytes
    cfg, runner, seconds = resolved.model.config, built.runner, sum(laps.seconds.values())
    logger.info("attention: %s", resolved.spec.attention.describe())
    logger.info(
        "%s on %s in %s: %d layers, %d cache blocks of %d tokens, %s, ready in %.1f s (weights "
        "%.1f s, %.1f GB/s)",
        cfg.architecture, resolved.platform.device, str(cfg.dtype).removeprefix("torch."),
        cfg.num_layers, built.num_blocks, runner.layout.block_size, _programs(runner), seconds,
        laps.seconds["weights"], num_bytes / 1e9 / laps.seconds["weights"],
    )  # fmt: skip
    generation = generation_config(resolved.folder)
    eos_ids = resolved.eos_ids
    if tokenizer is not None and tokenizer.eos_id is not None:
        eos_ids |= {tokenizer.eos_id}
    vision = None if runner.model.tower is None else settings.load(resolved.folder)
    sleeper = runner.sleeper(weights, partial(_read_weights, resolved, lambda num_layers: None))
    return Loaded(
        resolved.config, runner.model, runner.spec, runner, sleeper, tokenizer, vision, eos_ids,
        default_params(generation if config.generation_config == "auto" else {}),
        built.num_blocks, built.cache_groups, built.memory, built.stall, built.pace,
        built.step_times, built.expert_stats, laps.seconds,
    )  # fmt: skip


def begin(resolved: ResolvedConfig, farm: CompileFarm, *, show_progress: bool) -> tqdm[Any]:
    """Let workers build, if there are any; returns a progress bar over layers."""
    if resolved.num_workers:
        # this process runs every bucket itself, so workers need not run them
        farm.build(resolved.spec.layout.buckets, resolved.num_workers, dry_run=True)
    else:
        farm.close()
    return progress.bar(
        total=resolved.model.config.num_layers, desc="loading weights", unit=" layers",
        leave=False, disable=not show_progress,
    )  # fmt: skip


def count_buckets(resolved: ResolvedConfig, bar: tqdm[Any]) -> None:
    """Go on with a progress bar over buckets."""
    layout = resolved.spec.layout
    bar.unit = " buckets"
    bar.reset(len(layout.buckets) if layout.pad else 0)


def _memory(resolved: ResolvedConfig) -> tuple[Region, Place]:
    """A region for weights, and what moves them there."""
    platform, offload = resolved.platform, resolved.spec.offload
    if offload is None:
        region = platform.region()
        return region, region.place
    split = platform.split_region()
    return split, Offloader(offload, split, platform.device)


def _load_weights(
    resolved: ResolvedConfig, place: Place, farm: CompileFarm, bar: tqdm[Any], laps: StartupTimer
) -> tuple[Params, Tokenizer | None]:
    """Placed weights and the tokenizer; waits for workers, if any."""
    tokenizer_of = partial(read_tokenizer_of, resolved.config, resolved.folder, resolved.store)
    with ThreadPoolExecutor(1) as reader:
        read = partial(reader.submit, tokenizer_of)
        # Imports hold the GIL, and reading weights does not. So the tokenizer is read in parallel
        # with the weights, unless threads hand out tasks at the same time.
        tokenizer = None if resolved.num_workers else read()
        params = _read_weights(resolved, bar.update, place)
        resolved.platform.synchronize()
        laps.end("weights")
        tokenizer = tokenizer or read()
        if resolved.num_workers:
            bar.set_description("compiling kernels")
            wait_for_workers(farm)
            laps.end("compile")
        found = tokenizer.result()
    laps.end("tokenizer")
    return params, found


def _read_weights(resolved: ResolvedConfig, progress: loader.Progress, place: Place) -> Params:
    """The checkpoint's weights or random ones: the same at every call."""
    platform, model = resolved.platform, resolved.model
    target = loader.Target(
        platform.device, place, platform.host_buffer, resolved.shard, platform.prefers_interleaved
    )
    seed = resolved.config.seed

    def read(one: Model, folder: Path, progress: loader.Progress) -> Params:
        if resolved.config.random_weights:
            return loader.random(one, target, seed, progress)
        return loader.load(one, folder, target, progress)

    params, draft = read(model, resolved.folder, progress), resolved.spec.draft
    if draft is not None and draft.model is not None and resolved.draft_folder is not None:
        second = read(draft.model, resolved.draft_folder, lambda num_layers: None)
        params = loader.with_second(params, draft.model, second)
    return with_towers(resolved, target, params)


def with_towers(resolved: ResolvedConfig, target: loader.Target, params: AnyParams) -> AnyParams:
    """The parameters with those of the model's towers: the checkpoint's, or random ones."""
    make: Callable[[AnyTower[Any]], Any]
    if resolved.config.random_weights:
        make = partial(weights.random, target=target, seed=resolved.config.seed)
    else:
        make = partial(weights.load, folder=resolved.folder, target=target)
    return weights.with_towers(params, resolved.model, make)


def wait_for_workers(farm: CompileFarm) -> None:
    """Wait until workers have filled the store and released their device memory."""
    try:
        farm.wait(lambda outcome: None, PATIENCE_S)
    except WorkerFailed as error:
        logger.warning("a worker failed, and this process compiles what is missing: %s", error)


def _programs(runner: Runner) -> str:
    compiler = runner.compiler
    if compiler.lowering is None:
        return "eager"
    num_programs = compiler.num_compiled + compiler.num_loaded
    return f"{num_programs} programs ({compiler.num_compiled} compiled)"
