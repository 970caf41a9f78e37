"""HCCL, the collectives of Ascend NPUs, as a backend of `Group`.

A GE graph names the communicator in its collective ops, so the communicator has the name of the
group. HCCL listens on the loopback interface and on ports chosen by the system, unless its
variables are set.
"""

from __future__ import annotations

import importlib
from datetime import timedelta
from typing import Any

from nanovllm import env

MAX_NAME_LENGTH = 32  # of a communicator, from torch_npu's documentation
# HCCL's settings, unless the user has set them.
_ENVIRONMENT = {
    "HCCL_SOCKET_IFNAME": "=lo",
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
    # Seconds that an op waits for other ranks: unlimited, since a rank may be compiling.
    "HCCL_EXEC_TIMEOUT": str(2**31 - 1),
    # else torch_npu ends the whole process when another rank fails, or writes traces to /tmp
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_HCCL_ENABLE_MONITORING": "0",
    "TORCH_HCCL_DUMP_ON_TIMEOUT": "0",
}


def connect(store: Any, rank: int, size: int, name: str, timeout: timedelta) -> Any:
    """A process group whose communicator has this name. Waits for all ranks.

    Raises ValueError if CANN names the communicator differently.
    """
    assert len(name) <= MAX_NAME_LENGTH, name
    for variable, value in _ENVIRONMENT.items():
        env.set_default(variable, value)
    backend: Any = importlib.import_module("torch_npu._C._distributed_c10d")
    options = backend.ProcessGroupHCCL.Options()
    options._timeout = timeout
    options.hccl_config = {"group_name": name}
    group = backend.ProcessGroupHCCL(store, rank, size, options)
    found = group.get_hccl_comm_name(rank)
    if found != name:
        raise ValueError(
            f"tensor_parallel_size is {size}: HCCL names its communicator {found!r} instead of "
            f"{name!r}, which graphs need. Install a CANN that supports communicator names"
        )
    return group
