"""Opens the engine for a config. Imports torch as late as possible."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload
from nanovllm.startup import bytecode
from nanovllm.startup.compile_farm.farm import CompileFarm

if TYPE_CHECKING:
    from nanovllm.engine.engine_client import AnyEngine
    from nanovllm.replicas.replica import Starter


def open_engine(config: EngineConfig) -> AnyEngine:
    """A warm engine, or several replicas of one behind a router. Errors are those of `load`."""
    if not config.replicas_option:
        return one_engine(config)
    from nanovllm.replicas.router import Router

    return Router(config, _starter(config))


def _starter(config: EngineConfig) -> Starter:
    """The starter of replicas for `distributed_executor_backend`."""
    if config.distributed_executor_backend == "ray":
        from nanovllm.replicas.ray_replica import RayStarter

        return RayStarter(config)
    from nanovllm.replicas.machine import ProcessStarter

    return ProcessStarter(config)


def one_engine(config: EngineConfig, *, show_progress: bool = True) -> AnyEngine:
    """A warm engine in this process."""
    bytecode.report_missing()
    env.limit_spinning()
    with closing(CompileFarm.start(config)) as farm:
        wait = preload.begin(config.device)
        # Importing torch takes long: the farm and the device start in the meantime.
        if config.pools:
            from nanovllm.pooling import engine as pooling
            from nanovllm.startup.pooling_load import load as load_pooling

            wait()
            return pooling.PoolingEngine(load_pooling(config, farm, show_progress=show_progress))
        from nanovllm.engine.engine import Engine
        from nanovllm.startup.load import load

        wait()
        return Engine(load(config, farm, show_progress=show_progress))
