"""What compiling processes have in common, and can be done once before they are forked. No device may be asked for anything."""

from __future__ import annotations

import importlib.util

# To find out whether there is a GPU torch then asks NVML: a process that has asked CUDA leaves its forks without it.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def import_compilers() -> None:
    """Import what tracing needs, symbolic shapes with Dynamo, and Triton with our kernels, where it is installed."""
    from torch._dynamo.source import ConstantSource  # noqa: F401
    from torch.fx.experimental import proxy_tensor, symbolic_shapes  # noqa: F401

    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.cache import triton_key

        from nanovllm.kernels import triton_kernels, triton_rehearsal, triton_step  # noqa: F401

        triton_key()  # a digest of all of Triton's files, which it keeps
