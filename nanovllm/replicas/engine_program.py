"""The program of a process with an engine (`python -m`), or with its replicas as children.
Importing this module does not import torch, which reads the environment."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from nanovllm import env, log
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.parallel.serve import ERROR, connect, error_bytes
from nanovllm.replicas.engine_factory import one_engine, open_engine

if TYPE_CHECKING:
    from nanovllm.replicas.handshake import Fleet
    from nanovllm.replicas.replica import Event

logger = logging.getLogger(__name__)


def main() -> None:
    run(serve)


def run(work: Callable[[dict[str, Any], Channel], None]) -> None:
    """Connect, run `work`, and end this process once the other side closes the channel.

    `work` gets the setup and the channel, and raises ChannelClosed. Any other error is sent to the
    other side, which ends this process.
    """
    connection = connect(sys.argv[1:])
    env.replace(connection.setup["environment"])
    log.configure()
    channel = connection.channel
    with suppress(ChannelClosed):
        try:
            work(connection.setup, channel)
        except ChannelClosed:
            raise
        except Exception as error:
            if not isinstance(error, ValueError):
                traceback.print_exc()
            channel.send(ERROR, error_bytes(error))
            while True:
                channel.receive()
    sys.stderr.flush()
    os._exit(0)  # shutting down torch and the device's libraries takes a second


def serve(setup: dict[str, Any], channel: Channel) -> None:
    """Load an engine and let clients use it. Raises ChannelClosed once the other side closes."""
    inherited = list(chain.from_iterable(setup["clients"]))
    for descriptor in [*inherited, *setup["parents"]]:
        os.set_inheritable(descriptor, False)
    config = EngineConfig(**setup["options"])
    if len(setup["clients"]) > 1:
        serve_replicas(config, setup["clients"], setup["parents"], channel)
        return
    if setup["waits_for"] is not None:
        wait_for_programs(config, channel)
    is_alone = not config.replicas_option
    engine = one_engine(config, show_progress=False) if is_alone else open_engine(config)
    from nanovllm.replicas.client_conn import ClientConn
    from nanovllm.replicas.handshake import digest_of
    from nanovllm.replicas.loop import Loop

    info = engine.info
    info = info if info.checkpoint else replace(info, checkpoint=digest_of(config))
    clients = [ClientConn(socket.socket(fileno=one)) for one in inherited]
    gc.freeze()  # collecting garbage among so many objects delays steps by 0.1 s
    try:
        Loop(engine, clients, channel).run(info)
    finally:
        engine.close()


def serve_replicas(
    config: EngineConfig, clients: Sequence[Sequence[int]], parents: Sequence[int], channel: Channel
) -> None:
    """Start replicas, whose clients use these sockets, and start lost ones again.

    clients: file descriptors for each replica. parents: those on which each client gets new sockets
    (`handover.py`). Raises ChannelClosed once the other side closes, and ReplicaFailed when no
    replica is left.
    """
    from nanovllm.replicas.handshake import Fleet
    from nanovllm.replicas.machine import ProcessStarter
    from nanovllm.replicas.messages import READY
    from nanovllm.replicas.replica import Event, ReplicaFailed

    fleet = Fleet(ProcessStarter(config), config.data_parallel_size)
    to_clients = [socket.socket(fileno=one) for one in parents]
    try:
        fleet.start(clients)
        for descriptor in chain.from_iterable(clients):
            os.close(descriptor)  # a replica's end is that of its sockets
        channel.send(READY)

        def listen() -> None:
            with suppress(ChannelClosed):
                while True:
                    channel.receive()
            fleet.inbox.put(
                Event(fleet.replicas[0], "", b"", ChannelClosed("the parent has ended"))
            )

        threading.Thread(target=listen, name="parent", daemon=True).start()
        while not fleet.is_lost:
            event = fleet.inbox.get()
            if isinstance(event.failure, ChannelClosed):
                raise event.failure
            _start_again(fleet, event, to_clients)
        raise ReplicaFailed(f"no replica is left: {fleet.causes}")
    finally:
        fleet.close()


def _start_again(fleet: Fleet, event: Event, to_clients: Sequence[socket.socket]) -> None:
    """Start a replica again after its failure, and note that it is warm."""
    from nanovllm.replicas import handover

    replica, failure = event.replica, event.failure
    if replica is not fleet.replicas[replica.index] or replica.failure is not None:
        return  # another one has its place
    if failure is None:
        try:
            fleet.begin(replica, event.payload)
        except ValueError as error:
            failure = error
    if failure is not None:
        logger.error("a replica failed: %s", failure)
        with handover.new_sockets(to_clients, replica.index) as descriptors:
            fleet.restart(replica, failure, descriptors)


def wait_for_programs(config: EngineConfig, channel: Channel) -> None:
    """If the store lacks programs, wait until another replica has compiled them."""
    if config.enforce_eager or config.compile_cache_mode == "require":
        return
    from nanovllm.replicas.messages import GO
    from nanovllm.startup.artifacts import is_ready
    from nanovllm.startup.pooling import for_task
    from nanovllm.startup.resolve import resolve_without_weights

    if is_ready(for_task(resolve_without_weights(config))):
        return
    while channel.receive()[0] != GO:
        pass


if __name__ == "__main__":
    main()
