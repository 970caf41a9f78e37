"""Chooses the attention backend of an engine: the device's own kernels, torch's or flash-attn.

The choice is `EngineSpec.attention`, a key of `ops.ATTENTION`. It is an argument of the layer
region: each engine has its own backend, eager mode and graphs use the same one, and keys of stored
programs differ between backends.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanovllm import platforms
from nanovllm.kernels import flash_attention
from nanovllm.kernels.flash_attention import Flash, Missing
from nanovllm.platforms.base import Platform

OWN = ""  # the device's own kernels for `paged_attention`


class Facts(NamedTuple):
    """Properties of a model and its cache that a backend may not support.

    block_size: tokens per cache block; None means the backend's default.
    """

    dtype: torch.dtype
    head_dim: int
    block_size: int | None
    windows: Sequence[int]


def choose(name: str, platform: Platform, facts: Facts) -> str:
    """The key of `ops.ATTENTION` for a value of the option `attention_backend`.

    Raises ValueError if the backend is not for this device, not installed, or cannot run the model.
    """
    if name == "auto":
        return OWN
    offered = platform.traits.attention_backends
    if name not in offered:
        raise ValueError(
            f"attention_backend {name!r} is not for the device {platform.traits.name}: use "
            + " or ".join(map(repr, ("auto", *offered)))
        )
    if name != "flash_attn":
        return OWN if name == "triton" else name
    flash = platform.flash_attn()
    if isinstance(flash, Missing):
        how = f": {flash.install}" if flash.install else ""
        raise ValueError(f"attention_backend is 'flash_attn', but {flash.why}{how}")
    problem = flash_attention.unsupported(
        flash,
        dtype=facts.dtype,
        head_dim=facts.head_dim,
        block_size=facts.block_size or default_block_size(name, platform),
        windows=facts.windows,
    )
    if problem:
        raise ValueError(f"attention_backend is 'flash_attn', but {problem}")
    return name


def default_block_size(
    backend: str, platform: Platform, cache_dtype: torch.dtype | None = None
) -> int:
    """Tokens per cache block if the user does not set them.

    Blocks of an fp8 cache have twice as many: decode attention then reads tiles of as many bytes.
    """
    if backend == "flash_attn" and isinstance(flash := platform.flash_attn(), Flash):
        return max(platform.traits.block_size, flash_attention.PAGE_TOKENS[flash.generation])
    return platform.traits.block_size * (2 if cache_dtype is torch.float8_e4m3fn else 1)


def recordable(backend: str, platform: Platform) -> tuple[bool, bool]:
    """Whether (decode, prefill) steps can be captured: steps that wait for the host cannot."""
    if backend == "sdpa":
        return True, False
    if backend == "flash_attn":
        flash = platform.flash_attn()
        static = isinstance(flash, Flash) and flash_attention.is_static(flash)
        return static, static
    return True, True


def attention_backend_info(device: str = "auto") -> str:
    """The text of `print_attention_backend_info`."""
    rows = attention_facts(platforms.select(device))
    return "\n".join(f"{row:<13}{text}" for row, text in rows.items())


def attention_facts(platform: Platform) -> dict[str, str]:
    """The device, what is installed, and why each attention_backend can or cannot run."""
    name, offered = platform.traits.name, platform.traits.attention_backends
    versions = [f"torch {torch.__version__}", *_versions("triton", "flash-attn", "flash-attn-3")]
    rows = {
        "device": f"{platform.device} ({platform.describe()})",
        "installed": ", ".join(versions),
        "triton" if "triton" in offered else "own kernels": platform.own_attention(),
    }
    rows.setdefault("triton", f"not available: needs a GPU, and the device is {name}")
    rows["flash_attn"] = _flash_info(platform.flash_attn())
    rows["sdpa"] = (
        "can run: torch's own; decode costs as much as at max_model_len, prefill is not captured"
        if "sdpa" in offered
        else f"not available: not for the device {name}"
    )
    return rows


def _flash_info(flash: Flash | Missing) -> str:
    if isinstance(flash, Missing):
        return f"not available: {flash.why}" + (f"; {flash.install}" if flash.install else "")
    page = flash_attention.PAGE_TOKENS[flash.generation]
    note = f", cache blocks of a multiple of {page} tokens" if page > 1 else ""
    return f"can run: flash-attn {flash.version}, interface {flash.generation}, fp16 and bf16{note}"


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
