"""Builds a warm runner from weights: compiler, cache, the programs of every bucket, stall bound."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm import env
from nanovllm.compile import buckets
from nanovllm.compile.program import Compiler
from nanovllm.kernels.collectives import Communicator
from nanovllm.models.model import VARYING, Params
from nanovllm.platforms.base import MemoryBudget
from nanovllm.runner.expert_stats import ExpertStats
from nanovllm.runner.no_grad import without_grad
from nanovllm.runner.runner import Runner
from nanovllm.runner.step_regions import FROZEN
from nanovllm.runner.warmup import (
    measure_bus,
    measure_pace,
    measure_prefill_latency_bound,
    measure_step_times,
)
from nanovllm.schedule.cache_groups import CacheGroups
from nanovllm.schedule.draft_length import StepTimes
from nanovllm.schedule.pace import DecodePace
from nanovllm.schedule.prefill_latency_bound import PrefillLatencyBound
from nanovllm.startup.artifacts import common_ingredients, finish
from nanovllm.startup.determinism import engine_lowering, engine_passes
from nanovllm.startup.memory import MemoryReport
from nanovllm.startup.resolve import ResolvedConfig
from nanovllm.startup.startup_timer import StartupTimer

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    runner: Runner
    num_blocks: int
    cache_groups: CacheGroups
    memory: MemoryReport
    stall: PrefillLatencyBound | None
    pace: DecodePace
    step_times: StepTimes | None
    expert_stats: ExpertStats | None


@without_grad
def build(
    resolved: ResolvedConfig,
    params: Params,
    bar: tqdm[Any],
    laps: StartupTimer,
    group: Communicator | None = None,
    make: Callable[..., Runner] = Runner,
) -> Built:
    """Size the cache, run every bucket, time prefill, and mark the store as complete.

    All ranks of `group` build at the same time. `make` makes the runner.

    Raises ValueError for a cache that does not fit, and CompileRequired.
    """
    config, platform, stage = resolved.config, resolved.platform, "cache"
    num_kernels = len(platform.kernels_compiled())
    bar.set_description("sizing the cache")

    def new_runner(chosen: ResolvedConfig) -> Runner:
        compiler = make_compiler(chosen, group)
        capture = config.tuned.capture and not config.enforce_eager
        parts = (chosen.model, params, chosen.spec, platform, compiler)
        return make(*parts, capture=capture, group=group)

    def building(what: str) -> None:
        nonlocal stage
        laps.end(stage)
        stage = what.partition(" ")[0]
        bar.set_description(f"building {what}")
        bar.update()

    runner, num_blocks, budget = with_cache(resolved, new_runner)
    runner.warm_up(building)
    laps.end(stage)
    stall = _stall_bound(resolved, runner)
    pace, step_times = measure_pace(runner), measure_step_times(runner)
    laps.end("stall")
    expert_stats = _expert_stats(runner)
    if not config.enforce_eager and resolved.shard.rank == 0:
        finish(resolved, platform.kernels_compiled()[num_kernels:])
        laps.end("seal")
    groups = cache_groups(runner)
    memory = MemoryReport(
        weights_bytes=runner.weights_bytes,
        cache_bytes=num_blocks * runner.block_bytes,
        cache_tokens=(num_blocks - 1) * groups.block_size // len(groups.windows),
        graphs_bytes=runner.graphs_bytes,
        host_bytes=runner.host_bytes,
        budget=budget,
        limited=budget is not None and num_blocks < budget.cache_bytes // runner.block_bytes,
    )
    logger.info("%s", memory)
    return Built(runner, num_blocks, groups, memory, stall, pace, step_times, expert_stats)


def _stall_bound(resolved: ResolvedConfig, runner: Runner) -> PrefillLatencyBound | None:
    """The bound of the options, or the device's default; None if that is infinite."""
    asked_ms = resolved.config.max_stall_ms
    max_ms = resolved.platform.traits.max_stall_ms if asked_ms is None else asked_ms
    if not math.isfinite(max_ms):
        return None
    bound = measure_prefill_latency_bound(runner, max_ms)
    return bound.in_proportion() if asked_ms is None else bound


def _expert_stats(runner: Runner) -> ExpertStats | None:
    """Counts from now on, if experts are in host memory."""
    if not runner.offloaded:
        return None
    rate, expert_bytes = measure_bus(runner), runner.offloaded[0].expert_bytes
    return ExpertStats(runner.expert_counts, expert_bytes, rate)


def make_compiler(resolved: ResolvedConfig, group: Communicator | None = None) -> Compiler:
    """A new compiler, for one rank of `group`.

    In eager mode, or if graphs are impossible, it runs regions as Python.
    """
    config, platform, environment = resolved.config, resolved.platform, env.read()
    lowering = engine_lowering(config, platform)
    passes = engine_passes(config, platform) if lowering is not None else ()
    names, draft = [name for name, _ in passes], resolved.spec.draft
    draft_model = None if draft is None else draft.model
    return Compiler(
        lowering,
        passes=passes,
        dump_dir=environment.dump_graphs,
        varying=() if platform.traits.whole_steps else VARYING,
        frozen=FROZEN,
        strict=environment.strict,
        store=None if config.enforce_eager else resolved.store,
        ingredients=common_ingredients(platform, names, resolved.model, draft_model),
        require=config.compile_cache_mode == "require",
        agree=None if group is None else group.min_int,
        is_first=resolved.shard.rank == 0,
    )


def with_cache(
    resolved: ResolvedConfig, new_runner: Callable[[ResolvedConfig], Runner]
) -> tuple[Runner, int, MemoryBudget | None]:
    """A runner with its cache, the number of blocks, and the budget if it decided that number.

    Lowers max_model_len to what the cache holds if the options leave it open, and raises ValueError
    if they do not.
    """
    config, layout = resolved.config, resolved.spec.layout
    runner = new_runner(resolved)
    num_blocks, budget = _num_blocks(resolved, runner)
    num_blocks = runner.smallest(num_blocks)
    least = 1 + len(runner.model.page_groups.groups)
    if num_blocks < least:
        raise ValueError(
            f"there is memory for {num_blocks} cache block(s) of {layout.block_size} tokens "
            f"({runner.block_bytes / 2**20:.1f} MiB each), but at least {least} are needed: raise "
            f"gpu_memory_utilization ({config.gpu_memory_utilization}), or lower "
            f"kvcache_block_size ({layout.block_size}) or "
            f"max_num_batched_tokens ({layout.prefill_tokens[-1]})"
        )
    capacity = cache_groups(runner).longest(num_blocks - 1, layout.max_model_len)
    if capacity < layout.max_model_len:
        if config.max_model_len is not None:
            raise ValueError(
                f"max_model_len is {config.max_model_len}, but the cache holds {capacity} tokens "
                f"({num_blocks - 1} blocks of {layout.block_size}): lower max_model_len or raise "
                "num_kvcache_blocks"
            )
        message = "max_model_len is lowered from %d to %d, the tokens that the cache holds"
        logger.warning(message, layout.max_model_len, capacity)
        block_bytes = runner.block_bytes
        runner = new_runner(resolved.shortened(capacity))  # other sizes mean other programs
        # shorter than its window a sequence fills the same blocks as without: fewer, larger groups
        num_blocks = num_blocks * block_bytes // runner.block_bytes
    runner.allocate_cache(num_blocks)
    return runner, num_blocks, budget


def cache_groups(runner: Runner) -> CacheGroups:
    """The block tables of a row."""
    layout, windows = runner.layout, runner.model.page_groups.windows
    return CacheGroups(windows, layout.block_size, layout.prefill_tokens[-1])


def _num_blocks(resolved: ResolvedConfig, runner: Runner) -> tuple[int, MemoryBudget | None]:
    """The requested blocks, or as many as fit and can be used; and the budget if it was measured.

    Raises ValueError if the requested blocks do not fit.
    """
    config, platform, layout = resolved.config, resolved.platform, resolved.spec.layout
    if config.num_kvcache_blocks is not None:
        num_blocks, limit_bytes = config.num_kvcache_blocks, platform.cache_limit_bytes()
        wanted_bytes = num_blocks * runner.block_bytes
        if wanted_bytes > limit_bytes:
            raise ValueError(
                f"num_kvcache_blocks is {num_blocks}, which takes {wanted_bytes / 2**30:.2f} GiB, "
                f"but {platform.device} has {limit_bytes / 2**30:.2f} GiB for it: at most "
                f"{limit_bytes // runner.block_bytes} blocks of {layout.block_size} tokens fit"
            )
        return num_blocks, None
    if platform.traits.cache_blocks is not None:
        allowed_bytes = platform.memory_budget(config.gpu_memory_utilization).cache_bytes
        allowed_bytes -= runner.snapshot_bytes
        return min(platform.traits.cache_blocks, allowed_bytes // runner.block_bytes), None
    budget = runner.measure_budget(config.gpu_memory_utilization)
    most_useful = 1 + cache_groups(runner).most_useful(layout.max_num_seqs, layout.max_model_len)
    num_blocks = min(most_useful, budget.cache_bytes // runner.block_bytes)
    return buckets.coarse(num_blocks) if platform.traits.whole_steps else num_blocks, budget
