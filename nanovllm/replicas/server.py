"""The program of a replica (`python -m`): an engine that takes requests from a channel."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from nanovllm import env, log
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import Channel, ChannelClosed, Message
from nanovllm.parallel.serve import ANSWER, ASKS, ERROR, connect, error_bytes
from nanovllm.prompts import Prompt
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Addition, Facts
from nanovllm.replicas.opening import one_engine
from nanovllm.sampling import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine import Engine


class Server:
    """Steps an engine while it has requests, and reads messages between two steps."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine, self._channel = engine, channel
        # ids of unfinished requests, from the front's to the engine's and back
        self._ids: dict[int, int] = {}
        self._front_ids: dict[int, int] = {}
        self._handlers: dict[str, Callable[[bytes], bytes | None]] = {
            messages.GO: lambda payload: None,
            messages.ADD: self._add,
            messages.ABORT: self._abort,
            messages.FORGET: lambda payload: engine.forget_prefixes(),
            messages.METRICS: lambda payload: messages.dump_metrics(engine.metrics.read()),
        }

    def run(self) -> None:
        """Never returns. Raises ChannelClosed once the front closes, and errors of the engine."""
        engine = self._engine
        self._channel.send(messages.READY, messages.dump(self._facts()))
        while True:
            for message in self._channel.pending(wait=not engine.has_unfinished):
                self._handle(message)
            if engine.has_unfinished:
                self._step()

    def _step(self) -> None:
        found = [
            replace(one, request_id=self._front_ids[one.request_id]) for one in self._engine.step()
        ]
        for one in found:
            if one.finished:
                del self._front_ids[self._ids.pop(one.request_id)]
        if found:
            self._channel.send(messages.OUTPUTS, messages.dump_outputs(found))

    def _handle(self, message: Message) -> None:
        name, _, number = message[0].partition(ASKS)
        answer = self._handlers[name](message[1])
        if number:
            self._channel.send(ANSWER + number, answer or b"")

    def _add(self, payload: bytes) -> None:
        given = Addition(**json.loads(payload))
        of_engine = self._engine.add_request(
            Prompt(None, given.prompt_ids, given.cache_salt),
            SamplingParams(**given.params),
            incremental=given.incremental,
            priority=given.priority,
        )
        self._ids[given.request_id] = of_engine
        self._front_ids[of_engine] = given.request_id

    def _abort(self, payload: bytes) -> None:
        """Drop requests. Some may have ended while the message was on its way."""
        of_engine = [self._ids.pop(one) for one in json.loads(payload) if one in self._ids]
        self._engine.abort_all(of_engine)
        for one in of_engine:
            del self._front_ids[one]

    def _facts(self) -> Facts:
        engine, pool = self._engine, self._engine.scheduler.pool
        return Facts(
            max_model_len=engine.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            hidden_size=engine.model_config.hidden_size,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            eos_ids=sorted(engine.eos_ids),
            default_params=messages.params_fields(engine.default_params),
        )


def wait_for_programs(config: EngineConfig, channel: Channel) -> None:
    """If the store lacks programs, wait until the first replica has compiled them."""
    if config.enforce_eager or config.compile_cache_mode == "require":
        return
    from nanovllm.startup.artifacts import is_ready
    from nanovllm.startup.choose import choose_without_weights

    if is_ready(choose_without_weights(config)):
        return
    while channel.receive()[0] != messages.GO:
        pass


def main() -> None:
    """A replica's process. An error before or in a step goes to the front, which ends the process.

    What the engine leaves among the temporary files goes with the replica's folder.
    """
    connection = connect(sys.argv[1:])
    setup, channel = connection.setup, connection.channel
    env.replace(setup["environment"])
    tempfile.tempdir = str(connection.folder)
    log.configure()
    with suppress(ChannelClosed):
        try:
            config = EngineConfig(**setup["options"])
            if not setup["is_first"]:
                wait_for_programs(config, channel)
            engine = one_engine(config, show_progress=False)
            try:
                Server(engine, channel).run()
            finally:
                engine.close()
        except ChannelClosed:
            raise
        except Exception as error:
            if not isinstance(error, ValueError):
                traceback.print_exc()
            channel.send(ERROR, error_bytes(error))
            while True:
                channel.receive()
    sys.stderr.flush()
    os._exit(0)  # an orderly end of torch and the device's libraries would take a second


if __name__ == "__main__":
    main()
