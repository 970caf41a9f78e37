"""Measures the HTTP server's throughput per second of its processor time.

    python scripts/bench/front_end.py --rounds 5

The server has no model: its engine makes tokens up (mock_engine.py). Other processes
send the requests, with the client of `nanovllm bench serve`. A round has three parts: streamed
answers, completions of one token, and conversations of one token. An additional first round is not
counted. The result is JSON: the figures of all rounds, their median, minimum and maximum. A client
that falls behind gets several tokens in an event; `tokens_per_event` is their mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import env
from nanovllm.cli.bench import against_server
from nanovllm.tools import command_line
from scripts.bench import mock_engine_server

NUM_PROMPT_TOKENS, NUM_WORDS = 120, 20
TOP_ID = 500  # below the vocabulary of the tokenizer
WORDS = ("the", "red", "old", "house", "tree", "river", "stone", "wind", "walks", "sees", "near")
STREAMS, COMPLETIONS, CONVERSATIONS = "tokens", "completions", "conversations"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, shown = parser.add_argument, "default: %(default)s"
    add("--rounds", type=int, default=5, metavar="N", help=shown)
    add("--clients", type=int, default=1, metavar="N", help=f"client processes; {shown}")
    add("--streams", type=int, default=256, metavar="N", help=f"at the same time; {shown}")
    add("--tokens", type=int, default=256, metavar="N", help=f"of a streamed answer; {shown}")
    add("--requests", type=int, default=4000, metavar="N", help=f"of one token; {shown}")
    add("--concurrency", type=int, default=64, metavar="N", help=f"of these requests; {shown}")
    args = parser.parse_args(words)
    for name, value in vars(args).items():
        if value < 1:
            raise ValueError(f"--{name} is {value}: it must be at least 1")
    return args


class Server:
    """A process of mock_engine_server.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, mock_engine_server.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env.for_children(),
        )  # fmt: skip
        self.url = self._line()

    def processor_seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the server has ended")
        return line


def parts(args: argparse.Namespace, seed: int) -> dict[str, tuple[str, list[dict[str, Any]], int]]:
    """The parts of a round: path, bodies, and how many are sent at the same time."""
    draw = random.Random(seed)

    def prompt() -> list[int]:
        return [draw.randrange(TOP_ID) for _ in range(NUM_PROMPT_TOKENS)]

    def message() -> dict[str, str]:
        return {"role": "user", "content": " ".join(draw.choices(WORDS, k=NUM_WORDS))}

    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    streams = [
        {"prompt": prompt(), "max_tokens": args.tokens, **streamed} for _ in range(args.streams)
    ]
    completions = [{"prompt": prompt(), "max_tokens": 1} for _ in range(args.requests)]
    conversations = [{"messages": [message()], "max_tokens": 1} for _ in range(args.requests)]
    return {
        STREAMS: ("/v1/completions", streams, args.streams),
        COMPLETIONS: ("/v1/completions", completions, args.concurrency),
        CONVERSATIONS: ("/v1/chat/completions", conversations, args.concurrency),
    }


async def measure(server: Server, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """The figures of one round. Raises RuntimeError if a request fails."""
    found: dict[str, float] = {}
    for name, (path, bodies, limit) in parts(args, seed).items():
        work = [{"at": 0.0, "body": body} for body in bodies]
        target = against_server.Server(server.url, path, None)
        num_clients = min(args.clients, limit)
        start = server.processor_seconds()
        records = await against_server.send(target, work, num_clients, limit, has_bar=False)
        seconds = server.processor_seconds() - start
        errors = [record["error"] for record in records if record["error"]]
        if errors:
            raise RuntimeError(f"{len(errors)} requests have failed: {errors[0]}")
        num_tokens = sum(record["num_output"] for record in records)
        num = num_tokens if name == STREAMS else len(records)
        found[f"{name}_per_processor_second"] = num / seconds
        if name == STREAMS:
            num_events = sum(len(record["times"]) for record in records)
            found["tokens_per_event"] = num_tokens / num_events
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    rounded = [round(value, 2) for value in values]
    median = round(statistics.median(values), 2)
    return {"median": median, "least": min(rounded), "most": max(rounded), "rounds": rounded}


async def measure_rounds(server: Server, args: argparse.Namespace) -> list[dict[str, float]]:
    return [await measure(server, args, seed) for seed in range(args.rounds + 1)]


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    server = Server()
    try:
        rounds = asyncio.run(measure_rounds(server, args))[1:]  # the first one warms up
    finally:
        server.close()
    figures = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
    versions = {"python": platform.python_version(), "uvloop": version("uvloop")}
    print(json.dumps({"options": vars(args), "versions": versions, **figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
