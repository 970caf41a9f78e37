"""The arguments of replica programs. Importing this module does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm import env, hub
from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.startup.checkpoint_cache import read_tokenizer_of
from nanovllm.startup.store_folder import open_store
from nanovllm.tokenizer import Tokenizer


def setup(
    config: EngineConfig,
    name: str,
    *,
    compile_cache: str | os.PathLike[str] | None,
    waits_for: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """The arguments of a replica's program, as JSON values.

    name: the replica's name in errors and output. waits_for: the index of the replica that compiles
    for this one if the store lacks programs; None: this one compiles. environment: variables to set
    before it imports torch.
    """
    alone = replace(
        config, compile_cache=compile_cache, data_parallel_size=1, distributed_executor_backend="mp"
    )
    return {
        "options": to_options(alone),
        "name": name,
        "waits_for": waits_for,
        "environment": dict(environment),
    }


def with_full_paths(config: EngineConfig) -> EngineConfig:
    """The config for a process in another folder: existing local paths become absolute."""
    store = config.compile_cache and env.read().store_folder(config.compile_cache)
    tokenizer = config.tokenizer and _full_path(config.tokenizer)
    return replace(
        config, model=_full_path(config.model), tokenizer=tokenizer, compile_cache=store,
        chat_template=config.template,
    )  # fmt: skip


def tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The replicas' tokenizer. Needs only the small files of a checkpoint."""
    folder = hub.resolve(config.model, weights=False, revision=config.revision)
    return read_tokenizer_of(config, folder, open_store(config, has_kernels=False))


def _full_path(given: str | os.PathLike[str]) -> str:
    path = Path(os.path.expanduser(given))
    return str(path.absolute()) if hub.is_local(path) else str(given)
