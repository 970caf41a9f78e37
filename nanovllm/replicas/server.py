"""The program of a replica (`python -m`). Importing this module does not import torch, which reads
the environment."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nanovllm import env, log
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import Channel, ChannelClosed
from nanovllm.parallel.serve import ERROR, connect, error_bytes
from nanovllm.replicas.opening import one_engine


def main() -> None:
    """A replica's process."""
    run(serve)


def run(work: Callable[[dict[str, Any], Channel], None]) -> None:
    """Connect, do the work of this process, and end it once the other side closes the channel.

    `work` gets the setup and the channel, and raises ChannelClosed. Any other error goes to the
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
    os._exit(0)  # an orderly end of torch and the device's libraries would take a second


def serve(setup: dict[str, Any], channel: Channel) -> None:
    """Load an engine and let the front use it. Raises ChannelClosed once the front closes."""
    config = EngineConfig(**setup["options"])
    if setup["waits_for"] is not None:
        wait_for_programs(config, channel)
    engine = one_engine(config, show_progress=False)
    from nanovllm.replicas.loop import Loop  # imports torch

    gc.freeze()  # a collection among so many objects would delay steps by 0.1 s
    try:
        Loop(engine, channel).run()
    finally:
        engine.close()


def wait_for_programs(config: EngineConfig, channel: Channel) -> None:
    """If the store lacks programs, wait until another replica has compiled them."""
    if config.enforce_eager or config.compile_cache_mode == "require":
        return
    from nanovllm.replicas.messages import GO
    from nanovllm.startup.artifacts import is_ready
    from nanovllm.startup.choose import choose_without_weights

    if is_ready(choose_without_weights(config)):
        return
    while channel.receive()[0] != GO:
        pass


if __name__ == "__main__":
    main()
