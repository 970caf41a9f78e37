"""What the programs of replicas are told at their start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanovllm import env, hub
from nanovllm.config import EngineConfig
from nanovllm.startup.artifacts import open_store
from nanovllm.startup.load import read_tokenizer_of
from nanovllm.tokenizer import Tokenizer


def setup(
    config: EngineConfig,
    name: str,
    *,
    compile_cache: str | os.PathLike[str] | None,
    waits_for: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """What a replica's program is told, as JSON has it.

    name: the replica's name in errors and output. waits_for: the number of the replica that
    compiles for this one, if the store lacks programs; None: it compiles itself. environment:
    variables that it sets before it imports torch.
    """
    options = asdict(config) | {"compile_cache": compile_cache}
    for option in ("compile_cache", "tokenizer"):
        options[option] = options[option] and str(options[option])
    options |= {"data_parallel_size": 1, "distributed_executor_backend": "mp"}
    return {
        "options": options,
        "name": name,
        "waits_for": waits_for,
        "environment": dict(environment),
    }


def with_full_paths(config: EngineConfig) -> EngineConfig:
    """The same for a process in another folder: folders that exist here have their full paths."""
    found = {
        name: _full_path(given)
        for name in ("model", "tokenizer")
        if (given := getattr(config, name)) is not None
    }
    if config.compile_cache is not None:
        found["compile_cache"] = str(env.read().store_folder(config.compile_cache))
    return replace(config, **found)


def tokenizer(options: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that a replica with these options has."""
    config = EngineConfig(**options)
    folder = hub.resolve(config.model, weights=False, revision=config.revision)
    return read_tokenizer_of(config, folder, open_store(config))


def _full_path(given: str | os.PathLike[str]) -> str:
    path = Path(os.path.expanduser(given))
    return str(path.absolute()) if path.is_dir() else str(given)
