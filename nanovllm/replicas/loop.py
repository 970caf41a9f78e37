"""The loop of an engine process: takes requests from clients and sends them tokens.

After each step it sends one message to each client that has new tokens, and never waits for a
client. Importing this module does not import torch.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from nanovllm.engine.request import EngineInfo, EngineRequest
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.parallel.serve import ANSWER, ASKS
from nanovllm.replicas import messages
from nanovllm.replicas.client_conn import ClientConn, ParentConn
from nanovllm.replicas.messages import LoraReply
from nanovllm.schedule.outputs import OutputDelta

if TYPE_CHECKING:
    from nanovllm.engine.engine_client import AnyEngine

logger = logging.getLogger(__name__)
# Idle time before grammar tables are preloaded, if other processes can be clients.
IDLE_SECONDS = 2.0
SHARED_PARAMS = 16  # parameters kept for later requests with the same


class AnswerOwner(NamedTuple):
    """The client that requested an answer, and the client's id of it."""

    client: ClientConn
    request_id: int
    incremental: bool


class Loop:
    """Steps an engine while it has requests, and reads messages between steps.

    The parent process is also a client; it ends the loop by closing its channel.
    """

    def __init__(self, engine: AnyEngine, clients: Sequence[ClientConn], control: Channel) -> None:
        """control: the channel to the parent process."""
        self._engine, self._parent = engine, ParentConn(control)
        self._clients = [*clients, self._parent]
        # The prompts of a request have the same, and n answers may come in n messages. What the
        # engine derives from them is shared, too: it may take 50 ms.
        self._load_params = lru_cache(SHARED_PARAMS)(messages.load_params)
        self._owners: dict[int, AnswerOwner] = {}  # by engine id
        self._failure: Exception | None = None  # of the engine's ranks
        self._idle_since: float | None = None
        self._is_prepared = not clients  # grammar tables are loaded
        self._handlers: dict[str, Callable[[ClientConn, bytes], bytes | None]] = {
            messages.GO: lambda client, payload: None,
            messages.MEDIA: self._take_media,
            messages.ADD: self._add,
            messages.END: self._end,
            messages.FORGET: lambda client, payload: engine.forget_prefixes(),
            messages.PREPARE_GRAMMARS: lambda client, payload: engine.prepare_grammars(),
            messages.ADD_LORA: lambda client, payload: self._lora_reply(
                lambda: engine.add_lora(messages.load_lora(payload))
            ),
            messages.REMOVE_LORA: lambda client, payload: self._lora_reply(
                lambda: engine.remove_lora(messages.load_lora_id(payload))
            ),
            messages.METRICS: lambda client, payload: messages.dump_metrics(engine.metrics.read()),
        }
        self._selector = selectors.DefaultSelector()
        for client in self._clients:
            self._selector.register(client, selectors.EVENT_READ, client)

    def run(self, info: EngineInfo) -> NoReturn:
        """Raises ChannelClosed when the control channel closes, the errors of a step, and the
        failure of the engine's ranks, also while it has no requests."""
        woken, wake = socket.socketpair()
        with woken, wake:
            self._selector.register(woken, selectors.EVENT_READ)
            self._engine.call_on_failure(partial(self._note_failure, wake))
            self._run(info)

    def _note_failure(self, wake: socket.socket, failure: Exception) -> None:
        """Let the loop raise the failure. Called in another thread."""
        self._failure = failure
        with suppress(OSError):  # the loop has ended
            wake.send(b".")

    def _run(self, info: EngineInfo) -> NoReturn:
        payload = messages.dump(info)
        for client in list(self._clients):
            self._guarded(client, partial(ClientConn.send, name=messages.READY, payload=payload))
        self._guarded(self._parent, self._serve)  # its channel may already hold messages
        while True:
            for key, _ in self._ready():
                if self._failure is not None:
                    raise self._failure
                self._guarded(key.data, self._serve)
            if self._owners:
                self._engine.advance()
                self._pass_on(self._engine.take())

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        """The sockets that are ready. Without requests, wait for one; after some idle time, preload
        the grammar tables."""
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

    def _serve(self, client: ClientConn) -> None:
        """Send a client its waiting messages, and handle those that it sent."""
        client.send_more()
        for name, payload in client.read():
            name, _, number = name.partition(ASKS)
            answer = self._handlers[name](client, payload)
            if number:
                client.send(ANSWER + number, answer or b"")
            elif answer is not None:
                client.send(name, answer)

    def _guarded(self, client: ClientConn, use: Callable[[ClientConn], None]) -> None:
        """Use a connection. If the client has disconnected, abort its requests."""
        try:
            use(client)
        except ChannelClosed as error:
            if client is self._parent:
                raise
            if client.answers:
                logger.warning("client gone, %d answers aborted: %s", len(client.answers), error)
            self._drop(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.is_waiting else 0)
        if self._selector.get_key(client).events != events:
            self._selector.modify(client, events, client)

    def _drop(self, client: ClientConn) -> None:
        self._selector.unregister(client)
        self._clients.remove(client)
        client.close()
        self._abort(client, list(client.answers))

    def _pass_on(self, increments: Iterable[OutputDelta]) -> None:
        """Send a step's new tokens to the clients."""
        owners = self._owners
        for one in increments:
            client, request_id, incremental = owners[one.request_id]
            token_ids = one.token_ids
            if (
                one.completion is None
                and one.logprobs is None
                and len(token_ids) == 1
                and not one.text
            ):
                client.add_token(request_id, token_ids[0])
                continue
            client.add_row(messages.row(request_id, one, incremental=incremental))
            if one.completion is not None:
                del owners[one.request_id], client.answers[request_id]
        for client in list(self._clients):
            self._guarded(client, self._flush)

    def _take_media(self, client: ClientConn, payload: bytes) -> None:
        """Store the MEDIA for the client's next prompt."""
        client.media = payload

    def _add(self, client: ClientConn, payload: bytes) -> None:
        """Queue the answers to a prompt. Errors that the client cannot detect, such as full memory,
        end only these answers."""
        asked = messages.load_add(payload)
        media, client.media = client.media, b""
        request: EngineRequest | None = None
        for index, request_id in enumerate(asked.ids):
            try:
                request = request or messages.load_request(asked, media, self._load_params)
                of_engine = self._engine.add(messages.of_answer(request, asked, index))
            except Exception as error:
                self._engine.check_ranks()  # the loss of one ends all requests
                logger.error("request refused: %s", error)
                client.add_row(messages.failed(request_id, error))
                continue
            client.answers[request_id] = of_engine
            self._owners[of_engine] = AnswerOwner(client, request_id, asked.incremental)
        self._flush(client)

    def _flush(self, client: ClientConn) -> None:
        """Send a client its new tokens, and abort answers of which it has not read too many."""
        client.flush()
        too_large = client.take_too_large()
        if too_large:
            logger.warning("a client does not read: %d of its answers end", len(too_large))
            self._abort(client, [one for one in too_large if one in client.answers])

    def _end(self, client: ClientConn, payload: bytes) -> None:
        """End answers. Some may have ended before the message arrived."""
        asked = messages.load_end(payload)
        unfinished = [one for one in asked.ids if one in client.answers]
        if asked.reason == messages.STOP:
            for one in unfinished:
                self._engine.abort(client.answers[one], asked.reason)  # its last output is sent
        else:
            self._abort(client, unfinished)

    def _abort(self, client: ClientConn, request_ids: Iterable[int]) -> None:
        """Abort answers without sending their last output."""
        of_engine = [client.answers.pop(one) for one in request_ids]
        self._engine.abort_all(of_engine)
        for one in of_engine:
            del self._owners[one]

    def _lora_reply(self, work: Callable[[], bool]) -> bytes:
        try:
            return messages.dump(LoraReply(work()))
        except ValueError as error:
            self._engine.check_ranks()
            return messages.dump(LoraReply(False, str(error)))
