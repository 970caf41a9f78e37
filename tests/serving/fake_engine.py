"""An engine that makes tokens up, without torch, and the program of its process (`python -m`)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from nanovllm.engine.metrics import Gauge, Metric
from nanovllm.engine.request import EngineInfo, EngineRequest
from nanovllm.parallel.channel import Channel
from nanovllm.replicas import engine_program
from nanovllm.replicas.client_conn import ClientConn
from nanovllm.replicas.loop import Loop
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta

STEP_SECONDS = 0.01
HELD = "FAKE_ENGINE_HELD"
INFO = EngineInfo("", 512, 16, 512, 64, 16, 100, [3], {})


class FakeEngine:
    """Gives every request max_tokens tokens, one a step: 5, 6, 7, …

    While the file exists that the variable HELD names, it does not give the last token of requests
    of a hundred tokens or more: they do not end.
    """

    def __init__(self, step_seconds: float = STEP_SECONDS) -> None:
        self.metrics = self
        self.step_seconds = step_seconds
        self._requests: dict[int, tuple[list[int], SamplingParams, list[int]]] = {}
        self._num_added = 0
        self._held = Path(os.environ.get(HELD, "/nonexistent"))
        self._outputs: list[OutputDelta] = []

    def add(self, asked: EngineRequest) -> int:
        self._num_added += 1
        self._requests[self._num_added] = asked.prompt_ids, asked.params, []
        return self._num_added

    def advance(self) -> None:
        time.sleep(self.step_seconds)
        is_held = self._held.exists()
        for request_id, (_, params, found) in list(self._requests.items()):
            if is_held and params.max_tokens >= 100 and len(found) == params.max_tokens - 1:
                continue
            token_id = 5 + len(found) % 500
            found.append(token_id)
            if len(found) == params.max_tokens:
                self._end(request_id, [token_id], "length")
            else:
                self._outputs.append(OutputDelta(request_id, [token_id], ""))

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]:
        taken, self._outputs = self._outputs, []
        return taken

    def abort(self, request_id: int, reason: str = "abort") -> None:
        self._end(request_id, [], reason)

    def abort_all(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            del self._requests[request_id]

    def read(self) -> list[Metric]:
        return [Gauge("nanovllm:num_requests_running", len(self._requests))]

    def prepare_grammars(self) -> None:
        pass

    def check_ranks(self) -> None:
        pass

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        pass

    def close(self) -> None:
        self._requests.clear()

    def _end(self, request_id: int, token_ids: list[int], reason: str) -> None:
        prompt_ids, _, found = self._requests.pop(request_id)
        done = FinishedOutput("", found, reason, None, prompt_ids, 0, None, None)
        self._outputs.append(OutputDelta(request_id, token_ids, "", None, done))


def serve(setup: dict[str, Any], channel: Channel) -> None:
    if setup["options"]["seed"] == 13:
        raise ValueError("seed is 13")
    engine: Any = FakeEngine()
    (descriptors,) = setup["clients"]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    clients = [ClientConn(socket.socket(fileno=descriptor)) for descriptor in descriptors]
    Loop(engine, clients, channel).run(INFO)


if __name__ == "__main__":
    engine_program.run(serve)
