"""The program of the engine's process (`python -m`). Importing this module does not import
torch."""

from __future__ import annotations

import gc
import os
import socket
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import Channel
from nanovllm.replicas import server
from nanovllm.replicas.opening import one_engine, open_engine


def serve(setup: dict[str, Any], channel: Channel) -> None:
    """Load an engine and let clients use it. Raises ChannelClosed once the other side closes."""
    for descriptor in setup["ports"]:
        os.set_inheritable(descriptor, False)
    config = EngineConfig(**setup["options"])
    is_alone = not config.replicas_option
    engine = one_engine(config, show_progress=False) if is_alone else open_engine(config)
    from nanovllm.engine.engine import Engine  # these import torch
    from nanovllm.replicas.front import Replicas
    from nanovllm.replicas.loop import facts_of
    from nanovllm.serving.loop import Loop
    from nanovllm.serving.port import Port

    gc.freeze()  # garbage collection of so many objects would delay steps by 0.1 s
    ports = [Port(socket.socket(fileno=descriptor)) for descriptor in setup["ports"]]
    if isinstance(engine, Replicas):
        facts = engine.facts
    else:
        assert isinstance(engine, Engine)
        facts = facts_of(engine)
    try:
        Loop(engine, ports, channel).run(facts)
    finally:
        engine.close()


if __name__ == "__main__":
    server.run(serve)
