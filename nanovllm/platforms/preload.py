"""Slow preparations that run before or during the import of torch, which itself takes seconds.

`begin` starts threads in the engine's process: they import Triton and open the GPU. The other
functions run in the fork server of compile processes, so that every fork starts with all imports
done. Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

# Device files of GPU drivers: NVIDIA's, AMD's, and WSL's. torch may still be unable to use them.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def may_have_gpu(device: str) -> bool:
    """True if `device` allows a GPU and a GPU driver is present."""
    is_wanted = device.partition(":")[0] in ("auto", "cuda")
    return is_wanted and sys.platform == "linux" and any(map(os.path.exists, DRIVERS))


def begin(device: str) -> Callable[[], None]:
    """Start threads that import Triton and open the GPU.

    Returns a function that waits for these threads. Call it after importing torch and before
    changing os.environ: the CUDA driver reads it while it initialises. Errors are ignored here: the
    engine raises them again.
    """
    if not may_have_gpu(device):
        return lambda: None
    threading.Thread(target=_import_triton, daemon=True).start()
    if not _torch_is_for_cuda():
        return lambda: None
    # The driver reads os.environ meanwhile, and numpy, which torch imports, writes to it.
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401
    index = int(device.partition(":")[2] or 0)
    opening = threading.Thread(target=_open_device, args=(index,), daemon=True)
    opening.start()
    return opening.join


def _import_triton() -> None:
    with contextlib.suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()  # hashes hundreds of megabytes; Triton caches the result for the first launch


def _torch_is_for_cuda() -> bool:
    """True if the installed torch uses CUDA; otherwise a context would only take memory."""
    found = importlib.util.find_spec("torch")
    folders = found.submodule_search_locations if found is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())


def _open_device(index: int) -> None:
    """Create the GPU's primary context, which torch then uses. It takes 0.3 s on an H200."""
    with contextlib.suppress(OSError, AttributeError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


# Compile processes -------------------------------------------------------------------------

# Makes torch detect GPUs with NVML: CUDA does not work in forks of a process that initialised it.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

MAX_PROCESSES = 14  # compile processes of a cold start


def max_processes() -> int:
    """Number of compile processes: this machine's cores but two, at most 14.

    A cold start compiles about 60 Triton kernels, each for 0.1 to 1.5 s on one core.
    """
    return max(0, min(MAX_PROCESSES, (os.cpu_count() or 1) - 2))


def import_compilers() -> None:
    """Import the modules for tracing, and our Triton kernels where Triton is installed.

    No thread of this function is alive when it returns, so the process can be forked.
    """
    digest: threading.Thread | None = None
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.cache import triton_key

        from nanovllm.kernels.triton import dry_run as triton_dry_run  # noqa: F401
        from nanovllm.kernels.triton import register as triton_kernels  # noqa: F401
        from nanovllm.kernels.triton import step as triton_step  # noqa: F401

        digest = threading.Thread(target=triton_key)  # see _import_triton
        digest.start()

    from torch._dynamo.source import ConstantSource  # noqa: F401
    from torch.fx.experimental import proxy_tensor, symbolic_shapes  # noqa: F401

    if digest is not None:
        digest.join()


def build_driver() -> None:
    """Compile and load Triton's extension module for NVIDIA's driver; does not call the driver."""
    import torch

    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018
    except Exception:  # Triton raises many types; forks that need the module fail again
        logger.debug("Triton's extension module for the driver was not built", exc_info=True)
