"""Starts the other ranks of an engine, and is the program of each of them (`python -m`)."""

from __future__ import annotations

import gc
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import env, hub, log
from nanovllm.checks import to_options
from nanovllm.parallel.serve import Connection, connect, serve

if TYPE_CHECKING:
    from nanovllm.parallel.group import Group
    from nanovllm.parallel.ranks import Ranks
    from nanovllm.runner.runner import Runner
    from nanovllm.startup.choose import Choice

logger = logging.getLogger(__name__)


class Team:
    """The first rank's handle of the other ranks. Make it with `start`."""

    def __init__(self, choice: Choice, ranks: Ranks) -> None:
        self._size, self._platform = choice.shard.size, choice.platform
        self.ranks = ranks
        self._group: Group | None = None

    def connect(self) -> Group:
        """The group of all ranks, once all of them have read their weights."""
        from nanovllm.parallel.group import Group

        ranks = self.ranks
        group = Group(
            0,
            self._size,
            self._platform.device,
            ranks.folder,
            ranks.check,
            self._platform.connect_peers,
        )
        self._group = group
        ranks.call_on_failure(lambda error: group.abort())
        return group

    def make_runner(self, *args: Any, **kwargs: Any) -> Runner:
        from nanovllm.runner.mirrored import MirroredRunner

        return MirroredRunner(*args, followers=self, **kwargs)

    def close(self) -> None:
        """End the other ranks and their processes."""
        self.ranks.close()
        if self._group is not None:
            self._group.close()


def start(choice: Choice) -> Team:
    """Start the other ranks, which then read their parts of the weights.

    Raises ValueError for more ranks than devices. `Team.connect` raises RankFailed, also for a rank
    that finds another checkpoint.
    """
    from nanovllm.parallel.ranks import Ranks

    config, size, traits = choice.config, choice.shard.size, choice.platform.traits
    if traits.max_ranks is not None and size > traits.max_ranks:
        raise ValueError(
            f"tensor_parallel_size is {size}, but this machine has {traits.max_ranks} "
            f"{traits.name} device(s) for it"
        )
    setup = {
        "options": to_options(config),
        "checkpoint": checkpoint_digest(choice.folder),
        "environments": [
            choice.platform.rank_environment(rank, env.for_children()) for rank in range(size)
        ],
    }
    choice.platform.share_cores(size)
    return Team(choice, Ranks.start(setup, size, __name__))


def checkpoint_digest(folder: Path) -> str:
    """A digest of config.json, and of the names and sizes of the files with weights."""
    total = sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    return total.hexdigest()


def main() -> None:
    """A rank's process."""
    connection = connect(sys.argv[1:])
    setup = connection.setup
    env.replace(setup["environments"][connection.rank])
    log.configure()
    logging.getLogger("nanovllm").setLevel(logging.WARNING)  # the first rank says the same
    runner = load_rank(connection, setup)
    from nanovllm.runner.mirrored import handlers

    gc.freeze()  # a collection among so many objects takes 0.1 s, for which all ranks wait
    serve(connection.channel, handlers(runner))
    sys.stderr.flush()
    os._exit(0)  # an orderly end of torch and the device's libraries would take a second


def load_rank(connection: Connection, setup: dict[str, Any]) -> Runner:
    """This rank's part of the model, warm. Raises ValueError for another checkpoint."""
    from contextlib import closing

    from nanovllm.config import EngineConfig
    from nanovllm.models.shards import Shard
    from nanovllm.parallel.group import Group
    from nanovllm.startup.choose import choose_model, select_platform
    from nanovllm.startup.compile_farm.farm import CompileFarm
    from nanovllm.startup.laps import Laps
    from nanovllm.startup.load import load_chosen
    from nanovllm.startup.store_folder import open_store

    config = EngineConfig(**setup["options"])
    rank, size = connection.rank, connection.size
    has_weights = not config.random_weights
    folder = hub.resolve(config.model, weights=has_weights, revision=config.revision)
    if checkpoint_digest(folder) != setup["checkpoint"]:
        raise ValueError(f"rank {rank} sees another checkpoint than rank 0 in {folder}")
    platform, store = select_platform(config), open_store(config)
    choice = choose_model(config, platform, store, folder, weights=has_weights)
    choice = replace(choice, shard=Shard(rank, size))
    choice.prepare_kernels()
    platform.share_cores(size)
    connect = partial(
        Group, rank, size, platform.device, connection.folder, connect_peers=platform.connect_peers
    )
    with closing(CompileFarm(config)) as farm:
        return load_chosen(choice, farm, Laps(), connect, show_progress=False).runner


if __name__ == "__main__":
    main()
