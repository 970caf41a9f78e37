"""Devices: one file each, chosen by name."""

from __future__ import annotations

import torch

from nanovllm.platforms.base import Platform

DEVICES = ("auto", "cpu", "cuda", "mps")


def select(device: str) -> Platform:
    """The platform for "cpu", "cuda", "cuda:1", "mps" or "auto" (a GPU if there is one: CUDA's, then Apple's)."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device {device!r} is not supported: use one of {', '.join(DEVICES)} or cuda:N")
    has_cuda = torch.cuda.is_available()
    if kind == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device: use device='cpu' or 'auto'")
    if kind == "cuda" or (kind == "auto" and has_cuda):
        from nanovllm.platforms.cuda import CudaPlatform

        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA device(s)")
        return CudaPlatform(int(index or 0))
    if kind in ("auto", "mps"):
        from nanovllm.platforms import mps

        problem = mps.problem()
        if problem is None:
            return mps.MpsPlatform()
        if kind == "mps":
            raise ValueError(f"device 'mps' was asked for, but {problem}: use device='cpu' or 'auto'")
    from nanovllm.platforms.cpu import CpuPlatform

    return CpuPlatform()


__all__ = ["DEVICES", "Platform", "select"]
