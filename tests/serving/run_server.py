"""A server in a process of its own, for tests: `python -m tests.serving.run_server JSON`."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from nanovllm import log
from nanovllm.config import EngineConfig
from nanovllm.serving import engine_process, supervisor
from nanovllm.serving.supervisor import ServerProcesses, Supervisor


def main(given: dict[str, Any]) -> int:
    log.configure()
    if given.pop("is_fake", True):
        engine_process.PROGRAM = "tests.serving.fake_engine"
    for name, seconds in given.pop("times", {}).items():
        setattr(supervisor, name, seconds)
    config = EngineConfig(**given.pop("engine"))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    service = ServerProcesses(config, "tests.serving.api_target:run", listener, **given)
    try:
        return Supervisor(service).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
