"""What the processes of replicas are told at their start."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanovllm import env, hub
from nanovllm.config import EngineConfig
from nanovllm.startup.artifacts import open_store
from nanovllm.startup.choose import select_platform
from nanovllm.startup.load import read_tokenizer_of
from nanovllm.tokenizer import Tokenizer


def setups(config: EngineConfig) -> list[dict[str, Any]]:
    """What each replica's process is told. Raises ValueError for more replicas than devices."""
    num, num_ranks = config.data_parallel_size, config.tensor_parallel_size
    platform = select_platform(config)
    limit = platform.traits.max_ranks
    if limit is not None and num * num_ranks > limit:
        raise ValueError(
            f"data_parallel_size is {num} and tensor_parallel_size {num_ranks}, but this machine "
            f"has {limit} {platform.traits.name} device(s) for them"
        )
    options = asdict(config)
    for name in ("compile_cache", "tokenizer"):
        options[name] = options[name] and str(options[name])
    options |= {"data_parallel_size": 1, "compile_cache": str(open_store(config).folder)}
    own = env.for_children()
    return [
        {
            "options": options,
            "is_first": index == 0,
            "environment": platform.part_environment(index, num, num_ranks, own),
        }
        for index in range(num)
    ]


def tokenizer(options: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that a replica with these options has."""
    config = EngineConfig(**options)
    folder = hub.resolve(config.model, weights=not config.random_weights, revision=config.revision)
    return read_tokenizer_of(config, folder, open_store(config))
