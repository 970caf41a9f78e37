"""Which code computes attention: the device's own kernels ("triton" on a GPU), torch's, or flash-attn, as an engine asks.

The answer (`EngineSpec.attention`) is a key of `ops.ATTENTION`. It is bound to the region of a layer, so
each engine has its own, eager mode and graphs use the same one, and keys of stored programs hold it.
"""

from __future__ import annotations

import importlib.metadata
import platform as machine
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanovllm import platforms
from nanovllm.kernels import flash_attention
from nanovllm.kernels.flash_attention import Flash, Missing
from nanovllm.platforms.base import Platform

OWN = ""  # the device's own kernels for `paged_attention`


class Facts(NamedTuple):
    """What of a model and its cache a backend may refuse. block_size in tokens; None: the backend's choice."""

    dtype: torch.dtype
    head_dim: int
    block_size: int | None
    windows: Sequence[int]


def choose(name: str, platform: Platform, facts: Facts) -> str:
    """The key of `ops.ATTENTION` for an option's value; ValueError where it is missing here or cannot do what is asked."""
    if name == "auto":
        return OWN
    if platform.name == "cpu" and name == "sdpa":
        return name
    if platform.name != "cuda":
        others = "'auto' or 'sdpa'" if platform.name == "cpu" else "'auto'"
        raise ValueError(
            f"attention_backend {name!r} is not for the device {platform.name}: use {others}"
        )
    if name != "flash_attn":
        return OWN if name == "triton" else name
    flash = _flash(platform.device)
    if isinstance(flash, Missing):
        how = f": {flash.install}" if flash.install else ""
        raise ValueError(f"attention_backend is 'flash_attn', but {flash.why}{how}")
    block_size = facts.block_size or default_block_size(name, platform)
    problem = flash_attention.unsupported(
        flash,
        dtype=facts.dtype,
        head_dim=facts.head_dim,
        block_size=block_size,
        windows=facts.windows,
    )
    if problem:
        raise ValueError(f"attention_backend is 'flash_attn', but {problem}")
    return name


def default_block_size(backend: str, platform: Platform) -> int:
    """Tokens of a cache block where the user names none."""
    if backend == "flash_attn" and isinstance(flash := _flash(platform.device), Flash):
        return max(platform.default_block_size, flash_attention.PAGE_TOKENS[flash.generation])
    return platform.default_block_size


def recordable(backend: str, platform: Platform) -> tuple[bool, bool]:
    """Whether decode and prefill steps can be captured: a step that asks the host for lengths cannot."""
    if backend == "sdpa":
        return True, False
    if backend == "flash_attn":
        flash = _flash(platform.device)
        static = isinstance(flash, Flash) and flash_attention.is_static(flash)
        return static, static
    return True, True


def _flash(device: torch.device) -> Flash | Missing:
    return flash_attention.find(
        torch.cuda.get_device_capability(device), is_nvidia=torch.version.hip is None
    )


def attention_backend_info(device: str = "auto") -> str:
    """What `print_attention_backend_info` prints."""
    platform = platforms.select(device)
    versions = [f"torch {torch.__version__}", *_versions("triton", "flash-attn", "flash-attn-3")]
    if platform.name != "cuda":
        name = machine.processor() or machine.machine()
        own = f"runs with 'auto': the kernels for {platform.name}"
        sdpa = (
            "can run"
            if platform.name == "cpu"
            else f"not available: not for the device {platform.name}"
        )
        lines = [
            f"device       {platform.device} ({name})",
            f"installed    {', '.join(versions)}",
            f"own kernels  {own}",
            f"triton       not available: needs a GPU, and the device is {platform.name}",
            f"flash_attn   not available: needs a GPU, and the device is {platform.name}",
            f"sdpa         {sdpa}",
        ]
        return "\n".join(lines)
    properties = torch.cuda.get_device_properties(platform.device)
    capability = torch.cuda.get_device_capability(platform.device)
    runtime = (
        f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    )
    flash = _flash(platform.device)
    if isinstance(flash, Flash):
        page = flash_attention.PAGE_TOKENS[flash.generation]
        blocks = f", cache blocks of a multiple of {page} tokens" if page > 1 else ""
        flash_line = f"can run: flash-attn {flash.version}, interface {flash.generation}, fp16 and bf16{blocks}"
    else:
        flash_line = f"not available: {flash.why}" + (f"; {flash.install}" if flash.install else "")
    has_triton = bool(_versions("triton")) or bool(
        _versions("pytorch-triton-rocm", "pytorch-triton")
    )
    why = "it needs no package beside torch's, and divides a batch of unequal lengths evenly"
    if torch.version.hip is not None:
        why += "; on AMD it has been compiled and never run"
    elif capability < (8, 0):
        why += "; on this GPU without tensor cores, which Triton does not use before 8.0, and without bf16"
    elif capability[0] != 9:
        why += "; on this GPU it has been compiled and never run"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in platform.supported_dtypes)
    return "\n".join(
        [
            f"device       {platform.device} ({properties.name}, compute capability {capability[0]}.{capability[1]}, "
            f"{properties.total_memory / 2**30:.0f} GiB; {dtypes})",
            f"installed    {', '.join([*versions, runtime])}",
            f"triton       runs with 'auto': {why}"
            if has_triton
            else "triton       not available: pip install triton",
            f"flash_attn   {flash_line}",
            "sdpa         can run: torch's own; decode costs what max_model_len would, prefill steps are not captured",
        ]
    )


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
