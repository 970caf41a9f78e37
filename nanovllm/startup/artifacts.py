"""Ingredients that all keys share, and the marker of a full store."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.compile import keys
from nanovllm.compile.key import Key
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Artifact, num_kernels, seal_kernels
from nanovllm.models import dflash
from nanovllm.models import draft_head as head_model
from nanovllm.models import model as model_module
from nanovllm.models.model import Model
from nanovllm.platforms.base import Platform
from nanovllm.runner import (
    draft_block,
    draft_head,
    mm_embeds,
    pool_runner,
    state,
    step_regions,
    steps,
    tower,
    vocab_parallel,
)
from nanovllm.startup.determinism import engine_passes

if TYPE_CHECKING:
    from nanovllm.startup.resolve import ResolvedConfig

logger = logging.getLogger(__name__)

READY = "ready"  # the kind of the marker that a store has every bucket of a model and layout
SHARED_MODULES = (
    "config", "dense", "encoders", "group_router", "latent", "layer_state", "model", "moe",
    "pooling", "region_inputs",
)  # fmt: skip
STEP_MODULES = (
    vocab_parallel, mm_embeds, state, step_regions, steps, tower, draft_head, draft_block,
    pool_runner,
)  # fmt: skip
# The folders of models whose modules regions of several architectures may use.
SHARED_FOLDERS = ("audio", "formats", "experts", "vision")


def common_ingredients(
    platform: Platform, passes: Sequence[str], model: Model, draft: Model | None = None
) -> dict[str, str]:
    """Everything that can change a model's programs on this platform: sources, versions, device,
    passes. `draft` is a second model whose programs have the same ingredients.

    The sources of a model are the modules of its regions (`region_modules`), shared modules,
    formats, forms of experts, and towers.
    """
    models, engine = Path(model_module.__file__).parent, Path(steps.__file__).parent
    chosen_by = Path(sys.modules[type(platform).__module__].__file__ or "")
    stored = [path for folder in SHARED_FOLDERS for path in (models / folder).glob("*.py")]
    shared = [*(models / f"{name}.py" for name in SHARED_MODULES), *stored]
    both = (model,) if draft is None else (model, draft)
    regions = sorted({name for one in both for name in region_modules(one)})
    files = {name: Path(sys.modules[name].__file__ or "") for name in regions}
    return {
        **keys.own_sources(),
        "source models": keys.source_digest(shared, models),
        **{f"source {name}": keys.source_digest([at], at.parent) for name, at in files.items()},
        "source steps": keys.source_digest(
            [Path(module.__file__ or "") for module in STEP_MODULES], engine
        ),
        "source platform": keys.source_digest([chosen_by], chosen_by.parent),
        "passes": " ".join(passes),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        **{f"platform {name}": value for name, value in platform.fingerprint().items()},
    }


def region_modules(model: Model) -> set[str]:
    """The modules of a model's regions, and those of other architectures that they use: modules
    that they name and that have a `layer`, too."""
    found: set[str] = set()
    regions: list[Callable[..., Any] | None] = [
        model.embed,
        model.layer,
        model.head,
        model.layer_inputs,
    ]
    if isinstance(model, head_model.HeadModel):
        regions += [model.enter, model.again, model.store, head_model.store_context]
    if isinstance(model, dflash.BlockModel):
        regions += [model.context, model.store]
    waiting = [name for region in regions if region is not None for name in _modules_of(region)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            used = {_module_of(value) for value in vars(sys.modules[name]).values()}
            waiting += (
                one for one in used if one is not None and "layer" in vars(sys.modules[one])
            )
    return found


def _modules_of(region: Callable[..., Any]) -> list[str]:
    """The modules of a region, which may be a function that is bound to another region."""
    if not isinstance(region, partial):
        return [region.__module__]
    return [name for one in (region.func, *region.args) for name in _modules_of(one)]


def _module_of(value: object) -> str | None:
    """The module of models that a value is, or that a function is from."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    is_own = isinstance(name, str) and name.startswith("nanovllm.models.") and name in sys.modules
    return name if is_own else None


def _ready_key(resolved: ResolvedConfig) -> Key:
    """Everything on which the programs and kernels of all buckets depend."""
    platform, model = resolved.platform, resolved.model
    passes = [name for name, _ in engine_passes(resolved.config, platform)]
    reduced = model.reduced()
    shapes = [{name: param.shape for name, param in group.items()} for group in reduced.declared]
    num_groups = len(model.page_groups.groups)
    facts = [keys.describe(reduced), shapes, str(model.config.dtype), num_groups]
    if model.lora is not None:
        facts.append(list(model.lora))
    if model.pooler is not None:
        facts.append(keys.describe(model.pooler))
    described = json.dumps(facts)
    common = common_ingredients(platform, passes, model)
    towers = {
        name: json.dumps(
            [keys.describe(tower), str(tower.config), model_module.tower_shapes(tower)]
        )
        for name, tower in model.towers.items()
    }
    return Key(
        {
            **common,
            "model": described,
            **towers,
            "spec": str(resolved.spec),
            "scheme": repr(model.scheme),
        }
    )


def mark_ready(resolved: ResolvedConfig) -> None:
    """Record the digests of kernels, then mark the store as complete for all buckets."""
    folder = resolved.store.folder
    seal_kernels(folder)
    content = str(num_kernels(folder)).encode()
    resolved.store.save(_ready_key(resolved), Artifact(READY, READY, content, None, {}))


def is_ready(resolved: ResolvedConfig) -> bool:
    """Whether an earlier start has left this marker, and no kernel has been deleted since."""
    found = resolved.store.find(_ready_key(resolved))
    return found is not None and num_kernels(resolved.store.folder) >= int(found.content)


def finish(resolved: ResolvedConfig, made: Sequence[str]) -> None:
    """Record the digests of the kernels that warm-up has `made`, and mark the store as ready.

    `resolved` has max_model_len as the options have it, not as the cache's size lowered it: the
    next start's key has that value. Raises CompileRequired if a kernel was made in "require" mode.
    """
    folder = resolved.store.folder
    if resolved.config.compile_cache_mode == "require":
        if made:
            raise CompileRequired(
                f"compile_cache_mode is 'require', but {len(made)} kernel(s) were not in {folder} "
                f"and were compiled: {', '.join(sorted(set(made)))}"
            )
        return
    if made:
        seal_kernels(folder)
    if resolved.spec.layout.pad and not is_ready(resolved):
        mark_ready(resolved)
