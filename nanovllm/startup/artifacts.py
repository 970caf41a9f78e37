"""Ingredients that all keys share, and the marker of a full store."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanovllm.compile import keys
from nanovllm.compile.key import Key
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Artifact, num_kernels, seal_kernels
from nanovllm.models import interface
from nanovllm.models.interface import Model
from nanovllm.platforms.base import Platform
from nanovllm.runner import columns, given, state, steps, tower

if TYPE_CHECKING:
    from nanovllm.startup.choose import Choice

logger = logging.getLogger(__name__)

READY = "ready"  # the kind of the marker that a store has every bucket of a model and layout
SHARED_MODULES = ("config", "dense", "interface", "layer_state")
# The folders of models whose modules regions of several architectures may use.
SHARED_FOLDERS = ("audio", "formats", "experts", "vision")


def common_ingredients(
    platform: Platform, passes: Sequence[str], model: Model, draft: Model | None = None
) -> dict[str, str]:
    """Everything that can change a model's programs on this platform: sources, versions, device,
    passes. `draft` is a second model whose programs have the same ingredients.

    The sources of a model are the modules of its regions, shared modules, formats, forms of
    experts, and towers.
    """
    models, engine = Path(interface.__file__).parent, Path(steps.__file__).parent
    chosen_by = Path(sys.modules[type(platform).__module__].__file__ or "")
    stored = [path for folder in SHARED_FOLDERS for path in (models / folder).glob("*.py")]
    shared = [*(models / f"{name}.py" for name in SHARED_MODULES), *stored]
    both = (model,) if draft is None else (model, draft)
    regions = sorted({r.__module__ for one in both for r in (one.embed, one.layer, one.head)})
    files = {name: Path(sys.modules[name].__file__ or "") for name in regions}
    return {
        **keys.own_sources(),
        "source models": keys.source_digest(shared, models),
        **{f"source {name}": keys.source_digest([at], at.parent) for name, at in files.items()},
        "source steps": keys.source_digest(
            [Path(module.__file__ or "") for module in (columns, given, state, steps, tower)],
            engine,
        ),
        "source platform": keys.source_digest([chosen_by], chosen_by.parent),
        "passes": " ".join(passes),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        **{f"platform {name}": value for name, value in platform.fingerprint().items()},
    }


def _ready_key(choice: Choice) -> Key:
    """Everything on which the programs and kernels of all buckets depend."""
    platform, model = choice.platform, choice.model
    passes = [name for name, _ in platform.passes(choice.config.tuned.fuse)]
    reduced = model.reduced()
    shapes = [{name: param.shape for name, param in group.items()} for group in reduced.declared]
    num_groups = len(model.page_groups.groups)
    facts = [keys.describe(reduced), shapes, str(model.config.dtype), num_groups]
    described = json.dumps(facts)
    common = common_ingredients(platform, passes, model)
    towers = {
        name: json.dumps([keys.describe(tower), str(tower.config), interface.tower_shapes(tower)])
        for name, tower in model.towers.items()
    }
    return Key(
        {
            **common,
            "model": described,
            **towers,
            "spec": str(choice.spec),
            "scheme": repr(model.scheme),
        }
    )


def mark_ready(choice: Choice) -> None:
    """Record the digests of kernels, then mark the store as complete for all buckets."""
    folder = choice.store.folder
    seal_kernels(folder)
    content = str(num_kernels(folder)).encode()
    choice.store.save(_ready_key(choice), Artifact(READY, READY, content, None, {}))


def is_ready(choice: Choice) -> bool:
    """Whether an earlier start has left this marker, and no kernel has been deleted since."""
    found = choice.store.find(_ready_key(choice))
    return found is not None and num_kernels(choice.store.folder) >= int(found.content)


def finish(choice: Choice, made: Sequence[str]) -> None:
    """Record the digests of the kernels that warm-up has `made`, and mark the store as ready.

    `choice` has max_model_len as the options have it, not as the cache's size lowered it: the next
    start's key has that value. Raises CompileRequired if a kernel was made in "require" mode.
    """
    folder = choice.store.folder
    if choice.config.compile_cache_mode == "require":
        if made:
            raise CompileRequired(
                f"compile_cache_mode is 'require', but {len(made)} kernel(s) were not in {folder} "
                f"and were compiled: {', '.join(sorted(set(made)))}"
            )
        return
    if made:
        seal_kernels(folder)
    if choice.spec.layout.pad and not is_ready(choice):
        mark_ready(choice)
