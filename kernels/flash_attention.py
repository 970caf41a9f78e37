"""Paged attention by the optional flash-attn package, which is imported late.

Three interfaces, chosen by what is installed and what the GPU runs
(https://github.com/Dao-AILab/flash-attention):

- 3: module `flash_attn_interface`, for Hopper. Pages may have any size.
- 2: package `flash_attn` 2.5 and later with `block_table`, for Ampere and newer and for ROCm. Page
  sizes are multiples of 256 tokens.
- 1: package `flash_attn` 1.x, for Turing. It has no pages, so keys are gathered, and no windows. It
  needs the lengths on the host, so its steps cannot be captured. Its causal mask is aligned to the
  first query and the first key.

Interfaces 2 and 3 align the causal mask to the last query and the last key, as
`reference.attention.paged_attention` does. They give a window as (keys to the left, keys to the
right) of the query's own key. The adapter is written against the documented signatures and tested
against plain torch that implements them. It has not run on a GPU.

Shapes as in `reference`; U rows with keys and queries | G = N / K.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALL = {
    1: "pip install 'flash-attn<2' --no-build-isolation",
    2: "pip install flash-attn --no-build-isolation",
    3: "pip install 'git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper' "
    "--no-build-isolation",
}
MAX_HEAD_DIM = {1: 128, 2: 256, 3: 256}
DTYPES = (torch.float16, torch.bfloat16)
PAGE_TOKENS = {1: 1, 2: 256, 3: 1}  # a cache block must be a multiple


class Flash(NamedTuple):
    """An installed interface that the device runs: generation (see above), version and module."""

    generation: int
    version: str
    module: Any


class Missing(NamedTuple):
    """Why no interface is found, and the command that installs one ("" if none would run)."""

    why: str
    install: str


def find(capability: tuple[int, int], *, is_nvidia: bool = True) -> Flash | Missing:
    """The newest interface for a GPU of this compute capability."""
    if is_nvidia and capability < (7, 5):
        major, minor = capability
        return Missing(
            f"flash-attn needs compute capability 7.5 and this GPU has {major}.{minor}", ""
        )
    reasons = []
    if is_nvidia and capability[0] == 9:
        found = _import(
            "flash_attn_interface", "flash-attn-3", ("flash_attn_with_kvcache", "page_table")
        )
        if not isinstance(found, str):
            return Flash(3, *found)
        reasons.append(found)
    wanted = 1 if is_nvidia and capability < (8, 0) else 2
    if wanted == 2:
        found = _import("flash_attn", "flash-attn", ("flash_attn_with_kvcache", "block_table"))
    else:
        found = _import(
            "flash_attn.flash_attn_interface",
            "flash-attn",
            ("flash_attn_unpadded_func", "cu_seqlens_q"),
        )
    if not isinstance(found, str):
        return Flash(wanted, *found)
    return Missing("; ".join([*reasons, found]), INSTALL[wanted])


def _import(module_name: str, package: str, needs: tuple[str, str]) -> tuple[str, Any] | str:
    """(version, module), or the reason why not, as a string.

    The module may be absent, broken, or lack the function or the argument that we use.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = (
            isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        )
        return (
            f"{package} is not installed" if missing else f"{package} cannot be imported ({error})"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(module, "__version__", "of unknown version"))
    function, argument = getattr(module, needs[0], None), needs[1]
    if function is None or argument not in inspect.signature(function).parameters:
        return f"{package} {version} has no {needs[0]}(…, {argument})"
    return version, module


def unsupported(
    flash: Flash, *, dtype: torch.dtype, head_dim: int, block_size: int, windows: Iterable[int]
) -> str:
    """Why the interface cannot run a model, with value and limit; "" if it can."""
    name, dtype_name = f"flash-attn {flash.generation}", str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return f"dtype is {dtype_name}, and {name} computes in float16 and bfloat16 only"
    limit = MAX_HEAD_DIM[flash.generation]
    if head_dim > limit or head_dim % 8:
        return f"head size is {head_dim}, and {name} takes multiples of 8 up to {limit}"
    page = PAGE_TOKENS[flash.generation]
    if block_size % page:
        return f"kvcache_block_size is {block_size}, and {name} takes multiples of {page}"
    window = max(windows, default=0)
    if flash.generation == 1 and window > 0:
        return f"a layer has a window of {window} tokens, and {name} knows no windows"
    return ""


def is_static(flash: Flash) -> bool:
    """True if its steps can be captured: shapes are fixed and nothing is read on the host."""
    return flash.generation > 1


@functools.cache
def _for_device(device: torch.device) -> Flash:
    found = find(torch.cuda.get_device_capability(device), is_nvidia=torch.version.hip is None)
    if isinstance(found, Missing):
        raise RuntimeError(f"flash-attn cannot run: {found.why}; {found.install}")
    return found


def paged_attention_flash(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: None = None,
    v_scale_K: None = None,
) -> Tensor:
    """`reference.attention.paged_attention` for fp16 and bf16. Check `unsupported` first."""
    flash = _for_device(q_TNH.device)
    q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
    if flash.generation == 1:
        attend = _decode_unpaged if max_q_len == 1 else _prefill_unpaged
        return attend(
            flash, q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_len_R, q_start_S, scale
        )
    # our windows count the query's own key, flash-attn's do not
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (window - 1, 0) if window > 0 else (-1, -1),
    }
    table = {"page_table" if flash.generation == 3 else "block_table": block_table_RP}
    caches = (k_cache_CBKH, v_cache_CBKH)
    if max_q_len == 1:
        out_R1NH: Tensor = flash.module.flash_attn_with_kvcache(
            q_TNH.unsqueeze(1), *caches, cache_seqlens=seq_len_R, **table, **options
        )
        return out_R1NH.squeeze(1)
    if flash.generation == 3:
        out_TNH: Tensor = flash.module.flash_attn_with_kvcache(
            q_TNH,
            *caches,
            cache_seqlens=seq_len_R,
            cu_seqlens_q=q_start_S,
            max_seqlen_q=max_q_len,
            **table,
            **options,
        )
    else:
        k_start_S = torch.nn.functional.pad(seq_len_R.cumsum(0, dtype=torch.int32), (1, 0))
        max_len = block_table_RP.shape[1] * k_cache_CBKH.shape[1]
        out_TNH = flash.module.flash_attn_varlen_func(
            q_TNH, *caches, q_start_S, k_start_S, max_q_len, max_len, **table, **options
        )
    # flash-attn does not write tokens that belong to no row
    token_T = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    is_owned_T = (token_T >= q_start_S[0]) & (token_T < q_start_S[-1])
    return torch.where(is_owned_T[:, None, None], out_TNH, 0)


def _gathered(cache_CBKH: Tensor, block_table_RP: Tensor, lengths: dict[int, int]) -> Tensor:
    """The cached tokens of some rows ({row: length}), concatenated."""
    block_size = cache_CBKH.shape[1]
    return torch.cat(
        [
            cache_CBKH[block_table_RP[row, : -(-length // block_size)].long()].flatten(0, 1)[
                :length
            ]
            for row, length in lengths.items()
        ]
    )


def _starts(lengths: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _decode_unpaged(
    flash: Flash,
    q_RNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    scale: float,
) -> Tensor:
    """The G query heads of a key-value head become G queries of it, all of which see all keys."""
    out_RNH = torch.zeros(q_RNH.shape, dtype=q_RNH.dtype, device=q_RNH.device)
    lengths = {row: length for row, length in enumerate(seq_len_R.tolist()) if length}
    if not lengths:
        return out_RNH
    rows, num_kv_heads = list(lengths), k_cache_CBKH.shape[2]
    q_UGKH = q_RNH[rows].unflatten(1, (num_kv_heads, -1)).transpose(1, 2)
    group = q_UGKH.shape[1]
    out = flash.module.flash_attn_unpadded_func(
        q_UGKH.flatten(0, 1),
        _gathered(k_cache_CBKH, block_table_RP, lengths),
        _gathered(v_cache_CBKH, block_table_RP, lengths),
        _starts([group] * len(rows), q_RNH.device),
        _starts(lengths.values(), q_RNH.device),
        group,
        max(lengths.values()),
        0.0,
        softmax_scale=scale,
        causal=False,
    )
    out_RNH[rows] = out.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)
    return out_RNH


def _prefill_unpaged(
    flash: Flash,
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    scale: float,
) -> Tensor:
    """Pads each row's queries in front to the number of its keys.

    With as many queries as keys, both alignments of the causal mask are the same.
    """
    starts = q_start_S.tolist()
    num_queries = [end - start for start, end in itertools.pairwise(starts)]
    lengths = {
        row: length for row, length in enumerate(seq_len_R.tolist()) if length and num_queries[row]
    }
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    if not lengths:
        return out_TNH
    group = q_TNH.shape[1] // k_cache_CBKH.shape[2]
    # indices of a row's last queries among the padded ones, and among all
    padded_at: list[int] = []
    token_at: list[int] = []
    end = 0
    for row, length in lengths.items():
        end += length
        num = min(num_queries[row], length)
        padded_at += range(end - num, end)
        token_at += range(starts[row + 1] - num, starts[row + 1])
    q = torch.zeros((end, *q_TNH.shape[1:]), dtype=q_TNH.dtype, device=q_TNH.device)
    q[padded_at] = q_TNH[token_at]
    start = _starts(lengths.values(), q_TNH.device)
    longest = max(lengths.values())
    out = flash.module.flash_attn_unpadded_func(
        q,
        _gathered(k_cache_CBKH, block_table_RP, lengths).repeat_interleave(group, dim=1),
        _gathered(v_cache_CBKH, block_table_RP, lengths).repeat_interleave(group, dim=1),
        start,
        start,
        longest,
        longest,
        0.0,
        softmax_scale=scale,
        causal=True,
    )
    out_TNH[token_at] = out[padded_at]
    return out_TNH
