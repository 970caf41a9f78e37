"""CPU kernels: `cpu_kernels.cpp`, compiled at first use by the C++ compiler that Inductor uses, called through ctypes.

There is no build step at installation. The library is cached on disk by its source, flags and instruction set, and
Inductor's lock lets one process compile it. What a kernel does not cover (a dtype, a layout) goes to `reference.py`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ATTENTION_ARGS = struct.Struct("@7P 20q d")
_LINEAR_ARGS = struct.Struct("@4P 7q")
# Above these F.linear is as fast: measured at shapes from 1024 x 2048 to 151936 x 1024 (docs/log.md has the numbers).
_LINEAR_MAX_TOKENS = {torch.float32: 64, torch.bfloat16: 32}


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile (or find in the cache) and load the library; errors of the compiler go through."""
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    # -march=native stands in the cache key as those words: name what it meant, for cache folders that machines share
    source += f"\n// {torch.backends.cpu.get_cpu_capability()} {torch.cpu._is_avx512_bf16_supported()}\n"
    library = CppCodeCache.load(source, "cpu", extra_flags=("-ffp-contract=fast",))
    for name in ("nanovllm_paged_attention", "nanovllm_small_m_linear"):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return library


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernels can be compiled and loaded here, and the reason if not."""
    try:
        _load()
    except Exception as error:  # whatever a compiler or a loader raises, the answer is the same
        return False, f"{type(error).__name__}: {error}"
    return True, ""


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def paged_attention(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """`reference.paged_attention`, reading the pages in place; fp32, bf16 and fp16 queries over caches of any of them."""
    q_dtype, kv_dtype = _DTYPE_CODES.get(q_TNH.dtype), _DTYPE_CODES.get(k_cache_CBKH.dtype)
    if q_dtype is None or kv_dtype is None or v_cache_CBKH.dtype is not k_cache_CBKH.dtype:
        return reference.paged_attention(
            q_TNH, k_cache_CBKH, v_cache_CBKH, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, window
        )
    q_strides, k_strides, v_strides = q_TNH.stride(), k_cache_CBKH.stride(), v_cache_CBKH.stride()
    if q_strides[2] != 1:
        q_TNH = q_TNH.contiguous()
        q_strides = q_TNH.stride()
    if k_strides[3] != 1 or v_strides[3] != 1:
        raise ValueError(f"the caches' last dimension must be contiguous, got strides {k_strides} and {v_strides}")
    block_table_RP, seq_len_R, q_start_S = _int32(block_table_RP), _int32(seq_len_R), _int32(q_start_S)
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_rows, num_blocks = block_table_RP.shape
    out_TNH = q_TNH.new_empty((num_tokens, num_heads, head_dim))
    _load().nanovllm_paged_attention(
        _ATTENTION_ARGS.pack(
            out_TNH.data_ptr(),
            q_TNH.data_ptr(),
            k_cache_CBKH.data_ptr(),
            v_cache_CBKH.data_ptr(),
            block_table_RP.data_ptr(),
            seq_len_R.data_ptr(),
            q_start_S.data_ptr(),
            q_strides[0],
            q_strides[1],
            *k_strides[:3],
            *v_strides[:3],
            num_blocks,
            num_tokens,
            num_rows,
            num_heads,
            k_cache_CBKH.shape[2],
            head_dim,
            k_cache_CBKH.shape[1],
            max_q_len,
            window,
            q_dtype,
            kv_dtype,
            torch.get_num_threads(),
            scale,
        )
    )
    return out_TNH


def small_m_linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """`reference.small_m_linear` for up to 64 tokens in fp32 or 32 in bf16: the weights are read once, at memory speed."""
    dtype = x_TD.dtype
    if (
        x_TD.dim() != 2
        or x_TD.shape[0] > _LINEAR_MAX_TOKENS.get(dtype, 0)
        or weight_OD.dtype is not dtype
        or weight_OD.stride(1) != 1
        or (bias_O is not None and (bias_O.dtype is not dtype or not bias_O.is_contiguous()))
    ):
        return reference.small_m_linear(x_TD, weight_OD, bias_O)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_tokens, depth = x_TD.shape
    num_outputs = weight_OD.shape[0]
    out_TO = x_TD.new_empty((num_tokens, num_outputs))
    _load().nanovllm_small_m_linear(
        _LINEAR_ARGS.pack(
            out_TO.data_ptr(),
            x_TD.data_ptr(),
            weight_OD.data_ptr(),
            0 if bias_O is None else bias_O.data_ptr(),
            num_tokens,
            num_outputs,
            depth,
            x_TD.stride(0),
            weight_OD.stride(0),
            _DTYPE_CODES[dtype],
            torch.get_num_threads(),
        )
    )
    return out_TO


def register() -> None:
    """Compile or load the library and make its kernels the ops' CPU kernels; a second call changes nothing."""
    _load()
    ops.register_kernels("CPU", {"paged_attention": paged_attention, "small_m_linear": small_m_linear})
