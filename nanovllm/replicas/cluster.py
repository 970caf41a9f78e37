"""Ray clusters: connecting to one, and the resources of each replica.

Does not import torch.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm import env, extras
from nanovllm.config import EngineConfig
from nanovllm.platforms import DEVICES

logger = logging.getLogger(__name__)

# for the chunks sent to replicas; Ray's default is a third of the machine's memory
OBJECT_STORE_BYTES = 1 << 30


def connect(address: str | None, user: str) -> Any:
    """Ray's module, connected to the cluster at `address`; None starts one on this machine.

    A cluster started here listens only on the loopback interface. `user` is the option that needs
    Ray. Raises ValueError if Ray is not installed or the address does not respond.
    """
    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"the address of the Ray cluster is {address!r}: Ray's client is not supported, use "
            "HOST:PORT on a machine of the cluster"
        )
    env.set_default("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Unless told that there is only one machine, Ray replaces 127.0.0.1 by the machine's
        # address and listens on all interfaces. It reads this variable at import.
        env.set_default("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray._private import ray_constants
    except ImportError:
        raise ValueError(
            f"{user} needs Ray, which is not installed: {extras.install('ray')}"
        ) from None
    if address is None and ray_constants.ENABLE_RAY_CLUSTER:
        raise ValueError(
            f"{user} would start Ray on all network interfaces, because Ray is already imported: "
            "call ray.init() first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 for Ray on this "
            "machine only"
        )
    # Ray's handler of this signal would replace the job's
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _init(ray, address)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return ray


class _Folders(list[str]):
    """The first folders of Ray processes' module path. Ray adds the driver's working directory and
    the folder of its script, which would come before the standard library."""

    def extend(self, folders: Iterable[str]) -> None:
        """Adds nothing."""


def _job(ray: Any) -> Any:
    """A job whose actors import this package from its location here, and nothing from the working
    directory, which may belong to another user."""
    root = str(Path(__file__).absolute().parents[2])
    return ray.job_config.JobConfig(_py_driver_sys_path=_Folders([root]))


def _init(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "job_config": _job(ray),
    }
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


@contextmanager
def closing() -> Iterator[None]:
    """Log Ray's errors during cleanup at DEBUG: an actor, a node or the cluster may be gone, and
    Ray has many error types for that."""
    try:
        yield
    except Exception:
        logger.debug("Ray failed during cleanup", exc_info=True)


class Shared:
    """A connection to Ray shared by several engines of this process.

    While an engine uses it, Ray's functions do not connect automatically. Otherwise a call in an
    engine's thread during the user's `ray.shutdown()` could start another cluster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users, self._is_own = 0, False
        self._connects_by_itself = True  # Ray's setting before the first engine

    def open(self, user: str, address: str | None) -> Any:
        """Ray's module, connected: to what this process is connected to already, else to the
        cluster at this address, else to one of this machine's own. Raises ValueError as `connect`
        does."""
        with self._lock:
            ray = sys.modules.get("ray")
            if ray is None or not ray.is_initialized():
                ray = connect(address, user)
                self._is_own = True
            if self._num_users == 0:
                self._connects_by_itself = _connect_by_itself(False)
            self._num_users += 1
            return ray

    def close(self) -> None:
        """Disconnect after the last user, unless Ray was connected before the first one."""
        with self._lock:
            self._num_users -= 1
            if self._num_users:
                return
            try:
                if self._is_own:
                    self._is_own = False
                    sys.modules["ray"].shutdown()
            finally:
                _connect_by_itself(self._connects_by_itself)


def _connect_by_itself(allowed: bool) -> bool:
    """Set whether Ray's functions connect automatically. Returns the previous setting.

    Ray's environment variable for this is read only once, at import.
    """
    from ray._private import auto_init_hook

    before, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, allowed
    return bool(before)


SHARED = Shared()


def share(config: EngineConfig, num: int, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The resources of each of `num` replicas, as options of a Ray actor.

    nodes: each node's resources. A replica gets a whole GPU per rank, or an equal share of the
    CPUs. Raises ValueError if the nodes have too little, and for a device that Ray does not
    manage.
    """
    kinds = {name: entry.ray_resource for name, entry in DEVICES.items() if entry.ray_resource}
    if config.device not in ("auto", *kinds):
        *names, last = ("auto", *kinds)
        raise ValueError(
            f"device is {config.device!r}: Ray assigns the devices of replicas, so it must be "
            f"{', '.join(names)} or {last}"
        )
    wanted = list(kinds.values()) if config.device == "auto" else [kinds[config.device]]
    kind = next((one for one in wanted if any(node.get(one, 0) for node in nodes)), wanted[-1])
    counts = [int(node.get(kind, 0)) for node in nodes]
    least = config.tensor_parallel_size
    most = least if kind != "CPU" else max(counts, default=0)
    for size in range(most, least - 1, -1):
        if sum(one // size for one in counts) >= num:
            return {"num_cpus": size} if kind == "CPU" else {"num_cpus": 0, "num_gpus": size}
    replicas = "1 replica needs" if num == 1 else f"{num} replicas need"
    raise ValueError(
        f"{replicas} {least} {kind}(s){' each' if num > 1 else ''}, on one node: the nodes of the "
        f"Ray cluster have {', '.join(map(str, counts)) or 'none'}"
    )
