"""A Ray cluster: one of this machine's own, or a running one, and what a replica gets of it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm import env
from nanovllm.config import EngineConfig

# for the chunks on their way to replicas; Ray's own choice is a third of the machine's memory
OBJECT_STORE_BYTES = 1 << 30
MISSING = (
    "several replicas need Ray, which is not installed: pip install 'nanovllm[ray]', or use "
    "--no-ray for one engine"
)


def connect(address: str | None) -> Any:
    """Ray's module, connected to the cluster at `address`; None starts one on this machine.

    The processes of the latter listen on the loopback interface alone. Raises ValueError if Ray is
    not installed, or nothing answers at the address.
    """
    env.set_default("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Ray replaces a given 127.0.0.1 by the machine's address, and listens on all interfaces,
        # unless it is told that there is one machine only. It reads this when it is imported.
        env.set_default("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(MISSING) from None
    # Ray's own way to end on this signal would skip the job's
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _init(ray, address)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return ray


def _init(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster at {address!r}: {error}") from error


def share(config: EngineConfig, num: int, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The resources of each of `num` replicas, as Ray's options of an actor.

    nodes: the resources of each node. A replica gets whole GPUs, or an equal share of the CPUs.
    Raises ValueError if the nodes have less, and for a device that Ray does not share out.
    """
    device = config.device
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"device is {device!r}: Ray gives each replica its device, so it must be auto, cuda or "
            "cpu"
        )
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if device == "cuda" or (device == "auto" and any(gpus)):
        size = config.tensor_parallel_size
        if sum(one // size for one in gpus) < num:
            raise ValueError(
                f"{num} replicas need {size} GPU(s) each, on one node: the nodes of the Ray "
                f"cluster have {_listed(gpus)}"
            )
        return {"num_cpus": 0, "num_gpus": size}
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    for size in range(max(cpus, default=0), 0, -1):
        if sum(one // size for one in cpus) >= num:
            return {"num_cpus": size}
    raise ValueError(
        f"{num} replicas need 1 CPU each: the nodes of the Ray cluster have {_listed(cpus)}"
    )


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) or "none"
