"""Replicas on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.replicas import child_config
from nanovllm.replicas.process_replica import ProcessReplica
from nanovllm.replicas.replica import Inbox
from nanovllm.startup.resolve import select_platform
from nanovllm.startup.store_folder import open_store
from nanovllm.tokenizer import Tokenizer


class ProcessStarter:
    """Starts each replica as a process with its share of this machine's devices or cores."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ValueError if there are more ranks than devices."""
        num, num_ranks = config.data_parallel_size, config.tensor_parallel_size
        platform = select_platform(config)
        limit = platform.traits.max_ranks
        if limit is not None and num * num_ranks > limit:
            raise ValueError(
                f"data_parallel_size is {num} and tensor_parallel_size {num_ranks}, but this "
                f"machine has {limit} {platform.traits.name} device(s) for them"
            )
        self._config = config
        own, store = env.for_children(), open_store(config).folder
        self._setups = [
            child_config.setup(
                config,
                f"replica {index}",
                compile_cache=store,
                waits_for=0 if index > 0 else None,
                environment=platform.part_environment(index, num, num_ranks, own),
            )
            for index in range(num)
        ]

    def start(
        self, index: int, inbox: Inbox, clients: Sequence[int] = (), *, again: bool = False
    ) -> ProcessReplica:
        setup = {**self._setups[index], "waits_for": None} if again else self._setups[index]
        return ProcessReplica(index, setup, inbox, clients)

    def tokenizer(self) -> Tokenizer | None:
        return child_config.tokenizer(self._config)

    def close(self) -> None:
        """Nothing to do: the replicas share nothing."""
