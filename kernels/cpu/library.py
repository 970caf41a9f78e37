"""The library of `kernels.cpp`: compiled at first use (see `build.py`), called through ctypes.

There is no build step at installation. A call packs its arguments into the bytes of one C struct
(see `build.ArgumentStruct`). Dtypes and layouts that a kernel does not cover go to `reference/`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from nanovllm.kernels.cpu import build

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

ATTENTION = build.ArgumentStruct(
    "Attention",
    pointers="out q k_cache v_cache block_table seq_len q_start sinks ends",
    integers="q_stride_T q_stride_N k_stride_C k_stride_B k_stride_K v_stride_C v_stride_B "
    "v_stride_K table_stride_R num_tokens num_rows num_heads num_kv_heads head_dim block_size "
    "max_q_len window q_dtype kv_dtype ordered num_threads",
    floats="scale",
)
LINEAR = build.ArgumentStruct(
    "Linear",
    pointers="out x weight bias scale",
    integers="num_tokens num_outputs depth x_stride weight_stride dtype ordered num_threads",
)
WIDEN = build.ArgumentStruct(
    "Widen", pointers="out in", integers="num_rows size in_stride num_threads"
)
RMS_NORM = build.ArgumentStruct(
    "RmsNorm",
    pointers="out residual_out x residual weight",
    integers="num_tokens size dtype num_threads",
    floats="eps",
)
SILU_MUL = build.ArgumentStruct(
    "SiluMul", pointers="out gate_up", integers="num_tokens size dtype num_threads"
)
QK_NORM_ROPE_STORE = build.ArgumentStruct(
    "QkNormRopeStore",
    pointers="q_out qkv q_norm k_norm cos_sin pos slot k_cache v_cache",
    integers="qkv_stride cos_sin_stride k_stride_C k_stride_B k_stride_K v_stride_C v_stride_B "
    "v_stride_K num_tokens num_heads num_kv_heads head_dim block_size pos_bytes slot_bytes dtype "
    "num_threads",
    floats="eps",
)
SAMPLE = build.ArgumentStruct(
    "Sample",
    pointers="logits temperature seed pos token best token_of",
    integers="num_rows vocab_size row_stride first_token dtype num_threads",
)
TOKEN_BITMASK = build.ArgumentStruct(
    "TokenBitmask",
    pointers="out logits allowed row",
    integers="num_rows vocab_size row_stride num_words dtype num_threads",
)
_STRUCTS = (
    ATTENTION, LINEAR, WIDEN, RMS_NORM, SILU_MUL, QK_NORM_ROPE_STORE, SAMPLE, TOKEN_BITMASK,
)  # fmt: skip

_FUNCTIONS = (
    "nanovllm_apply_token_bitmask",
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
def load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = build.load(Path(__file__).with_name("kernels.cpp"), _STRUCTS)
    for name in _FUNCTIONS:
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    library.nanovllm_small_m_linear_max_tokens.argtypes = (ctypes.c_int64,)
    library.nanovllm_small_m_linear_max_tokens.restype = ctypes.c_int64
    library.nanovllm_loop.restype = ctypes.c_void_p
    library.nanovllm_replay.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    library.nanovllm_replay.restype = ctypes.c_int64
    lend_threads(library, library)
    return library


def lend_threads(owner: ctypes.CDLL, library: ctypes.CDLL) -> None:
    """Have `library` use the threads of `owner`, the library that `load` returns."""
    library.nanovllm_use_loop.argtypes = (ctypes.c_void_p,)
    library.nanovllm_use_loop.restype = None
    library.nanovllm_use_loop(owner.nanovllm_loop())


@functools.cache
def available() -> tuple[bool, str]:
    """(True, "") if the kernels compile and load on this machine, else (False, the reason)."""
    try:
        load()
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        return False, f"{type(error).__name__}: {error}"
    return True, ""
