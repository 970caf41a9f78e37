"""Main function of an API process: serves HTTP once the engine is warm."""

from __future__ import annotations

import asyncio
import logging
import sys

import uvloop

from nanovllm import tokenizer
from nanovllm.api import adapters
from nanovllm.api.address import url_of
from nanovllm.api.config import ServerConfig
from nanovllm.api.latencies import Latencies
from nanovllm.api.salts import CacheSalts
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.serving.api_process import ApiProcess
from nanovllm.serving.async_engine import EngineDead
from nanovllm.serving.client import Client
from nanovllm.templates import renderer

logger = logging.getLogger(__name__)


def serve_clients(process: ApiProcess) -> None:
    """Serve until the supervisor requests a shutdown."""
    uvloop.run(_serve_clients(process))


async def _serve_clients(process: ApiProcess) -> None:
    server, engine = ServerConfig(**process.options["server"]), process.client()
    salts = CacheSalts(server, bytes.fromhex(process.options["cache_secret"]))
    stop = Stop(process.drain_begins())
    try:
        if not await stop.before(_ready(engine)):
            return
        size = Latencies.SIZE_BYTES
        starts = range(0, process.num * size, size)
        latencies = [Latencies(process.memory[start : start + size]) for start in starts]
        service = Service(engine, server, latencies, process.index, salts)
        await adapters.load_configured(service)

        def ready() -> None:
            if process.index == 0:
                url = url_of(server, process.listener)
                logger.info("%s is served at %s", service.model, url)

        await run(service, engine, process.listener, stop, ready)
    except EngineDead:
        await process.drain_begins()  # the supervisor has the reason and ends all processes
    finally:
        await engine.close()


async def _ready(engine: Client) -> None:
    """Wait until the engine is warm and everything that conversations need is loaded, so that no
    request waits for it."""
    if engine.config.pools:  # it has no conversations
        await engine.ready()
        return
    await asyncio.to_thread(renderer.start)  # it imports transformers meanwhile
    await asyncio.to_thread(_import_transformers)
    await engine.ready()
    if engine.tokenizer is not None:
        await asyncio.to_thread(getattr, engine.tokenizer, "for_reading")
        await asyncio.to_thread(renderer.facts, "", {})  # returns once its process has its imports


def _import_transformers() -> None:
    """Import what chat templates need without torch, which transformers would import for seconds.
    Clients of a vision model import torch afterwards."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        tokenizer.import_library()
    finally:
        del sys.modules["torch"]
