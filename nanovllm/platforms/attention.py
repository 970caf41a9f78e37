"""Chooses the attention backends of an engine: the device's own kernels, torch's or flash-attn.

The choice is `EngineSpec.attention`. Its keys of `ops.ATTENTION` are arguments of the layer region:
each engine has its own backends, eager mode and graphs use the same ones, and keys of stored
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
FLASH = "flash_attn_"  # and a generation

# Where "auto" uses flash-attn instead of our kernels, by measurement: GPU name → generation of
# flash-attn → head size → least tokens of a prefill step. For decode our kernels were faster.
# scripts/bench/attention_packages.py measures it, and docs/benchmarks.md has the times.
FASTER_PREFILL: dict[str, dict[int, dict[int, int]]] = {
    "NVIDIA H200": {3: {128: 4096}},
    "NVIDIA H100 80GB HBM3": {3: {128: 4096}},
}


class AttentionNeeds(NamedTuple):
    """Properties of a model and its cache that a backend may not support.

    block_size: tokens per cache block; None means the backend's default.
    cache_dtype: that of keys and values; None means the model's.
    has_latents: True if the cache holds latents, which our own kernels alone read.
    has_sinks: whether a layer has them.
    """

    dtype: torch.dtype
    head_dim: int
    block_size: int | None
    windows: Sequence[int]
    cache_dtype: torch.dtype | None = None
    has_latents: bool = False
    has_sinks: bool = False


class Attention(NamedTuple):
    """Keys of `ops.ATTENTION`: `prefill` for steps of several tokens a row that have at least
    `prefill_from` tokens, `shorter` for other such steps, and `decode`."""

    decode: str = OWN
    prefill: str = OWN
    shorter: str = OWN
    prefill_from: int = 0

    @classmethod
    def all_by(cls, key: str) -> Attention:
        return cls(key, key, key)

    def key(self, max_q_len: int, num_tokens: int) -> str:
        """The key for a program: the most tokens of a row, and its bucket's tokens."""
        if max_q_len == 1:
            return self.decode
        return self.prefill if num_tokens >= self.prefill_from else self.shorter

    def generation(self) -> int:
        """The generation of flash-attn in use; 0 without it."""
        keys = (self.prefill, self.decode)
        return next((int(key[-1]) for key in keys if key.startswith(FLASH)), 0)

    def describe(self) -> str:
        """A description for the log and `nanovllm info`."""
        if self.decode == self.prefill:
            return _name(self.prefill)
        return (
            f"decode: {_name(self.decode)}; prefill steps of {self.prefill_from} tokens and more: "
            f"{_name(self.prefill)}"
        )


def _name(key: str) -> str:
    if not key.startswith(FLASH):
        return key or "the device's own kernels"
    found = flash_attention.installed(int(key[-1]))
    name = f" ({found.name})" if isinstance(found, Flash) else ""
    return f"flash-attn {key[-1]}{name}"


def choose(name: str, platform: Platform, facts: AttentionNeeds) -> Attention:
    """The choice for a value of the option `attention_backend`.

    Raises ValueError if the backend is not for this device, not installed, or cannot run the model.
    """
    if facts.has_latents:
        if name not in ("auto", "triton"):
            raise ValueError(
                f"attention_backend is {name!r}, which does not read a cache of latents: use 'auto'"
            )
        return Attention()
    if name == "auto":
        return _fastest(platform, facts)
    offered = platform.traits.attention_backends
    if name not in offered:
        raise ValueError(
            f"attention_backend {name!r} is not for the device {platform.traits.name}: use "
            + " or ".join(map(repr, ("auto", *offered)))
        )
    if name != "flash_attn":
        return Attention.all_by(OWN if name == "triton" else name)
    found, missing = platform.flash_attn()
    problems = [_problem(flash, facts) for flash in found]
    for flash, problem in zip(found, problems, strict=True):
        if not problem:
            return Attention.all_by(f"{FLASH}{flash.generation}")
    if not found:
        how = f": {missing[0].install}" if missing[0].install else ""
        problems = ["; ".join(one.why for one in missing) + how]
    raise ValueError(f"attention_backend is 'flash_attn', but {'; '.join(problems)}")


def _fastest(platform: Platform, facts: AttentionNeeds) -> Attention:
    """Our own kernels, except for prefill where an installed package supports the model and is
    faster."""
    for generation, tokens in FASTER_PREFILL.get(platform.hardware_name(), {}).items():
        if facts.head_dim not in tokens or facts.cache_dtype not in (None, facts.dtype):
            continue
        flash = flash_attention.installed(generation)
        if isinstance(flash, Flash) and not _problem(flash, facts):
            key = f"{FLASH}{generation}"
            return Attention(prefill=key, prefill_from=tokens[facts.head_dim])
    return Attention()


def _problem(flash: Flash, facts: AttentionNeeds) -> str:
    return flash_attention.unsupported(
        flash,
        dtype=facts.dtype,
        head_dim=facts.head_dim,
        block_size=facts.block_size or 0,
        windows=facts.windows,
        has_sinks=facts.has_sinks,
    )


def default_block_size(
    attention: Attention, platform: Platform, head_dim: int, cache_dtype: torch.dtype | None = None
) -> int:
    """The default number of tokens per cache block.

    Blocks of an fp8 cache have twice as many: decode attention then reads tiles of as many bytes.
    """
    own = platform.traits.block_size
    flash = flash_attention.installed(attention.generation()) if attention.generation() else None
    if isinstance(flash, Flash):
        page = flash_attention.fast_page_tokens(flash, head_dim)
        return page * -(-own // page)
    return own * (2 if cache_dtype is torch.float8_e4m3fn else 1)


def recordable(attention: Attention) -> tuple[bool, bool]:
    """Whether (decode, prefill) steps can be captured: steps that wait for the host cannot."""
    if attention.generation():
        static = flash_attention.is_static(attention.generation())
        return static, static
    return True, attention.prefill != "sdpa"


def attention_backend_info(device: str = "auto") -> str:
    """The text of `print_attention_backend_info`."""
    rows = attention_facts(platforms.select(device))
    return "\n".join(f"{row:<13}{text}" for row, text in rows.items())


def attention_facts(platform: Platform) -> dict[str, str]:
    """The device, installed packages, and why each attention_backend can or cannot run."""
    name, offered = platform.traits.name, platform.traits.attention_backends
    versions = [
        f"torch {torch.__version__}",
        *_versions("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4"),
    ]
    rows = {
        "device": f"{platform.device} ({platform.describe()})",
        "installed": ", ".join(versions),
        "triton" if "triton" in offered else "own kernels": platform.own_attention(),
    }
    rows.setdefault("triton", f"not available: needs a GPU, and the device is {name}")
    rows["flash_attn"] = _flash_info(*platform.flash_attn())
    rows["sdpa"] = (
        "can run: torch's own; decode costs as much as at max_model_len, prefill is not captured"
        if "sdpa" in offered
        else f"not available: not for the device {name}"
    )
    return rows


def _flash_info(found: Sequence[Flash], missing: Sequence[Missing]) -> str:
    texts = [f"can run: {_flash_text(flash)}" for flash in found]
    for one in missing:
        texts.append(f"not available: {one.why}" + (f"; {one.install}" if one.install else ""))
    return ". ".join(texts)


def _flash_text(flash: Flash) -> str:
    dtypes = "bf16" if "FP16" in flash.lacks else "fp16 and bf16"
    page = flash_attention.page_tokens(flash, 128)
    note = f", cache blocks of a multiple of {page} tokens (heads of 128)" if page > 1 else ""
    windows = ", no windows" if "LOCAL" in flash.lacks or flash.generation == 1 else ""
    return f"{flash.name}, interface {flash.generation}, {dtypes}{windows}{note}"


def _versions(*packages: str) -> list[str]:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
