"""What API processes run in tests: a line with a JSON object in, lines with tokens out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys

from nanovllm.sampling import SamplingParams
from nanovllm.serving.api_process import ApiProcess
from nanovllm.serving.async_engine import Draining, EngineDead
from nanovllm.serving.client import Client


def run(process: ApiProcess) -> None:
    if process.options.get("fails") == process.index:
        raise ValueError("an option is wrong")
    if process.options.get("returns") == process.index:
        return
    asyncio.run(_serve(process))


async def _serve(process: ApiProcess) -> None:
    client = process.client()
    running: set[asyncio.Task[None] | None] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())
        try:
            await answer_line(reader, writer)
        finally:
            running.discard(asyncio.current_task())

    async def answer_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = json.loads(await reader.readline())
        writer.write(f"{os.getpid()}\n".encode())
        with contextlib.suppress(ConnectionError):
            try:
                await _answer(client, asked, writer)
            except (Draining, EngineDead) as error:
                writer.write(f"{type(error).__name__}: {error}\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, sock=process.listener)
    await client.ready()
    assert "torch" not in sys.modules, "a client of text needs no torch"
    await process.drain_begins()
    await client.drain(process.drain_timeout)
    server.close()
    while running:  # the answers' last lines
        await asyncio.sleep(0.01)
    await client.close()


async def _answer(client: Client, asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
    async for part in await client.open(asked.pop("prompt"), SamplingParams(**asked)):  # type: ignore[arg-type]
        writer.write(f"{json.dumps([part.token_ids, part.finish_reason])}\n".encode())
        await writer.drain()
