"""Starts a server: the engine process and the API processes.

The supervisor runs this module. It imports only what it uses: every import delays the start of the
engine.
"""

from __future__ import annotations

import secrets

from nanovllm import log
from nanovllm.api import tls, traces
from nanovllm.api.address import bind
from nanovllm.api.config import ServerConfig
from nanovllm.api.keys import with_keys
from nanovllm.api.latencies import Latencies
from nanovllm.checks import to_options
from nanovllm.config import EngineConfig
from nanovllm.serving import supervisor

TARGET = "nanovllm.api.api_server:serve_clients"


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Implements `nanovllm.api.serve`."""
    log.configure()
    server = with_keys(server)
    tls.check(server)
    server.check_engine(engine)
    if server.otlp_traces_endpoint is not None:
        traces.check_installed()
    num_processes = server.num_api_processes(engine.data_parallel_size)
    with bind(server) as listener:
        service = supervisor.ServerProcesses(
            config=engine,
            target=TARGET,
            listener=listener,
            options={"server": to_options(server), "cache_secret": secrets.token_hex()},
            num_api_processes=num_processes,
            drain_timeout=server.drain_timeout,
            max_queued=server.max_queue_len,
            shared_bytes=num_processes * Latencies.SIZE_BYTES,
        )
        return supervisor.Supervisor(service).run()
