"""flash-attn's documented functions in plain torch.

They have its signatures, layouts, dtypes, limits and alignment of masks. Where the documentation
leaves something open, they do the worst it allows: outputs that belong to no row are NaN, and
arguments of another dtype or size than documented are refused. Source: docstrings of
flash_attn/flash_attn_interface.py (1.0, 2.5 and later), hopper/flash_attn_interface.py and
flash_attn/cute/interface.py (4.0.0b36) of https://github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import functools
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    *,
    bottom_right: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """One sequence: q [queries, heads, size], k and v [keys, heads, size].

    A query without keys gives zeros. A sink is the score of one more key of value 0.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    offset = num_keys - num_queries if bottom_right else 0
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    left, right = window
    right = 0 if causal else right
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if right >= 0:
        mask = mask.tril(offset + right)
    if left >= 0:
        mask = mask.triu(offset - left)
    score = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    score = score.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.double().view(-1, 1, 1).expand(-1, num_queries, 1)], -1)
    weight = score.softmax(-1).nan_to_num(0.0)[..., :num_keys]
    return torch.einsum("hqk,khd->qhd", weight, v).to(q.dtype)


def _pages(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    return cache[blocks.long()].flatten(0, 1)[:length]


def _check(q: Tensor, k: Tensor, v: Tensor, *int32: Tensor, max_head: int = 256) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= max_head and k.shape == v.shape
    assert q.shape[-2] % k.shape[-2] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in int32)


def _varlen_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    table: Tensor,
    max_q: int,
    *options: Any,
    **more: Any,
) -> Tensor:
    out = torch.full_like(q, float("nan"))
    for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        length = int(lengths[row])
        assert end - start <= max_q
        out[start:end] = _attend(
            q[start:end],
            _pages(k, table[row], length),
            _pages(v, table[row], length),
            *options,
            **more,
        )
    return out


def _decode_paged(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, *options: Any, **more: Any
) -> Tensor:
    assert q.dim() == 4 and q.shape[0] == lengths.shape[0] == table.shape[0]
    rows = [
        _attend(
            q[row],
            _pages(k, table[row], int(length)),
            _pages(v, table[row], int(length)),
            *options,
            **more,
        )
        for row, length in enumerate(lengths)
    ]
    return torch.stack(rows)


class Two:
    """flash-attn 2.x."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
        assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert cu_seqlens_q.shape == cu_seqlens_k.shape == (block_table.shape[0] + 1,)
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        assert max(lengths.tolist()) <= max_seqlen_k and dropout_p == softcap == 0.0
        return _varlen_paged(
            q,
            k,
            v,
            cu_seqlens_q,
            lengths,
            block_table,
            max_seqlen_q,
            softmax_scale,
            causal,
            window_size,
        )

    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        _check(q, k_cache, v_cache, cache_seqlens, block_table)
        assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert k is None and v is None
        return _decode_paged(
            q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, window_size
        )


class Three:
    """flash-attn 3, hopper/."""

    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        _check(q, k_cache, v_cache, cache_seqlens, page_table)
        options = (softmax_scale, causal, window_size)
        if cu_seqlens_q is None:
            return _decode_paged(q, k_cache, v_cache, cache_seqlens, page_table, *options)
        _check(q, k_cache, v_cache, cu_seqlens_q)
        return _varlen_paged(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, max_seqlen_q, *options
        )


class Four:
    """FlashAttention 4, flash_attn.cute, on Hopper.

    A row of queries without keys would read the entry before its block table.
    """

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
        scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        _check(q, k, v, seqused_k, page_table)
        assert num_splits == 1, "SplitKV not supported on SM 9.0"
        assert learnable_sink is None or learnable_sink.shape == (q.shape[-2],)
        options = (softmax_scale, causal, window_size)
        if cu_seqlens_q is None:
            assert all(seqused_k.tolist())
            out = _decode_paged(q, k, v, seqused_k, page_table, *options, sinks=learnable_sink)
            return out, None
        _check(q, k, v, cu_seqlens_q)
        has_queries = cu_seqlens_q[1:] > cu_seqlens_q[:-1]
        assert all(seqused_k[has_queries].tolist())
        rows = (cu_seqlens_q, seqused_k, page_table, max_seqlen_q)
        return _varlen_paged(q, k, v, *rows, *options, sinks=learnable_sink), None


class One:
    """flash-attn 1.x: as many key-value heads as query heads.

    Its causal mask is aligned to the first query and key.
    """

    @staticmethod
    def flash_attn_unpadded_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale=None, causal=False,
        return_attn_probs=False, deterministic=False,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_head=128)
        assert q.shape[1:] == k.shape[1:] and dropout_p == 0.0
        q_starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert (q_starts[-1], k_starts[-1]) == (q.shape[0], k.shape[0])
        out = torch.full_like(q, float("nan"))
        for row in range(len(q_starts) - 1):
            ours, theirs = (
                slice(q_starts[row], q_starts[row + 1]),
                slice(k_starts[row], k_starts[row + 1]),
            )
            assert (
                0 < ours.stop - ours.start <= max_seqlen_q
                and 0 < theirs.stop - theirs.start <= max_seqlen_k
            )
            out[ours] = _attend(
                q[ours], k[theirs], v[theirs], softmax_scale, causal, (-1, -1), bottom_right=False
            )
        return out


class Wheel(Three):
    """fa3-fwd 0.0.3: its build leaves out fp16, windows, and pages that hold no whole key tiles."""

    CONFIG = {  # noqa: RUF012
        "build_flags": {
            "FLASHATTENTION_DISABLE_FP16": True,
            "FLASHATTENTION_DISABLE_LOCAL": True,
            "FLASHATTENTION_DISABLE_PAGEDKV": True,
            "FLASHATTENTION_DISABLE_VARLEN": False,
            "FLASH_ATTENTION_DISABLE_HDIMDIFF64": False,
        }
    }

    @staticmethod
    @functools.wraps(Three.flash_attn_with_kvcache)
    def flash_attn_with_kvcache(q, k_cache, *args, **kwargs):
        assert q.dtype == torch.bfloat16, "This flash attention build does not support FP16."
        assert kwargs["window_size"] == (-1, -1), "This build does not support local attention."
        tile_q, tile_k = {64: (192, 128), 128: (128, 128), 256: (128, 80)}[q.shape[-1]]
        group = q.shape[-2] // k_cache.shape[2]
        rows = group * kwargs.get("max_seqlen_q", q.shape[1])
        assert k_cache.shape[1] % tile_k == 0 and rows > tile_q, "This build has no paged KV."
        return Three.flash_attn_with_kvcache(q, k_cache, *args, **kwargs)


# generation: (module, its functions, version, compute capability of a GPU that uses it)
FAKES: dict[int, tuple[str, type, str, tuple[int, int]]] = {
    1: ("flash_attn.flash_attn_interface", One, "1.0.9", (7, 5)),
    2: ("flash_attn", Two, "2.8.3", (8, 0)),
    3: ("flash_attn_interface", Three, "3.0.0", (9, 0)),
    4: ("flash_attn.cute", Four, "4.0.0b36", (9, 0)),
}


def install(monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    """Make `nanovllm.kernels.flash_attention` find only this generation, on a GPU that runs it."""
    remove(monkeypatch)
    add(monkeypatch, generation)
    pretend_capability(monkeypatch, FAKES[generation][3])


def install_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it find fa3-fwd alone, on a Hopper GPU."""
    remove(monkeypatch)
    _add(monkeypatch, "fa3_fwd_interface", Wheel, "0.0.3")
    pretend_capability(monkeypatch, (9, 0))
    config = ModuleType("fa3_fwd_config")
    config.CONFIG = Wheel.CONFIG  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", config)


def add(monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    """Make it find this generation as well."""
    name, functions, version, _ = FAKES[generation]
    _add(monkeypatch, name, functions, version)


def _add(monkeypatch: pytest.MonkeyPatch, name: str, functions: type, version: str) -> None:
    from nanovllm.kernels import flash_attention

    parent = name.partition(".")[0]
    package = sys.modules.get(parent)
    if package is None:
        package = ModuleType(parent)
        package.__path__ = [parent]  # a folder without __init__.py
    module = package if parent == name else ModuleType(name)
    if module is package:
        module.__path__ = []
    for key, function in vars(functions).items():
        if isinstance(function, staticmethod):
            setattr(module, key, function.__func__)
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, name, module)
    flash_attention._loaded.cache_clear()


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it find no flash-attn, whatever is installed."""
    from nanovllm.kernels import flash_attention

    for sources in flash_attention.SOURCES.values():
        for source in sources:
            monkeypatch.setitem(sys.modules, source.module, None)


def pretend_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
