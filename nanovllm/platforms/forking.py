"""What compiling processes have in common, and can be done once before they are forked. No device may be asked for anything.

Importing this does not import torch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading

logger = logging.getLogger(__name__)

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

        from nanovllm.kernels import triton_kernels, triton_rehearsal, triton_step  # noqa: F401

        digest = threading.Thread(target=triton_key)  # of Triton's files, hundreds of megabytes; it is kept
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
    except (
        Exception
    ):  # Triton's own, of many kinds: no GPU, no C compiler. Each fork that needs it fails again, and that is told.
        logger.debug("Triton's library for the driver is not built ahead", exc_info=True)
