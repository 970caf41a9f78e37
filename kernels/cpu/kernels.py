"""CPU kernels: `kernels.cpp`, compiled at first use (see `build.py`) and called through ctypes.

There is no build step at installation. Dtypes and layouts that a kernel does not cover go to
`reference/`. A call packs its arguments into the bytes of one C struct (see `build.Arguments`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import collectives, ops, reference
from nanovllm.kernels.cpu import build as cpp_build
from nanovllm.kernels.segments import segment_attention_cpu

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ATTENTION = cpp_build.Arguments(
    "Attention",
    pointers="out q k_cache v_cache block_table seq_len q_start",
    integers="q_stride_T q_stride_N k_stride_C k_stride_B k_stride_K v_stride_C v_stride_B "
    "v_stride_K table_stride_R num_tokens num_rows num_heads num_kv_heads head_dim block_size "
    "max_q_len window q_dtype kv_dtype num_threads",
    floats="scale",
)
_LINEAR = cpp_build.Arguments(
    "Linear",
    pointers="out x weight bias scale",
    integers="num_tokens num_outputs depth x_stride weight_stride dtype num_threads",
)
_WIDEN = cpp_build.Arguments(
    "Widen", pointers="out in", integers="num_rows size in_stride num_threads"
)
_RMS_NORM = cpp_build.Arguments(
    "RmsNorm",
    pointers="out residual_out x residual weight",
    integers="num_tokens size dtype num_threads",
    floats="eps",
)
_SILU_MUL = cpp_build.Arguments(
    "SiluMul", pointers="out gate_up", integers="num_tokens size dtype num_threads"
)
_QK_NORM_ROPE_STORE = cpp_build.Arguments(
    "QkNormRopeStore",
    pointers="q_out qkv q_norm k_norm cos_sin pos slot k_cache v_cache",
    integers="qkv_stride cos_sin_stride k_stride_C k_stride_B k_stride_K v_stride_C v_stride_B "
    "v_stride_K num_tokens num_heads num_kv_heads head_dim block_size pos_bytes slot_bytes dtype "
    "num_threads",
    floats="eps",
)
_SAMPLE = cpp_build.Arguments(
    "Sample",
    pointers="logits temperature seed pos token best",
    integers="num_rows vocab_size row_stride first_token dtype num_threads",
)
_KEEP_ALLOWED = cpp_build.Arguments(
    "KeepAllowed",
    pointers="out logits allowed row",
    integers="num_rows vocab_size row_stride num_words dtype num_threads",
)
_STRUCTS = (
    _ATTENTION, _LINEAR, _WIDEN, _RMS_NORM, _SILU_MUL, _QK_NORM_ROPE_STORE, _SAMPLE, _KEEP_ALLOWED,
)  # fmt: skip

# bf16 times int8: from _WIDEN_TOKENS tokens on, weights are widened to bf16 for torch's own
# product, _WIDEN_BYTES at a time so that they stay in a cache.
_WIDEN_TOKENS, _WIDEN_BYTES = 33, 4 << 20

_FUNCTIONS = (
    "nanovllm_keep_allowed",
    "nanovllm_linear_int8",
    "nanovllm_paged_attention",
    "nanovllm_qk_norm_rope_store",
    "nanovllm_rms_norm",
    "nanovllm_sample",
    "nanovllm_silu_mul",
    "nanovllm_small_m_linear",
    "nanovllm_widen_int8",
)


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = cpp_build.load(Path(__file__).with_suffix(".cpp"), _STRUCTS)
    for name in _FUNCTIONS:
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    library.nanovllm_small_m_linear_max_tokens.argtypes = (ctypes.c_int64,)
    library.nanovllm_small_m_linear_max_tokens.restype = ctypes.c_int64
    return library


@functools.cache
def available() -> tuple[bool, str]:
    """(True, "") if the kernels compile and load on this machine, else (False, the reason)."""
    try:
        _load()
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        return False, f"{type(error).__name__}: {error}"
    return True, ""


def register() -> None:
    """Compile or load the library and register its kernels for torch's dispatch key CPU.

    A second call changes nothing.
    """
    _load()
    ops.register_kernels("CPU", _KERNELS)


@functools.cache
def _linear_max_tokens(dtype: torch.dtype) -> int:
    code = _DTYPE_CODES.get(dtype)
    return 0 if code is None else _load().nanovllm_small_m_linear_max_tokens(code)


def prefers_own_linear(num_tokens: int, dtype: torch.dtype = torch.float32) -> bool:
    """True if our `linear` is faster than torch's for this many tokens."""
    return num_tokens <= _linear_max_tokens(dtype)


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _index(x: Tensor) -> Tensor:
    return (
        x if x.dtype in (torch.int32, torch.int64) and x.is_contiguous() else x.long().contiguous()
    )


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
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> Tensor:
    """`reference.attention.paged_attention`, which reads the pages in place, for fp32, bf16 and
    fp16.

    Queries and cache may differ in dtype. The blocks of an fp8 cache that the rows hold are first
    converted to fp32: this is correct, but no faster than a cache of a wider dtype.
    """
    if k_scale_K is not None and v_scale_K is not None:
        num_columns = -(-int(seq_len_R.max()) // k_cache_CBKH.shape[1])
        held, index = block_table_RP[:, :num_columns].long().unique(return_inverse=True)
        k_cache_CBKH = k_cache_CBKH[held].float() * k_scale_K[:, None]
        v_cache_CBKH = v_cache_CBKH[held].float() * v_scale_K[:, None]
        block_table_RP = index.int()
    q_dtype, kv_dtype = _DTYPE_CODES.get(q_TNH.dtype), _DTYPE_CODES.get(k_cache_CBKH.dtype)
    k_strides, v_strides = k_cache_CBKH.stride(), v_cache_CBKH.stride()
    if (
        q_dtype is None
        or kv_dtype is None
        or v_cache_CBKH.dtype is not k_cache_CBKH.dtype
        or k_strides[3] != 1
        or v_strides[3] != 1
    ):
        return reference.attention.paged_attention(
            q_TNH,
            k_cache_CBKH,
            v_cache_CBKH,
            block_table_RP,
            seq_len_R,
            q_start_S,
            max_q_len,
            scale,
            window,
        )
    if q_TNH.stride(2) != 1:
        q_TNH = q_TNH.contiguous()
    q_strides = q_TNH.stride()
    if block_table_RP.dtype is not torch.int32 or block_table_RP.stride(1) != 1:
        block_table_RP = _int32(block_table_RP)
    seq_len_R, q_start_S = _int32(seq_len_R), _int32(q_start_S)
    num_tokens, num_heads, head_dim = q_TNH.shape
    out_TNH = q_TNH.new_empty((num_tokens, num_heads, head_dim))
    _load().nanovllm_paged_attention(
        _ATTENTION.pack(
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
            block_table_RP.stride(0),
            num_tokens,
            block_table_RP.shape[0],
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


def linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """`reference.linear.linear`; adds the residual in place."""
    y_TO = _product(x_TD, weight_OD, bias_O)
    return y_TO if residual_TO is None else y_TO.add_(residual_TO)


def _product(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """x · weightᵀ + bias. With few tokens the weights are read once, at the speed of memory.

    With 512-bit vectors fp32 takes any number of tokens. Where F.linear is faster, F.linear runs.
    """
    dtype = x_TD.dtype
    if (
        x_TD.dim() != 2
        or x_TD.shape[0] > _linear_max_tokens(dtype)
        or weight_OD.dtype is not dtype
        or weight_OD.stride(1) != 1
        or (bias_O is not None and (bias_O.dtype is not dtype or not bias_O.is_contiguous()))
        or not x_TD.numel()
    ):
        return reference.linear.linear(x_TD, weight_OD, bias_O)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_tokens, depth = x_TD.shape
    num_outputs = weight_OD.shape[0]
    out_TO = x_TD.new_empty((num_tokens, num_outputs))
    _load().nanovllm_small_m_linear(
        _LINEAR.pack(
            out_TO.data_ptr(),
            x_TD.data_ptr(),
            weight_OD.data_ptr(),
            0 if bias_O is None else bias_O.data_ptr(),
            0,
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


def linear_int8(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.linear.linear_int8`; adds the residual in place.

    With few tokens the kernel streams the int8 weights. With many tokens and bf16, blocks of
    weights are widened to bf16 for torch's product, which rounds once more, before the scale.
    """
    dtype = x_TD.dtype
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or x_TD.dim() != 2
        or weight_OD.dtype is not torch.int8
        or weight_OD.stride(1) != 1
        or scale_O.dtype is not torch.float32
        or not scale_O.is_contiguous()
        or (bias_O is not None and (bias_O.dtype is not dtype or not bias_O.is_contiguous()))
        or not x_TD.numel()
    ):
        return reference.linear.linear_int8(x_TD, weight_OD, scale_O, bias_O, residual_TO)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_tokens, depth = x_TD.shape
    out_TO = x_TD.new_empty((num_tokens, weight_OD.shape[0]))
    if dtype is torch.bfloat16 and num_tokens >= _WIDEN_TOKENS:
        _linear_widened(out_TO, x_TD, weight_OD, scale_O, bias_O)
    else:
        _load().nanovllm_linear_int8(
            _LINEAR.pack(
                out_TO.data_ptr(),
                x_TD.data_ptr(),
                weight_OD.data_ptr(),
                0 if bias_O is None else bias_O.data_ptr(),
                scale_O.data_ptr(),
                num_tokens,
                weight_OD.shape[0],
                depth,
                x_TD.stride(0),
                weight_OD.stride(0),
                _DTYPE_CODES[dtype],
                torch.get_num_threads(),
            )
        )
    return out_TO if residual_TO is None else out_TO.add_(residual_TO)


def _linear_widened(
    out_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> None:
    depth = x_TD.shape[1]
    num_rows = max(64, _WIDEN_BYTES // (2 * depth) // 64 * 64)
    widened_OD = torch.empty((min(num_rows, weight_OD.shape[0]), depth), dtype=torch.bfloat16)
    for first in range(0, weight_OD.shape[0], num_rows):
        part_OD = weight_OD[first : first + num_rows]
        rows, end = part_OD.shape[0], first + part_OD.shape[0]
        _load().nanovllm_widen_int8(
            _WIDEN.pack(
                widened_OD.data_ptr(),
                part_OD.data_ptr(),
                rows,
                depth,
                part_OD.stride(0),
                torch.get_num_threads(),
            )
        )
        sum_TO = (
            torch.nn.functional.linear(x_TD, widened_OD[:rows]).float().mul_(scale_O[first:end])
        )
        out_TO[:, first:end] = sum_TO if bias_O is None else sum_TO.add_(bias_O[first:end])


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.norm_act.rms_norm` in one pass over the memory."""
    dtype = _DTYPE_CODES.get(x_TD.dtype)
    if dtype is None or weight_D.dtype is not x_TD.dtype:
        return reference.norm_act.rms_norm(x_TD, weight_D, eps)
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    out_TD, size = torch.empty_like(x_TD), x_TD.shape[-1]
    _load().nanovllm_rms_norm(
        _RMS_NORM.pack(
            out_TD.data_ptr(),
            0,
            x_TD.data_ptr(),
            0,
            weight_D.data_ptr(),
            x_TD.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
            eps,
        )
    )
    return out_TD


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.norm_act.add_rms_norm` in one pass over the memory."""
    dtype = _DTYPE_CODES.get(x_TD.dtype)
    if (
        dtype is None
        or residual_TD.dtype is not x_TD.dtype
        or weight_D.dtype is not x_TD.dtype
        or residual_TD.shape != x_TD.shape
    ):
        return reference.norm_act.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    x_TD, residual_TD, weight_D = x_TD.contiguous(), residual_TD.contiguous(), weight_D.contiguous()
    out_TD, sum_TD, size = torch.empty_like(x_TD), torch.empty_like(x_TD), x_TD.shape[-1]
    _load().nanovllm_rms_norm(
        _RMS_NORM.pack(
            out_TD.data_ptr(),
            sum_TD.data_ptr(),
            x_TD.data_ptr(),
            residual_TD.data_ptr(),
            weight_D.data_ptr(),
            x_TD.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
            eps,
        )
    )
    return out_TD, sum_TD


def silu_mul(gate_up_TG: Tensor) -> Tensor:
    """`reference.norm_act.silu_mul` in one pass over the memory."""
    dtype = _DTYPE_CODES.get(gate_up_TG.dtype)
    if dtype is None or gate_up_TG.shape[-1] % 2:
        return reference.norm_act.silu_mul(gate_up_TG)
    gate_up_TG = gate_up_TG.contiguous()
    size = gate_up_TG.shape[-1] // 2
    out_TF = gate_up_TG.new_empty((*gate_up_TG.shape[:-1], size))
    _load().nanovllm_silu_mul(
        _SILU_MUL.pack(
            out_TF.data_ptr(),
            gate_up_TG.data_ptr(),
            out_TF.numel() // max(size, 1),
            size,
            dtype,
            torch.get_num_threads(),
        )
    )
    return out_TF


def qk_norm_rope_store(
    qkv_TE: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    cos_sin_MH: Tensor,
    pos_T: Tensor,
    slot_T: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    num_heads: int,
    eps: float,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> Tensor:
    """`reference.rope_store.qk_norm_rope_store` in one pass over qkv."""
    dtype, code = qkv_TE.dtype, _DTYPE_CODES.get(qkv_TE.dtype)
    num_kv_heads, head_dim = k_cache_CBKH.shape[2:]
    k_strides, v_strides = k_cache_CBKH.stride(), v_cache_CBKH.stride()
    if (
        code is None
        or k_cache_CBKH.dtype is not dtype
        or v_cache_CBKH.dtype is not dtype
        or k_strides[3] != 1
        or v_strides[3] != 1
        or (q_norm_H is not None and q_norm_H.dtype is not dtype)
        or (k_norm_H is not None and k_norm_H.dtype is not dtype)
        or cos_sin_MH.dtype is not torch.float32
        or cos_sin_MH.shape[1] != head_dim
        or cos_sin_MH.stride(1) != 1
    ):
        return reference.rope_store.qk_norm_rope_store(
            qkv_TE,
            q_norm_H,
            k_norm_H,
            cos_sin_MH,
            pos_T,
            slot_T,
            k_cache_CBKH,
            v_cache_CBKH,
            num_heads,
            eps,
            k_scale_K,
            v_scale_K,
        )
    if qkv_TE.stride(1) != 1:
        qkv_TE = qkv_TE.contiguous()
    pos_T, slot_T = _index(pos_T), _index(slot_T)
    q_norm_H = None if q_norm_H is None else q_norm_H.contiguous()
    k_norm_H = None if k_norm_H is None else k_norm_H.contiguous()
    num_tokens = qkv_TE.shape[0]
    q_TNH = qkv_TE.new_empty((num_tokens, num_heads, head_dim))
    _load().nanovllm_qk_norm_rope_store(
        _QK_NORM_ROPE_STORE.pack(
            q_TNH.data_ptr(),
            qkv_TE.data_ptr(),
            0 if q_norm_H is None else q_norm_H.data_ptr(),
            0 if k_norm_H is None else k_norm_H.data_ptr(),
            cos_sin_MH.data_ptr(),
            pos_T.data_ptr(),
            slot_T.data_ptr(),
            k_cache_CBKH.data_ptr(),
            v_cache_CBKH.data_ptr(),
            qkv_TE.stride(0),
            cos_sin_MH.stride(0),
            *k_strides[:3],
            *v_strides[:3],
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            k_cache_CBKH.shape[1],
            pos_T.element_size(),
            slot_T.element_size(),
            code,
            torch.get_num_threads(),
            eps,
        )
    )
    return q_TNH


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """`reference.sample.sample` in one pass over the logits; an integer test avoids most
    logarithms."""
    if logits_RV.dtype not in _DTYPE_CODES:
        return reference.sample.sample(logits_RV, temperature_R, seed_R, pos_R)
    return _sample(logits_RV, temperature_R, seed_R, pos_R, 0, None)


def sample_columns(
    logits_RW: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, num_columns: int
) -> Tensor:
    """`collectives.sample_columns`; each rank does with its columns what `sample` does."""
    inputs = temperature_R, seed_R, pos_R
    if logits_RW.dtype not in _DTYPE_CODES:
        return collectives.sample_columns(logits_RW, *inputs, num_columns)
    first, num = collectives.own_columns(logits_RW.shape[1], num_columns)
    best_R = torch.empty(logits_RW.shape[0])
    token_R = _sample(logits_RW[:, :num], *inputs, first, best_R)
    return collectives.best_of_ranks(collectives.ordered(best_R, token_R))


def _sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
    first_token: int,
    best_R: Tensor | None,
) -> Tensor:
    """The best tokens of the columns of `first_token` and following ones. best_R gets their scores
    in fp32."""
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    temperature_R, seed_R, pos_R = (
        temperature_R.float().contiguous(),
        seed_R.contiguous(),
        pos_R.long().contiguous(),
    )
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
    _load().nanovllm_sample(
        _SAMPLE.pack(
            logits_RV.data_ptr(),
            temperature_R.data_ptr(),
            seed_R.data_ptr(),
            pos_R.data_ptr(),
            token_R.data_ptr(),
            0 if best_R is None else best_R.data_ptr(),
            *logits_RV.shape,
            logits_RV.stride(0),
            first_token,
            _DTYPE_CODES[logits_RV.dtype],
            torch.get_num_threads(),
        )
    )
    return token_R


def keep_allowed(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    """`reference.sample.keep_allowed`."""
    if logits_RV.dtype not in _DTYPE_CODES or allowed_SW.dtype is not torch.int32:
        return reference.sample.keep_allowed(logits_RV, allowed_SW, row_R)
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    allowed_SW, row_R = allowed_SW.contiguous(), row_R.long().contiguous()
    out_RV = torch.empty(logits_RV.shape, dtype=logits_RV.dtype)
    _load().nanovllm_keep_allowed(
        _KEEP_ALLOWED.pack(
            out_RV.data_ptr(),
            logits_RV.data_ptr(),
            allowed_SW.data_ptr(),
            row_R.data_ptr(),
            *logits_RV.shape,
            logits_RV.stride(0),
            allowed_SW.shape[1],
            _DTYPE_CODES[logits_RV.dtype],
            torch.get_num_threads(),
        )
    )
    return out_RV


_KERNELS: dict[str, Callable[..., object]] = {
    "add_rms_norm": add_rms_norm,
    "keep_allowed": keep_allowed,
    "paged_attention": paged_attention,
    "qk_norm_rope_store": qk_norm_rope_store,
    "rms_norm": rms_norm,
    "linear": linear,
    "linear_int8": linear_int8,
    "sample": sample,
    "sample_columns": sample_columns,
    "segment_attention": segment_attention_cpu,
    "silu_mul": silu_mul,
}
