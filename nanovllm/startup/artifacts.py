"""The folder for compiled code, ingredients that all keys share, and the note of a full store."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanovllm import env
from nanovllm.compile import keys
from nanovllm.compile.keys import Key
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Artifact, Store, drop_damaged_kernels, num_kernels, seal_kernels
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import Shared, temporary_folder
from nanovllm.models import interface
from nanovllm.models.interface import Model
from nanovllm.platforms.base import Platform
from nanovllm.runner import columns, given, state, steps, tower

if TYPE_CHECKING:
    from nanovllm.startup.choose import Choice

logger = logging.getLogger(__name__)

READY = "ready"  # the kind of the note that a store has every bucket of a model and layout
# The folders of models whose modules regions of several architectures may use.
SHARED_FOLDERS = ("audio", "formats", "experts", "vision")


def open_store(config: EngineConfig, *, must_keep: bool = False) -> Store:
    """The store of `config`, with Triton's and Inductor's folders in it.

    If it cannot be made, a temporary store serves, or with `must_keep` OSError is raised. Raises
    ValueError for a folder that others own or may write to, and in "require" mode for one that is
    no store.
    """
    environment = env.read()
    folder = environment.store_folder(config.compile_cache)
    if config.compile_cache_mode == "require" and not (folder / "entries").is_dir():
        raise ValueError(
            f"compile_cache_mode is 'require', but {folder} is no store of compiled programs"
        )
    is_default = not config.compile_cache and environment.cache is None
    is_fallback = is_default and folder != env.home_cache()
    if is_fallback:
        message = (
            "compiled code is kept in %s, which the system may delete, because %s cannot be "
            "written (compile_cache or NANOVLLM_CACHE names another folder)"
        )
        logger.warning(message, folder, env.home_cache() or "the home folder")
    return use_private_cache(folder, must_keep=must_keep, may_be_taken=is_fallback)


def use_private_cache(
    folder: Path, *, must_keep: bool = False, may_be_taken: bool = False
) -> Store:
    """A store in a folder that only its owner can write, since its code is executed.

    Errors are those of `open_store`. With `may_be_taken`, a temporary store also serves if another
    user has made a folder of this name.
    """
    try:
        store = Store(folder)
    except (OSError, Shared) as error:
        if must_keep or (isinstance(error, Shared) and not may_be_taken):
            raise
        message = (
            "compiled code is not kept, and the next start compiles again: %s "
            "(compile_cache or NANOVLLM_CACHE names a folder that can be written)"
        )
        logger.warning(message, error)
        store = Store(temporary_folder())
    # Dynamo, when imported, writes torch's default, a folder in /tmp, into the environment
    torch_choice = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    default = torch_choice.default_cache_dir() if torch_choice else None
    env.set_default("TORCHINDUCTOR_CACHE_DIR", str(store.folder / "inductor"), also_over=default)
    env.set_default("TRITON_CACHE_DIR", str(store.folder / "triton"))
    # four files for a kernel, not eight: every start reads all of them
    env.set_default("TRITON_STORE_BINARY_ONLY", "1")
    drop_damaged_kernels(store.folder)
    return store


def common_ingredients(platform: Platform, passes: Sequence[str], model: Model) -> dict[str, str]:
    """All that can change a program of a model on this platform: sources, versions, device, passes.

    The sources of a model are the modules of its regions, what models have in common, formats,
    forms of experts, and towers.
    """
    models, engine = Path(interface.__file__).parent, Path(steps.__file__).parent
    chosen_by = Path(sys.modules[type(platform).__module__].__file__ or "")
    stored = [path for folder in SHARED_FOLDERS for path in (models / folder).glob("*.py")]
    shared = [*(models / f"{name}.py" for name in ("config", "interface", "dense")), *stored]
    regions = sorted({region.__module__ for region in (model.embed, model.layer, model.head)})
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
    passes = [name for name, _ in platform.passes(choice.config.fuse)]
    reduced = model.reduced()
    shapes = [{name: param.shape for name, param in group.items()} for group in reduced.declared]
    described = json.dumps([keys.describe(reduced), shapes, str(model.config.dtype)])
    common = common_ingredients(platform, passes, model)
    towers = {
        name: json.dumps([keys.describe(tower), str(tower.config), interface.tower_shapes(tower)])
        for name, tower in model.towers.items()
    }
    return Key({**common, "model": described, **towers, "spec": str(choice.spec)})


def mark_ready(choice: Choice) -> None:
    """Give kernels their digests, then note that the store has everything for all buckets."""
    folder = choice.store.folder
    seal_kernels(folder)
    content = str(num_kernels(folder)).encode()
    choice.store.save(_ready_key(choice), Artifact(READY, READY, content, None, {}))


def is_ready(choice: Choice) -> bool:
    """Whether an earlier start has left that note, and no kernel has been deleted since."""
    found = choice.store.find(_ready_key(choice))
    return found is not None and num_kernels(choice.store.folder) >= int(found.content)


def finish(choice: Choice, made: Sequence[str]) -> None:
    """Give the kernels that warm-up has `made` their digests, and mark the store as ready.

    `choice` has max_model_len as the options have it, not as the cache's size lowered it: the next
    start looks for that. Raises CompileRequired if a kernel was made in "require" mode.
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
