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
from nanovllm.models.interface import Model, Params
from nanovllm.models.vision import weights
from nanovllm.platforms.regions import Place, Region
from nanovllm.runner.expert_stats import ExpertStats
from nanovllm.runner.runner import Runner
from nanovllm.runner.sleep import Sleeper
from nanovllm.runner.spec import EngineSpec
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.pace import DecodePace
from nanovllm.schedule.stall import StallBound
from nanovllm.startup import ranks
from nanovllm.startup.build import build
from nanovllm.startup.checkpoint_cache import read_tokenizer_of
from nanovllm.startup.choose import Choice, choose
from nanovllm.startup.compile_farm.farm import CompileFarm, WorkerFailed
from nanovllm.startup.compile_workers import num_workers
from nanovllm.startup.draft import Draft, with_draft
from nanovllm.startup.generation_config import default_params, generation_config
from nanovllm.startup.laps import Laps
from nanovllm.startup.memory import MemoryReport
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
    `Laps`."""

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
    stall: StallBound | None
    pace: DecodePace
    expert_stats: ExpertStats | None
    seconds: dict[str, float]


def load(
    config: EngineConfig,
    farm: CompileFarm | None = None,
    *,
    show_progress: bool = True,
    draft: Draft | None = None,
) -> Loaded:
    """Turn options into the parts of a warm engine; shows a progress bar over layers, then buckets.

    `farm` was started for the same options, and the caller closes it. `draft` proposes tokens on
    the device. Raises ValueError for options that the device or checkpoint does not support,
    CheckpointError, and CompileRequired.
    """
    if option := config.replicas_option:
        raise ValueError(f"{option} is for LLM and LLMEngine, which run engines elsewhere")
    laps = Laps()
    with ExitStack() as stack:
        farm = farm or stack.enter_context(closing(CompileFarm(config)))
        choice = choose(config, farm, laps)
        if draft is not None:
            choice = with_draft(choice, draft)
        choice = replace(choice, num_workers=num_workers(choice))
        if choice.shard.size == 1:
            return load_chosen(choice, farm, laps, show_progress=show_progress)
        team = ranks.start(choice)
        try:
            return load_chosen(
                choice, farm, laps, team.connect, team.make_runner, show_progress=show_progress
            )
        except BaseException:
            team.close()
            raise


def load_chosen(
    choice: Choice,
    farm: CompileFarm,
    laps: Laps,
    connect: Callable[[], Communicator | None] = lambda: None,
    make: Callable[..., Runner] = Runner,
    *,
    show_progress: bool = True,
) -> Loaded:
    """The rest of `load`, for one rank: `connect` waits for the others and returns their group,
    None on one rank. `make` makes the runner."""
    config = choice.config
    with ExitStack() as stack:
        if choice.num_workers:
            # this process runs every bucket itself, so workers need not run them
            farm.build(choice.spec.layout.buckets, choice.num_workers, dry_run=True)
        else:
            farm.close()
        bar = progress.bar(
            total=choice.model.config.num_layers, desc="loading weights", unit=" layers",
            leave=False, disable=not show_progress,
        )  # fmt: skip
        stack.enter_context(bar)
        weights, place = _memory(choice)
        params, tokenizer = _load_weights(choice, place, farm, bar, laps)
        bar.unit = " buckets"
        bar.reset(len(choice.spec.layout.buckets) if choice.spec.layout.pad else 0)
        stack.enter_context(env.folder_of_compilers(choice.store.folder / "cpp", BUILDING))
        built = build(choice, params, bar, laps, connect(), make)
    if choice.spec.offload is not None:
        logger.info("experts: %s", choice.spec.offload)
    num_bytes = choice.model.param_bytes
    cfg, runner, seconds = choice.model.config, built.runner, sum(laps.seconds.values())
    logger.info("attention: %s", choice.spec.attention.describe())
    logger.info(
        "%s on %s in %s: %d layers, %d cache blocks of %d tokens, %s, ready in %.1f s (weights "
        "%.1f s, %.1f GB/s)",
        cfg.architecture, choice.platform.device, str(cfg.dtype).removeprefix("torch."),
        cfg.num_layers, built.num_blocks, runner.layout.block_size, _programs(runner), seconds,
        laps.seconds["weights"], num_bytes / 1e9 / laps.seconds["weights"],
    )  # fmt: skip
    generation = generation_config(choice.folder)
    eos_ids = choice.eos_ids
    if tokenizer is not None and tokenizer.eos_id is not None and not generation:
        eos_ids |= {tokenizer.eos_id}
    vision = None if runner.model.tower is None else settings.load(choice.folder)
    sleeper = Sleeper(
        weights, runner.cache_region, partial(_read_weights, choice, lambda num_layers: None)
    )
    return Loaded(
        choice.config, runner.model, runner.spec, runner, sleeper, tokenizer, vision, eos_ids,
        default_params(generation if config.generation_config == "auto" else {}),
        built.num_blocks, built.cache_groups, built.memory, built.stall, built.pace,
        built.expert_stats, laps.seconds,
    )  # fmt: skip


def _memory(choice: Choice) -> tuple[Region, Place]:
    """A region for weights, and what moves them there."""
    platform, offload = choice.platform, choice.spec.offload
    if offload is None:
        region = platform.region()
        return region, region.place
    split = platform.split_region()
    return split, Offloader(offload, split, platform.device)


def _load_weights(
    choice: Choice, place: Place, farm: CompileFarm, bar: tqdm[Any], laps: Laps
) -> tuple[Params, Tokenizer | None]:
    """Placed weights and the tokenizer; waits for workers, if any."""
    tokenizer_of = partial(read_tokenizer_of, choice.config, choice.folder, choice.store)
    with ThreadPoolExecutor(1) as reader:
        read = partial(reader.submit, tokenizer_of)
        # Imports hold the GIL, and reading weights does not. So the tokenizer is read in parallel
        # with the weights, unless threads hand out tasks at the same time.
        tokenizer = None if choice.num_workers else read()
        params = _read_weights(choice, bar.update, place)
        choice.platform.synchronize()
        laps.end("weights")
        tokenizer = tokenizer or read()
        if choice.num_workers:
            bar.set_description("compiling kernels")
            _wait(farm)
            laps.end("compile")
        found = tokenizer.result()
    laps.end("tokenizer")
    return params, found


def _read_weights(choice: Choice, progress: loader.Progress, place: Place) -> Params:
    """The checkpoint's weights or random ones: the same at every call."""
    platform, model = choice.platform, choice.model
    target = loader.Target(platform.device, place, platform.host_buffer, choice.shard)
    seed = choice.config.seed

    def read(one: Model, folder: Path, progress: loader.Progress) -> Params:
        if choice.config.random_weights:
            return loader.random(one, target, seed, progress)
        return loader.load(one, folder, target, progress)

    params, draft = read(model, choice.folder, progress), choice.spec.draft
    if draft is not None and draft.model is not None and choice.draft_folder is not None:
        second = read(draft.model, choice.draft_folder, lambda num_layers: None)
        params = params._replace(draft=second)
    if choice.config.random_weights:
        make = partial(weights.random, target=target, seed=seed)
    else:
        make = partial(weights.load, folder=choice.folder, target=target)
    return weights.with_towers(params, model, make)


def _wait(farm: CompileFarm) -> None:
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
