"""The program of a rank in tests of `nanovllm/parallel`: its handlers do what a test asks for."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

from nanovllm.parallel.serve import connect, serve


class Rank:
    """The handlers; `group` exists once it has been asked for."""

    def __init__(self, argv: list[str]) -> None:
        self.rank, self.size, self.setup, self.channel, self.folder = connect(argv)
        if self.setup.get("dies") == self.rank:
            print("the checkpoint is torn", file=sys.stderr)
            sys.exit(3)
        self.group: Any = None
        self.told: list[str] = []

    def join(self, kind: bytes) -> None:
        """Make the group, on the CPU or on the device of this rank."""
        import torch

        from nanovllm.parallel.group import Group

        device = torch.device(kind.decode(), self.rank) if kind != b"cpu" else torch.device("cpu")
        self.group = Group(self.rank, self.size, device, self.folder)

    def captured(self, payload: bytes) -> bytes:
        """`captured_sums` of this rank as JSON."""
        from tests.parallel.captured import captured_sums

        return json.dumps(captured_sums(self.group, int(payload))).encode()

    def sums(self, payload: bytes) -> bytes:
        """Sum and gather a tensor of this rank; the results' numbers as JSON."""
        import torch

        num, dtype = json.loads(payload)
        x = (torch.arange(num) + 10 * self.rank).to(getattr(torch, dtype))
        gathered = self.group.all_gather(x)
        least = self.group.min_int(100 - self.rank)
        return json.dumps([self.group.all_reduce(x).tolist(), gathered.tolist(), least]).encode()

    def gather_like(self, payload: bytes) -> None:
        """Gather ones of so many elements."""
        import torch

        self.group.all_gather(torch.ones(int(payload)))

    def note(self, payload: bytes) -> None:
        self.told.append(payload.decode())

    def notes(self, _: bytes) -> bytes:
        return json.dumps(self.told).encode()

    def echo(self, payload: bytes) -> bytes:
        return payload

    def describe(self, _: bytes) -> bytes:
        return json.dumps([self.rank, self.size, os.getpid(), self.setup]).encode()

    def refuse(self, payload: bytes) -> None:
        """Raise an error on the ranks that the payload names."""
        ranks, kind, text = json.loads(payload)
        if self.rank in ranks:
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind](text)

    def refuse_or_wait(self, payload: bytes) -> None:
        """`refuse`, or enter a collective."""
        self.refuse(payload)
        self.group.barrier()

    def say(self, payload: bytes) -> None:
        sys.stdout.buffer.write(payload)
        sys.stdout.flush()

    def sleep(self, payload: bytes) -> None:
        time.sleep(float(payload))

    def stay(self, payload: bytes) -> None:
        """Close the channel, and live on for so many seconds."""
        self.channel.close()
        time.sleep(float(payload))

    def wait_for_ranks(self, payload: bytes) -> None:
        """Enter a collective, except on the rank that the payload names."""
        if self.rank != int(payload):
            self.group.barrier()

    def compute(self, payload: bytes) -> bytes:
        """Compute without giving up Python's lock for about so many seconds."""
        started, num = time.monotonic(), 10_000_000
        sum(range(num))
        sum(range(int(num * float(payload) / (time.monotonic() - started))))
        return b"done"

    def block(self, payload: bytes) -> None:
        """Wait so many seconds without giving up Python's lock."""
        ctypes.PyDLL(None).sleep(int(payload))

    def handlers(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name, value in vars(Rank).items()
            if callable(value) and name not in ("__init__", "handlers")
        }


if __name__ == "__main__":
    rank = Rank(sys.argv[1:])
    serve(rank.channel, rank.handlers())
    os._exit(0)
