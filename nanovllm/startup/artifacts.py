"""Where an engine keeps what it compiles, and what the keys of its programs have in common."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nanovllm import env
from nanovllm.compile import keys
from nanovllm.compile.keys import Key
from nanovllm.compile.program import CompileRequired
from nanovllm.compile.store import Artifact, Store, drop_damaged_kernels, num_kernels, seal_kernels
from nanovllm.config import EngineConfig
from nanovllm.models import interface
from nanovllm.models.interface import Model
from nanovllm.platforms.base import Platform
from nanovllm.runner import state, steps
from nanovllm.runner.spec import EngineSpec
from nanovllm.startup.compile_farm import processes

logger = logging.getLogger(__name__)

READY = "ready"  # the kind of the note that every bucket of a model and layout is there


def open_store(
    config: EngineConfig, environment: env.Environment, *, must_keep: bool = False
) -> Store:
    """The store of `config`, and Triton's and Inductor's folders in it. Where none can be made a temporary one serves,
    unless it `must_keep` what it gets: then OSError is raised.

    Raises ValueError for a folder that others own or may write to, and in "require" mode for one that is not there.
    """
    folder = processes.store_folder(config, environment)
    if config.compile_cache_mode == "require" and not (folder / "entries").is_dir():
        raise ValueError(
            f"compile_cache_mode is 'require', but {folder} is no store of compiled programs"
        )
    return use_private_cache(folder, must_keep=must_keep)


def use_private_cache(folder: Path, *, must_keep: bool = False) -> Store:
    """Compiled code goes into a folder that only its owner can write: others could make us run theirs.

    Raises ValueError for a folder that others own or may write to. Where none can be made, a temporary one serves.
    """
    try:
        store = Store(folder)
    except OSError as error:
        if must_keep:
            raise
        logger.warning(
            "compiled code is not kept: %s (compile_cache or NANOVLLM_CACHE names the folder)",
            error,
        )
        store = Store(Path(tempfile.mkdtemp(prefix="nanovllm-")))
    # importing Dynamo anywhere writes torch's own choice, a folder in /tmp, into the environment
    torch_choice = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    env.set_default(
        "TORCHINDUCTOR_CACHE_DIR",
        str(store.folder / "inductor"),
        also_over=torch_choice.default_cache_dir() if torch_choice else None,
    )
    env.set_default("TRITON_CACHE_DIR", str(store.folder / "triton"))
    env.set_default(
        "TRITON_STORE_BINARY_ONLY", "1"
    )  # every start reads all files of a kernel, so four and not eight
    drop_damaged_kernels(store.folder)
    return store


def common_ingredients(platform: Platform, passes: Sequence[str], model: Model) -> dict[str, str]:
    """What can change any program of a model on this platform: sources, versions, device and passes.

    The sources of a model are the modules of its regions, what models have in common, and formats.
    """
    models, engine = Path(interface.__file__).parent, Path(steps.__file__).parent
    chosen_by = Path(sys.modules[type(platform).__module__].__file__ or "")
    shared = [models / "config.py", models / "interface.py", *(models / "formats").glob("*.py")]
    regions = sorted({region.__module__ for region in (model.embed, model.layer, model.head)})
    files = {name: Path(sys.modules[name].__file__ or "") for name in regions}
    return {
        **keys.own_sources(),
        "source models": keys.source_digest(shared, models),
        **{f"source {name}": keys.source_digest([at], at.parent) for name, at in files.items()},
        "source steps": keys.source_digest([Path(steps.__file__), Path(state.__file__)], engine),
        "source platform": keys.source_digest([chosen_by], chosen_by.parent),
        "passes": " ".join(passes),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        **{f"platform {name}": value for name, value in platform.fingerprint().items()},
    }


def _ready_key(platform: Platform, config: EngineConfig, model: Model, spec: EngineSpec) -> Key:
    """Everything on which the programs and kernels of all buckets depend."""
    passes = [name for name, _ in platform.passes(config.fuse)]
    reduced = model.reduced()
    shapes = [{name: param.shape for name, param in group.items()} for group in reduced.declared]
    described = json.dumps([keys.describe(reduced), shapes, str(model.config.dtype)])
    common = common_ingredients(platform, passes, model)
    return Key({**common, "model": described, "spec": str(spec)})


def mark_ready(
    store: Store, platform: Platform, config: EngineConfig, model: Model, spec: EngineSpec
) -> None:
    """Note that all buckets' programs and kernels are there, after their kernels have got their digests."""
    seal_kernels(store.folder)
    content = str(num_kernels(store.folder)).encode()
    store.save(_ready_key(platform, config, model, spec), Artifact(READY, READY, content, None, {}))


def is_ready(
    store: Store, platform: Platform, config: EngineConfig, model: Model, spec: EngineSpec
) -> bool:
    """Whether an earlier start has left everything, and as many kernels as then are still there."""
    found = store.find(_ready_key(platform, config, model, spec))
    return found is not None and num_kernels(store.folder) >= int(found.content)


def finish(
    store: Store,
    platform: Platform,
    config: EngineConfig,
    model: Model,
    spec: EngineSpec,
    made: Sequence[str],
) -> None:
    """Warm-up is over: the kernels that it `made` get their digests; in "require" mode there must be none."""
    if config.compile_cache_mode == "require":
        if made:
            raise CompileRequired(
                f"compile_cache_mode is 'require', but {len(made)} kernel(s) were not in {store.folder} and were "
                f"compiled: {', '.join(sorted(set(made)))}"
            )
        return
    if made:
        seal_kernels(store.folder)
    if spec.layout.pad and not is_ready(store, platform, config, model, spec):
        mark_ready(store, platform, config, model, spec)
