"""Start-up of a model that pools: choose, load weights and tokenizer, run every bucket."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm import env, progress
from nanovllm.compile import buckets, keys
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import BUILDING
from nanovllm.models import loader
from nanovllm.models.pooling import PoolWeights
from nanovllm.pooling import runner as runner_module
from nanovllm.pooling.resolve import PoolingPlan, plan
from nanovllm.pooling.runner import BLOCK, PoolLayout, PoolRunner
from nanovllm.pooling_params import PoolingInfo
from nanovllm.startup.artifacts import finish
from nanovllm.startup.build import make_compiler
from nanovllm.startup.checkpoint_cache import read_tokenizer_of
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.resolve import ResolvedConfig, resolve
from nanovllm.startup.startup_timer import StartupTimer
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

MAX_ROWS = 256  # sequences of a step, unless the options have max_num_seqs
GROWTH = 2  # of adjacent buckets


@dataclass(frozen=True)
class LoadedPooling:
    """The parts of a warm engine that pools. `tokenizer` is None if the checkpoint has none."""

    config: EngineConfig
    runner: PoolRunner
    info: PoolingInfo
    tokenizer: Tokenizer | None
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
        resolved = resolve(config, farm, laps)
        farm.close()  # this process compiles alone
        chosen = plan(resolved)
        resolved = replace(resolved, model=chosen.model)
        bar = stack.enter_context(_bar(chosen.model.config.num_layers, show_progress))
        params = _read_weights(resolved, bar)
        laps.end("weights")
        tokenizer = read_tokenizer_of(config, resolved.folder, resolved.store)
        params = _with_labels(chosen, params, tokenizer, resolved)
        laps.end("tokenizer")
        stack.enter_context(env.folder_of_compilers(resolved.store.folder / "cpp", BUILDING))
        length = _longest(resolved)
        built = _build(resolved, params, length, bar)
        laps.end("pooling")
    seconds = sum(laps.seconds.values())
    logger.info(
        "%s on %s: %s of %d numbers, up to %d tokens a prompt, ready in %.1f s",
        chosen.model.config.architecture, resolved.platform.device, chosen.info.makes,
        chosen.info.size, length, seconds,
    )  # fmt: skip
    return LoadedPooling(config, built, chosen.info, tokenizer, length, laps.seconds)


def _bar(num_layers: int, show_progress: bool) -> tqdm[Any]:
    return progress.bar(
        total=num_layers, desc="loading weights", unit=" layers", leave=False,
        disable=not show_progress,
    )  # fmt: skip


def _read_weights(resolved: ResolvedConfig, bar: tqdm[Any]) -> PoolWeights:
    platform, model = resolved.platform, resolved.model
    target = loader.Target(platform.device, buffer=platform.host_buffer)
    if resolved.config.random_weights:
        params = loader.random(model, target, resolved.config.seed, bar.update)
    else:
        params = loader.load(model, resolved.folder, target, bar.update)
    platform.synchronize()
    assert isinstance(params, PoolWeights)
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


def _longest(resolved: ResolvedConfig) -> int:
    """The most tokens of a prompt: a step takes it as a whole."""
    config, folder = resolved.config, resolved.folder
    found = config.max_model_len or resolved.model.config.max_position
    from nanovllm.pooling.modules import read

    given = read(Path(folder))
    if given is not None and given.max_length is not None and config.max_model_len is None:
        found = min(found, given.max_length)
    return found


def _layout(resolved: ResolvedConfig, max_model_len: int) -> PoolLayout:
    config, traits = resolved.config, resolved.platform.traits
    longest = -(-max_model_len // BLOCK) * BLOCK
    asked = config.max_num_batched_tokens or traits.batched_tokens
    largest = max(longest, asked // BLOCK * BLOCK)
    ladder = buckets.prefill_ladder(largest, GROWTH)
    return PoolLayout(ladder, config.max_num_seqs or MAX_ROWS, not config.enforce_eager)


def _build(
    resolved: ResolvedConfig, params: PoolWeights, max_model_len: int, bar: tqdm[Any]
) -> PoolRunner:
    """A warm runner. Marks no store as complete: that is for the programs of text."""
    layout, platform = _layout(resolved, max_model_len), resolved.platform
    compiler = make_compiler(resolved)
    source = Path(runner_module.__file__)
    compiler.ingredients = {
        **compiler.ingredients, "source pooling": keys.source_digest([source], source.parent)
    }  # fmt: skip
    num_kernels = len(platform.kernels_compiled())
    made = PoolRunner(
        resolved.model, params, layout, platform, compiler, max_model_len=max_model_len,
        capture=resolved.config.tuned.capture,
    )  # fmt: skip
    bar.unit = " buckets"
    bar.reset(len(layout.tokens) if layout.pad else 0)

    def building(what: str) -> None:
        bar.set_description(f"building {what}")
        bar.update()

    made.warm_up(building)
    if not resolved.config.enforce_eager:
        spec = replace(resolved.spec, layout=replace(resolved.spec.layout, pad=False))
        finish(replace(resolved, spec=spec), platform.kernels_compiled()[num_kernels:])
    return made
