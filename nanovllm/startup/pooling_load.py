"""Start-up of a model that pools: choose, load weights and tokenizer, run every bucket."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import BUILDING
from nanovllm.kernels.collectives import Communicator
from nanovllm.media import settings
from nanovllm.media.settings import VisionSettings
from nanovllm.models import loader
from nanovllm.models.pooling import PoolWeights
from nanovllm.pooling_params import PoolingInfo
from nanovllm.runner.pool_runner import PoolRunner
from nanovllm.startup import ranks
from nanovllm.startup.artifacts import finish
from nanovllm.startup.build import make_compiler
from nanovllm.startup.checkpoint_cache import read_tokenizer_of
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.compile_workers import num_workers
from nanovllm.startup.load import begin, count_buckets, wait_for_workers, with_towers
from nanovllm.startup.pooling import with_names, with_pooling
from nanovllm.startup.pooling_modules import PoolingPlan
from nanovllm.startup.resolve import ResolvedConfig, resolve
from nanovllm.startup.startup_timer import StartupTimer
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedPooling:
    """The parts of a warm engine that pools. `tokenizer` and `vision` are None if the checkpoint
    has none."""

    config: EngineConfig
    runner: PoolRunner
    info: PoolingInfo
    tokenizer: Tokenizer | None
    vision: VisionSettings | None
    max_model_len: int
    seconds: dict[str, float]


def load(
    config: EngineConfig, farm: CompileFarm | None = None, *, show_progress: bool = True
) -> LoadedPooling:
    """Turn options into the parts of a warm engine; shows a progress bar over layers, then buckets.

    `farm` was started for the same options, and the caller closes it. Raises ValueError for options
    that the device or checkpoint does not support, CheckpointError, and CompileRequired.
    """
    laps = StartupTimer()
    with ExitStack() as stack:
        farm = farm or stack.enter_context(closing(CompileFarm(config)))
        resolved = with_pooling(resolve(config, farm, laps))
        resolved = replace(resolved, num_workers=num_workers(resolved))
        if resolved.shard.size == 1:
            return load_chosen(resolved, farm, laps, show_progress=show_progress)
        team = ranks.start(resolved)
        connect, make = team.connect, team.make_pool_runner
        try:
            return load_chosen(resolved, farm, laps, connect, make, show_progress=show_progress)
        except BaseException:
            team.close()
            raise


def load_chosen(
    resolved: ResolvedConfig,
    farm: CompileFarm,
    laps: StartupTimer,
    connect: Callable[[], Communicator | None] = lambda: None,
    make: Callable[..., PoolRunner] = PoolRunner,
    *,
    show_progress: bool = True,
) -> LoadedPooling:
    """The rest of `load`, for one rank: see `startup.load.load_chosen`."""
    config, chosen = resolved.config, resolved.pooling
    assert chosen is not None
    with ExitStack() as stack:
        bar = stack.enter_context(begin(resolved, farm, show_progress=show_progress))
        params = _read_weights(resolved, bar)
        laps.end("weights")
        tokenizer = read_tokenizer_of(config, resolved.folder, resolved.store)
        params = _with_labels(chosen, params, tokenizer, resolved)
        laps.end("tokenizer")
        if resolved.num_workers:
            bar.set_description("compiling kernels")
            wait_for_workers(farm)
            laps.end("compile")
        stack.enter_context(env.folder_of_compilers(resolved.store.folder / "cpp", BUILDING))
        runner = _build(resolved, params, bar, connect(), make)
        laps.end("pooling")
    seconds, length = sum(laps.seconds.values()), resolved.spec.layout.max_model_len
    logger.info(
        "%s on %s: %s of %d numbers, up to %d tokens a prompt, ready in %.1f s",
        resolved.model.config.architecture, resolved.platform.device, chosen.info.makes,
        chosen.info.size, length, seconds,
    )  # fmt: skip
    vision = None if runner.model.tower is None else settings.load(resolved.folder)
    return LoadedPooling(config, runner, chosen.info, tokenizer, vision, length, laps.seconds)


def _read_weights(resolved: ResolvedConfig, bar: tqdm[Any]) -> PoolWeights:
    platform, model = resolved.platform, resolved.model
    target = loader.Target(
        platform.device,
        buffer=platform.host_buffer,
        shard=resolved.shard,
        prefers_interleaved=platform.prefers_interleaved,
    )
    if resolved.config.random_weights:
        params = loader.random(model, target, resolved.config.seed, bar.update)
    else:
        named = with_names(model, resolved.folder)
        params = loader.load(named, resolved.folder, target, bar.update)
    assert isinstance(params, PoolWeights)
    params = with_towers(resolved, target, params)
    platform.synchronize()
    return params


def _with_labels(
    chosen: PoolingPlan, params: PoolWeights, tokenizer: Tokenizer | None, resolved: ResolvedConfig
) -> PoolWeights:
    """The weights with the ids of the tokens whose logits are the results. Raises ValueError for
    a text that is not one token."""
    if not chosen.labels:
        return params
    if tokenizer is None:
        raise ValueError(f"the labels {list(chosen.labels)} need a tokenizer, and there is none")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in chosen.labels]
    for text, found in zip(chosen.labels, ids):
        if len(found) != 1:
            raise ValueError(f"the label {text!r} is {len(found)} tokens: it must be one")
    label_C = resolved.platform.upload([found[0] for found in ids], torch.int64)
    return params._replace(outer=params.outer._replace(label_C=label_C))


def _build(
    resolved: ResolvedConfig,
    params: PoolWeights,
    bar: tqdm[Any],
    group: Communicator | None,
    make: Callable[..., PoolRunner],
) -> PoolRunner:
    """A warm runner. The first rank marks the store as ready."""
    platform = resolved.platform
    num_kernels = len(platform.kernels_compiled())
    compiler = make_compiler(resolved, group)
    runner = make(
        resolved.model, params, resolved.spec, platform, compiler,
        capture=resolved.config.tuned.capture, group=group,
    )  # fmt: skip
    count_buckets(resolved, bar)

    def building(what: str) -> None:
        bar.set_description(f"building {what}")
        bar.update()

    runner.warm_up(building)
    if not resolved.config.enforce_eager and resolved.shard.rank == 0:
        finish(resolved, platform.kernels_compiled()[num_kernels:])
    return runner
