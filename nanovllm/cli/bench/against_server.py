"""Sends a benchmark's requests from several processes, and merges their records."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from nanovllm import env, programs
from nanovllm.cli import http
from nanovllm.cli.bench import requests, results
from nanovllm.cli.chat_backend import first_model
from nanovllm.cli.watch import Watch
from nanovllm.platforms.cores import usable_cores
from nanovllm.tools.terminal import printable

MOST_CLIENTS = 6  # more are useless: each handles tens of thousands of tokens/s
START_SECONDS = 0.1  # time for all clients to read the start command
RETRY_SECONDS = 0.2
LINE_BYTES = 1 << 31  # maximum line length: the records of all of a client's requests


class Server(NamedTuple):
    """path: the endpoint of the requests."""

    url: str
    path: str
    api_key: str | None


def measure(args: argparse.Namespace) -> int:
    """Run the benchmark and print its results. Returns the exit status."""
    _check(args)
    url = args.base_url or f"http://{args.host}:{args.port}"
    path = "/v1/chat/completions" if requests.is_chat(args) else "/v1/completions"
    server = Server(url, args.endpoint or path, args.api_key or env.api_key())
    model = http.run(_model(args, server))
    bodies = requests.bodies(args, model)
    rate, seed = args.request_rate, args.seed
    times = requests.send_times(len(bodies), rate, args.burstiness, seed)
    work = [{"at": at, "body": body} for at, body in zip(times, bodies)]
    http.run(_warm_up(server, requests.warm_ups(args, model)))
    _say_what(args, model, url)
    num_clients = args.num_clients or min(MOST_CLIENTS, max(1, usable_cores() // 2))
    num_clients = min(num_clients, len(work), args.max_concurrency or len(work))
    has_bar = not args.disable_tqdm
    sending = send(server, work, num_clients, args.max_concurrency, has_bar=has_bar)
    records = http.run_stoppable(sending)
    found = results.summary(args, model, records)
    print(printable(results.table(args, found)))  # it contains the server's model name
    for line in results.errors(records):
        print(printable(line), file=sys.stderr)
    if args.save_result or args.save_detailed:
        print(f"written to {results.save(args, found, records)}")
    return 1 if found["failed"] else 0


def _say_what(args: argparse.Namespace, model: str, url: str) -> None:
    """Print what is measured, unless --quiet is set."""
    if env.is_quiet():
        return
    if args.dataset_name == "nanovllm":
        tokens = f"{args.min_len:,} to {args.max_len:,} tokens in and out"
    else:
        near = "about " if args.random_range_ratio else ""
        tokens = f"{near}{args.random_input_len:,} tokens in and {args.random_output_len:,} out"
    print(printable(f"{model} at {url}: {args.num_prompts} prompts, {tokens} each"), flush=True)


def _check(args: argparse.Namespace) -> None:
    """Fill in derived arguments. Raises ValueError for values out of range."""
    if args.num_prompts is None:
        args.num_prompts = requests.NUM_PROMPTS[args.dataset_name]
    args.model = args.model or args.served_model_name
    for name in ("num_prompts", "random_input_len", "random_output_len", "min_len", "vocab_size",
                 "max_concurrency", "num_clients"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if args.max_len < args.min_len:
        raise ValueError(f"--max-len is {args.max_len}: it must be at least --min-len")
    for name in ("request_rate", "burstiness"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.random_range_ratio < 1 or args.num_warmups < 0:
        raise ValueError("--random-range-ratio must be in [0, 1), --num-warmups at least 0")
    if not isinstance(args.extra_body, dict):
        raise ValueError(f"--extra-body is {args.extra_body!r}: it must be a JSON object")
    results.check(args)


async def _model(args: argparse.Namespace, server: Server) -> str:
    """The model's name, once the server responds."""
    deadline = time.monotonic() + args.ready_check_timeout_sec
    while True:
        try:
            found = await first_model(http.HttpClient(server.url, server.api_key))
            return str(args.model or found)
        except (OSError, ValueError) as error:
            if time.monotonic() >= deadline:
                raise type(error)(f"no server at {server.url}: {error}") from error
        await asyncio.sleep(RETRY_SECONDS)


async def _warm_up(server: Server, bodies: Sequence[dict[str, Any]]) -> None:
    """Send warm-up requests. Raises ValueError, with the server's message, if it refuses them."""
    client = http.HttpClient(server.url, server.api_key)
    sent = (client.send(client.request(server.path, body), lambda data: None) for body in bodies)
    for answer in await asyncio.gather(*sent):
        answer.checked()
    client.close()


async def send(
    server: Server,
    work: Sequence[dict[str, Any]],
    num_clients: int,
    limit: int | None = None,
    *,
    has_bar: bool = True,
) -> list[dict[str, Any]]:
    """The records of all requests, in order.

    work: each request's body, and its time "at" in seconds. limit: the maximum concurrency.
    """
    shares = [work[i::num_clients] for i in range(num_clients)]
    limits = _shares(limit, num_clients)
    clients = [_Client(server, share, limit) for share, limit in zip(shares, limits)]
    with Watch("sending", "requests", len(work), shown=has_bar) as bar:
        try:
            await asyncio.gather(*(client.prepare() for client in clients))
            start = time.monotonic() + START_SECONDS
            found = await asyncio.gather(*(client.run(start, bar) for client in clients))
        finally:
            await asyncio.gather(*(client.end() for client in clients))
    return [found[i % num_clients][i // num_clients] for i in range(len(work))]


def _shares(total: int | None, num: int) -> list[int | None]:
    """A number split into nearly equal parts."""
    if total is None:
        return [None] * num
    return [total // num + (i < total % num) for i in range(num)]


class _Client:
    """A `client.py` process."""

    def __init__(self, server: Server, work: Sequence[dict[str, Any]], limit: int | None) -> None:
        self._work: dict[str, Any] = {
            "url": server.url, "path": server.path, "api_key": server.api_key,
            "limit": limit, "requests": work,
        }  # fmt: skip
        self._process: asyncio.subprocess.Process | None = None
        self._has_sent_all = False

    async def prepare(self) -> None:
        """Start the process, and wait until it has prepared its requests."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *programs.command("nanovllm.cli.bench.client"), stdin=pipe, stdout=pipe,
            env=env.for_children(), limit=LINE_BYTES,
        )  # fmt: skip
        await self._write(json.dumps(self._work))
        await self._line("ready")

    async def run(self, start: float, bar: Watch) -> list[dict[str, Any]]:
        """Let it send, beginning at `start`. Returns its records."""
        await self._write(repr(start))
        for _ in self._work["requests"]:
            await self._line("done")
            bar.update()
        records = json.loads(await self._line(""))
        self._has_sent_all = True
        return records

    async def end(self) -> None:
        """End the process if it is running, and wait for it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._has_sent_all:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def _write(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    async def _line(self, expected: str) -> str:
        assert self._process is not None and self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode().strip()
        if not line or (expected and line != expected):
            raise RuntimeError(f"a client process has ended or sent {line[:99]!r}")
        return line
