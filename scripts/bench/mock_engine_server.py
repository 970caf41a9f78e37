"""A server without a model, in this process, for scripts/bench/front_end.py.

Prints its URL, then for each line from stdin the processor time used so far, in seconds. Exits at
the end of stdin.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.api.address import bind, url_of
from nanovllm.api.config import ServerConfig
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.config import EngineConfig
from nanovllm.replicas import child_config
from nanovllm.tools import command_line
from scripts.bench.mock_engine import MockEngine

MODEL = "tiny-qwen3"  # for its tokenizer and its chat template


def follow_stdin() -> None:
    """Answer the lines of stdin until it ends."""
    for _ in sys.stdin:
        print(time.process_time(), flush=True)


def main() -> int:
    return uvloop.run(serve())


async def serve() -> int:
    engine_config, config = EngineConfig(MODEL), ServerConfig(port=0, access_log=False)
    engine = MockEngine(engine_config, child_config.tokenizer(engine_config))
    with bind(config) as sock:
        stop, url = Stop(asyncio.to_thread(follow_stdin)), url_of(config, sock)
        service = Service(engine, config)
        return await run(service, engine, sock, stop, lambda: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
