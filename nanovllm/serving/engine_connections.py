"""A client's connections to its engine processes, and to those that are started again."""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nanovllm.engine.metrics import Metric
from nanovllm.engine.request import EngineInfo
from nanovllm.replicas import handover, messages
from nanovllm.replicas.handshake import check_agreement
from nanovllm.replicas.messages import End, LoraReply
from nanovllm.replicas.metric_aggregation import aggregate
from nanovllm.serving.connection import Connection


class Events(NamedTuple):
    """Bound methods, called in the event loop. The connections refer to their object weakly, since
    the loop, which may run forever, refers to the connections."""

    on_outputs: Callable[[int, bytes], None]  # an engine and its message
    on_loss: Callable[[int], None]  # the connection to an engine has ended
    on_restart: Callable[[int], None]  # an engine that was started again is warm
    on_end: Callable[[], None]  # the parent of all engines has ended


class EngineConnections:
    """One engine, or its replicas, by index. Empty before `open`."""

    def __init__(self, socks: Sequence[socket.socket], events: Events) -> None:
        """Takes over the sockets, those of `EngineProcess.clients`: of the engines, and with more
        than one also of their parent."""
        self._num = max(1, len(socks) - 1)
        self._socks = list(socks)
        self._on_outputs = weakref.WeakMethod(events.on_outputs)
        self._on_loss = weakref.WeakMethod(events.on_loss)
        self._on_restart = weakref.WeakMethod(events.on_restart)
        self._on_end = weakref.WeakMethod(events.on_end)
        self._engines: list[Connection] = []
        self._restarts: dict[int, asyncio.Task[None]] = {}  # of engines that are not ready

    def __len__(self) -> int:
        return len(self._engines)

    def __getitem__(self, index: int) -> Connection:
        return self._engines[index]

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._engines)

    async def open(self) -> None:
        for index, sock in enumerate(self._socks[: self._num]):
            self._engines.append(await self._connected(index, sock))
        for parent in self._socks[self._num :]:
            self._watch_restarts(parent)

    async def infos(self) -> list[EngineInfo]:
        """Wait until all are warm. Raises the error that `fail` was called with, and ValueError if
        they have loaded different models."""
        infos = await asyncio.gather(*(one.info for one in self._engines))
        check_agreement(infos, [f"replica {index}" for index in range(len(infos))])
        return infos

    def living(self) -> list[int]:
        return [index for index, engine in enumerate(self._engines) if not engine.is_lost]

    def send_add(self, engine: int, media: bytes, add: bytes) -> None:
        """Send an engine answers to begin. media: packed, b"" without any."""
        if media:
            self._engines[engine].send_packed(media)
        self._engines[engine].send(messages.ADD, add)

    def send_ends(self, engine: int, ids: list[int], reason: str) -> None:
        """Ask an engine to end these answers."""
        self._engines[engine].send(messages.END, messages.dump(End(ids, reason)))

    async def metrics(self) -> list[Metric]:
        """The sums over all engines."""
        return aggregate(await asyncio.gather(*(one.metrics() for one in self._engines)))

    async def ask_lora(self, name: str, payload: bytes) -> list[LoraReply]:
        asked = [self._engines[index].ask_lora(name, payload) for index in self.living()]
        return await asyncio.gather(*asked)

    def lose_all(self) -> None:
        for engine in self._engines:
            engine.is_lost = True

    def fail(self, error: Exception, later: Exception) -> None:
        """Raise `error` where the start of an engine is waited for, and `later` in what waits for a
        warm one."""
        for engine in self._engines:
            engine.fail(later if engine.info.done() else error)

    def close(self) -> None:
        """Called in the loop of `open`; may be called more than once."""
        for restart in self._restarts.values():
            restart.cancel()
        num = len(self._engines)
        others, self._socks = self._socks[num:], self._socks[:num]
        for parent in others:
            asyncio.get_running_loop().remove_reader(parent)
            parent.close()
        for engine in self._engines:
            engine.close()

    def close_sockets(self) -> None:
        """Do what `close` does where there is no loop, or no loop any more."""
        for sock in self._socks:
            sock.close()

    async def _connected(self, index: int, sock: socket.socket) -> Connection:
        on_outputs, on_loss = self._on_outputs, self._on_loss

        def take(payload: bytes) -> None:
            if (call := on_outputs()) is not None:
                call(index, payload)

        def lose() -> None:
            if (call := on_loss()) is not None:
                call(index)

        return await Connection.open(sock, take, lose)

    def _watch_restarts(self, parent: socket.socket) -> None:
        """Take the sockets of engines that are started again, until their parent's end."""
        loop, found = asyncio.get_running_loop(), weakref.ref(self)

        def take() -> None:
            engines, given = found(), handover.take(parent)
            if given is None or engines is None:
                loop.remove_reader(parent)
            if engines is not None and given is not None:
                engines._restart(*given)
            elif engines is not None and (call := engines._on_end()) is not None:
                call()

        loop.add_reader(parent, take)

    def _restart(self, index: int, sock: socket.socket) -> None:
        """An engine has been started again: it takes requests once it is warm."""
        if (earlier := self._restarts.get(index)) is not None:
            earlier.cancel()
        restarting = asyncio.get_running_loop().create_task(self._begin_again(index, sock))
        self._restarts[index] = restarting

    async def _begin_again(self, index: int, sock: socket.socket) -> None:
        engine = await self._connected(index, sock)
        engine.follow(self._engines[index])
        self._engines[index] = engine
        await asyncio.wait([engine.info])
        call = self._on_restart()
        if call is not None and engine.info.exception() is None:  # else the client has failed
            engine.is_lost = False
            call(index)
