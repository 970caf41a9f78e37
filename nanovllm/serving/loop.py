"""The work of the engine's process: it takes requests from clients and sends them tokens.

It neither encodes nor decodes text. Per step it sends one message to each client with new tokens,
and waits for no client. Importing this module does not import torch.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.prompts import Prompt
from nanovllm.replicas.messages import Facts, dump, dump_metrics
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import Increment
from nanovllm.serving import messages
from nanovllm.serving.messages import Add
from nanovllm.serving.port import Port

if TYPE_CHECKING:
    from nanovllm.engine.interface import AnyEngine
    from nanovllm.engine.media_intake import MediaPrompt

logger = logging.getLogger(__name__)
# Whoever has waited for the engine or the server sends the first request within this time.
IDLE_SECONDS = 2.0


class Owner(NamedTuple):
    """The client that requested an answer, and the client's id for it."""

    port: Port
    request_id: int
    incremental: bool


class Loop:
    """Steps an engine while it has requests, and reads messages between two steps."""

    def __init__(self, engine: AnyEngine, ports: Sequence[Port], control: Channel) -> None:
        """control: the channel to the process that has started this one, and ends it by closing
        the channel."""
        self._engine, self._ports, self._control = engine, list(ports), control
        self._owners: dict[int, Owner] = {}  # by the engine's ids
        self._idle_since: float | None = None
        self._is_prepared = False  # for grammars
        self._handlers: dict[str, Callable[[Port, bytes], None]] = {
            messages.ADD: self._add,
            messages.BESIDE: self._beside,
            messages.END: self._end,
            messages.METRICS: self._metrics,
        }
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        for port in ports:
            self._selector.register(port, selectors.EVENT_READ, port)

    def run(self, facts: Facts) -> NoReturn:
        """Raises ChannelClosed once the control channel closes, and the errors of a step."""
        for port in list(self._ports):
            self._guarded(port, partial(Port.send, name=messages.READY, payload=dump(facts)))
        self._control.send(messages.READY)
        while True:
            for key, _ in self._ready():
                if key.data is None:
                    self._control.pending(wait=False)
                else:
                    self._guarded(key.data, self._serve)
            if self._owners:
                self._engine.advance()
                self._pass_on(self._engine.take())

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        """The sockets that have something to do. Without requests, wait for one; if none comes for
        a while, prepare for grammars."""
        if self._owners:
            self._idle_since = None
            return self._selector.select(0)
        if not self._is_prepared:
            now = time.monotonic()
            if self._idle_since is None:
                self._idle_since = now
            if (left := self._idle_since + IDLE_SECONDS - now) > 0:
                return self._selector.select(left)
            self._is_prepared = True
            self._engine.prepare_grammars()
        return self._selector.select()

    def _serve(self, port: Port) -> None:
        """Send a client its waiting messages, and handle those that it has sent."""
        port.send_more()
        for name, payload in port.read():
            self._handlers[name](port, payload)

    def _guarded(self, port: Port, use: Callable[[Port], None]) -> None:
        """Use a port. If its client is gone, abort its requests."""
        try:
            use(port)
        except ChannelClosed as error:
            if port.answers:
                logger.warning("a client has left %d answers: %s", len(port.answers), error)
            self._drop(port)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if port.is_waiting else 0)
        if self._selector.get_key(port).events != events:
            self._selector.modify(port, events, port)

    def _drop(self, port: Port) -> None:
        self._selector.unregister(port)
        self._ports.remove(port)
        port.close()
        self._forget(port, list(port.answers))

    def _pass_on(self, increments: Iterable[Increment]) -> None:
        """Send the new tokens of a step to the clients."""
        owners = self._owners
        for one in increments:
            port, request_id, incremental = owners[one.request_id]
            token_ids = one.token_ids
            if one.completion is None and one.logprobs is None and len(token_ids) == 1:
                port.add_token(request_id, token_ids[0])
                continue
            port.add_row(messages.row(request_id, one, incremental=incremental))
            if one.completion is not None:
                del owners[one.request_id], port.answers[request_id]
        for port in list(self._ports):
            self._guarded(port, Port.flush)

    def _add(self, port: Port, payload: bytes) -> None:
        """Queue the answers to a prompt. What the client cannot know, such as full memory, ends
        them alone."""
        given = messages.load_add(payload)
        prompt = _prompt(given, port)
        for request_id, seed in enumerate(given.seeds, start=given.first_id):
            try:
                of_engine = self._queue(given, prompt, seed)
            except Exception as error:
                logger.error("a request is refused: %s", error)
                port.add_row(messages.failed(request_id, error))
                continue
            port.answers[request_id] = of_engine
            self._owners[of_engine] = Owner(port, request_id, given.incremental)
        port.flush()

    def _beside(self, port: Port, payload: bytes) -> None:
        """Keep the images of the next prompt."""
        port.beside = payload

    def _queue(self, given: Add, prompt: Prompt | MediaPrompt, seed: int) -> int:
        return self._engine.add_request(
            prompt,
            SamplingParams(**given.params, seed=seed),
            incremental=given.incremental,
            priority=given.priority,
        )

    def _end(self, port: Port, payload: bytes) -> None:
        """End answers. Some may have ended while the message was on its way."""
        given = messages.load_end(payload)
        unfinished = [one for one in given.ids if one in port.answers]
        if given.reason == messages.ABORT:
            self._forget(port, unfinished)
            return
        for one in unfinished:
            self._engine.abort(port.answers[one], given.reason)  # its last output is sent

    def _forget(self, port: Port, request_ids: Iterable[int]) -> None:
        """Abort answers that nobody reads any more."""
        of_engine = [port.answers.pop(one) for one in request_ids]
        self._engine.abort_all(of_engine)
        for one in of_engine:
            del self._owners[one]

    def _metrics(self, port: Port, payload: bytes) -> None:
        port.send(messages.METRICS, dump_metrics(self._engine.metrics.read()))


def _prompt(given: Add, port: Port) -> Prompt | MediaPrompt:
    """The prompt of a message, with its images."""
    if not given.has_images:
        return Prompt(None, given.prompt_ids, given.cache_salt)
    from nanovllm.engine.media_intake import MediaPrompt  # these import torch
    from nanovllm.replicas import attached

    _, beside = attached.load(port.beside)
    port.beside = b""
    images = list(beside.images)
    return MediaPrompt(given.prompt_ids, beside.positions, images, given.cache_salt)
