"""What can be got ready without torch while that is imported, which takes seconds. Importing this does not import it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

# There where a driver is: NVIDIA's, AMD's, and either under WSL. Whether torch can use the device is found out later.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def may_have_gpu(device: str) -> bool:
    """Whether an engine on `device` may get a GPU, as far as files tell."""
    is_wanted = device.partition(":")[0] in ("auto", "cuda")
    return is_wanted and sys.platform == "linux" and any(map(os.path.exists, DRIVERS))


def begin(device: str) -> None:
    """Have Triton ready sooner, in a thread, for a GPU. What fails here fails again where it is needed."""
    if may_have_gpu(device):
        threading.Thread(target=_import_triton, daemon=True).start()


def _import_triton() -> None:
    with contextlib.suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()  # a digest of hundreds of megabytes, which the first launch asks for, and Triton keeps
