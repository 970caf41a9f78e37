"""The program of one rank beside the first (`python -m`): a part of the model, warm, that serves
rank 0."""

from __future__ import annotations

import gc
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from nanovllm import env, hub, log
from nanovllm.parallel.serve import Handler, RankConnection, connect, serve
from nanovllm.startup.ranks import checkpoint_digest


def main() -> None:
    """A rank's process."""
    connection = connect(sys.argv[1:])
    setup = connection.setup
    env.replace(setup["environments"][connection.rank])
    log.configure()
    logging.getLogger("nanovllm").setLevel(logging.WARNING)  # the first rank logs the same
    handlers = load_rank(connection, setup)
    gc.freeze()  # a garbage collection of all objects takes 0.1 s, during which all ranks wait
    serve(connection.channel, handlers)
    sys.stderr.flush()
    os._exit(0)  # a regular shutdown of torch and the device's libraries would take a second


def load_rank(connection: RankConnection, setup: dict[str, Any]) -> dict[str, Handler]:
    """The handlers of this rank's part of the model, which is warm. Raises ValueError for another
    checkpoint."""
    from contextlib import closing

    from nanovllm.config import EngineConfig
    from nanovllm.models.shards import Shard
    from nanovllm.parallel.group import Group
    from nanovllm.runner import pool_driver, tp_driver
    from nanovllm.startup import load, pooling_load
    from nanovllm.startup.compile_farm.farm import CompileFarm
    from nanovllm.startup.pooling import for_task
    from nanovllm.startup.resolve import open_platform, resolve_model
    from nanovllm.startup.startup_timer import StartupTimer
    from nanovllm.startup.store_folder import open_store

    config = EngineConfig(**setup["options"])
    rank, size = connection.rank, connection.size
    has_weights = not config.random_weights
    folder = hub.resolve(config.model, weights=has_weights, revision=config.revision)
    if checkpoint_digest(folder) != setup["checkpoint"]:
        raise ValueError(f"rank {rank} has another checkpoint than rank 0 in {folder}")
    platform, store = open_platform(config), open_store(config)
    resolved = resolve_model(config, platform, store, folder, weights=has_weights)
    resolved = for_task(replace(resolved, shard=Shard(rank, size)))
    resolved.prepare_kernels()
    platform.share_cores(size)
    connect = partial(
        Group, rank, size, platform.device, connection.folder, connect_peers=platform.connect_peers
    )
    with closing(CompileFarm(config)) as farm:
        parts = resolved, farm, StartupTimer(), connect
        if config.pools:
            pools = pooling_load.load_chosen(*parts, show_progress=False)
            return pool_driver.handlers(pools.runner)
        loaded = load.load_chosen(*parts, show_progress=False)
        return tp_driver.handlers(loaded.runner, loaded.sleeper)


if __name__ == "__main__":
    main()
