"""What can be got ready without torch while that is imported, which takes seconds. Importing this does not import it."""

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

# There where a driver is: NVIDIA's, AMD's, and either under WSL. Whether torch can use the device is found out later.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def may_have_gpu(device: str) -> bool:
    """Whether an engine on `device` may get a GPU, as far as files tell."""
    is_wanted = device.partition(":")[0] in ("auto", "cuda")
    return is_wanted and sys.platform == "linux" and any(map(os.path.exists, DRIVERS))


def begin(device: str) -> Callable[[], None]:
    """Have a GPU and Triton ready sooner, in threads. What fails here fails again where it is needed.

    To be called of the result: once torch is imported, and before anything is written to the environment.
    """
    _say_where_bytecode_is_missing()
    if not may_have_gpu(device):
        return lambda: None
    threading.Thread(target=_import_triton, daemon=True).start()
    if not _torch_is_for_cuda():
        return lambda: None
    # The driver reads the environment, which nobody may write meanwhile. Torch's import does not, but that of numpy in it.
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401
    opening = threading.Thread(
        target=_open_device, args=(int(device.partition(":")[2] or 0),), daemon=True
    )
    opening.start()
    return opening.join


def _say_where_bytecode_is_missing() -> None:
    """torch is a thousand files of Python. Many containers have them without bytecode, and tell Python to write none."""
    torch = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if (
        torch is None
        or torch.origin is None
        or os.path.exists(importlib.util.cache_from_source(torch.origin))
    ):
        return
    site = Path(torch.origin).parents[1]
    if sys.dont_write_bytecode or not (sys.pycache_prefix or os.access(site, os.W_OK)):
        logger.info(
            "torch has no bytecode and every start compiles it anew, which takes some seconds; "
            "once and for all: %s -m compileall -q -j 0 %s", sys.executable, site,
        )  # fmt: skip


def _import_triton() -> None:
    with contextlib.suppress(ImportError, OSError):
        from triton.runtime.cache import triton_key

        triton_key()  # a digest of hundreds of megabytes, which the first launch asks for, and Triton keeps


def _torch_is_for_cuda() -> bool:
    """Whether the torch that will be imported would use NVIDIA's driver: for others a context only takes memory."""
    found = importlib.util.find_spec("torch")
    folders = found.submodule_search_locations if found is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())


def _open_device(index: int) -> None:
    """The device's primary context, 0.3 s on an H200, which torch finds there. It stays as long as the process, as torch's."""
    with contextlib.suppress(OSError, AttributeError):
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


# Processes that compile, before they are forked -------------------------------------------

# To find out whether there is a GPU torch then asks NVML: a process that has asked CUDA leaves its forks without it.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

MAX_PROCESSES = 14  # of a cold start


def max_processes() -> int:
    """As many as the cores are enough for: Triton compiles a kernel in 0.1 to 1.5 s on one core, and there are 60."""
    return max(0, min(MAX_PROCESSES, (os.cpu_count() or 1) - 2))


def import_compilers() -> None:
    """Import what tracing needs, symbolic shapes with Dynamo, and Triton with our kernels, where it is installed."""
    digest: threading.Thread | None = None
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.cache import triton_key

        from nanovllm.kernels.triton import register as triton_kernels  # noqa: F401
        from nanovllm.kernels.triton import rehearsal as triton_rehearsal  # noqa: F401
        from nanovllm.kernels.triton import step as triton_step  # noqa: F401

        digest = threading.Thread(
            target=triton_key
        )  # of Triton's files, hundreds of megabytes; it is kept
        digest.start()

    from torch._dynamo.source import ConstantSource  # noqa: F401
    from torch.fx.experimental import proxy_tensor, symbolic_shapes  # noqa: F401

    if digest is not None:
        digest.join()  # what forks has one thread


def build_driver() -> None:
    """Have what Triton needs to speak to NVIDIA's driver compiled, into its folder, and loaded; the driver is not asked."""
    import torch

    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018
    except Exception:  # Triton's own, of many kinds: each fork that needs the library fails again
        logger.debug("Triton's library for the driver is not built ahead", exc_info=True)
