"""Devices: one file each, chosen by name. Importing this package alone does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.platforms.base import Platform

DEVICES = ("auto", "cpu", "cuda", "npu", "mps")
INDEXED = ("cuda", "npu")


def select(
    device: str,
    *,
    npu_graph_mode: str | None = None,
    npu_graph_options: Mapping[str, object] | None = None,
    graph_batch_sizes: Sequence[int] | None = None,
) -> Platform:
    """The platform for "cpu", "cuda", "cuda:1", "npu", "npu:1", "mps" or "auto" (a GPU, an NPU or Apple's GPU if there is one).

    ValueError for a device that is not there, and for options of another device.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not (kind in INDEXED and index.isdigit())):
        raise ValueError(
            f"device {device!r} is not supported: use one of {', '.join(DEVICES)} or cuda:N, npu:N"
        )
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ValueError(
            "device 'cuda' was asked for, but torch sees no CUDA device: use device='cpu' or 'auto'"
        )
    if kind == "npu" or (kind == "auto" and not has_cuda and _has_npu()):
        return _npu(
            int(index or 0), npu_graph_mode or "ascend_ir", npu_graph_options, graph_batch_sizes
        )
    for name, value in (
        ("npu_graph_mode", npu_graph_mode),
        ("npu_graph_options", npu_graph_options),
    ):
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, but the device is {device!r}: it is an option of device 'npu'"
            )
    if kind == "cuda" or (kind == "auto" and has_cuda):
        from nanovllm.platforms.cuda import CudaPlatform

        if index and int(index) >= torch.cuda.device_count():
            raise ValueError(
                f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA device(s)"
            )
        return CudaPlatform(int(index or 0))
    if kind in ("auto", "mps"):
        from nanovllm.platforms import mps

        problem = mps.problem()
        if problem is None:
            return mps.MpsPlatform()
        if kind == "mps":
            raise ValueError(
                f"device 'mps' was asked for, but {problem}: use device='cpu' or 'auto'"
            )
    from nanovllm.platforms.cpu import CpuPlatform

    return CpuPlatform()


def _has_npu() -> bool:
    """Whether torch_npu is loaded, as torch does by itself where it is installed, and sees a device."""
    import torch

    module: Any = getattr(torch, "npu", None)
    return module is not None and module.is_available()


def _npu(
    index: int,
    graph_mode: str,
    graph_options: Mapping[str, object] | None,
    graph_batch_sizes: Sequence[int] | None,
) -> Platform:
    from nanovllm.platforms import npu

    npu.load_torch_npu()
    num_devices = npu.device_count()
    if index >= num_devices:
        raise ValueError(f"device 'npu:{index}' is not there: torch_npu sees {num_devices} NPU(s)")
    return npu.NpuPlatform(
        index,
        graph_mode=graph_mode,
        graph_options=graph_options,
        graph_batch_sizes=graph_batch_sizes,
    )


__all__ = ["DEVICES", "select"]
