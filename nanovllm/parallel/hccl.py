"""HCCL, the collectives of Ascend NPUs, as the backend of a `Group`.

A graph of GE has the communicator's name in its collective ops, so the communicator gets the name
of the group. HCCL listens on the loopback interface and on ports that the system chooses, unless
its variables are set.
"""

from __future__ import annotations

import importlib
from datetime import timedelta
from typing import Any

from nanovllm import env

MAX_NAME_LENGTH = 32  # of a communicator, by torch_npu's documentation
# HCCL's settings, unless the user has set them.
_ENVIRONMENT = {
    "HCCL_SOCKET_IFNAME": "=lo",
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
    # Seconds that an op waits for other ranks: without limit, since a rank may compile meanwhile.
    "HCCL_EXEC_TIMEOUT": str(2**31 - 1),
    # torch_npu would end the whole process when another rank fails, or write traces to /tmp
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_HCCL_ENABLE_MONITORING": "0",
    "TORCH_HCCL_DUMP_ON_TIMEOUT": "0",
}


def connect(store: Any, rank: int, size: int, name: str, timeout: timedelta) -> Any:
    """A process group whose communicator has this name. Waits for all ranks.

    Raises ValueError if this CANN gives the communicator another name.
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
            f"tensor_parallel_size is {size}: HCCL calls its communicator {found!r} instead of "
            f"{name!r}, which graphs need. Install a CANN that can give communicators names"
        )
    return group
