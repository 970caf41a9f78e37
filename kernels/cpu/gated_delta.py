"""The gated delta rule of decode steps on a CPU: `gated_delta.cpp`, called through ctypes as in
`library.py`.

The library is compiled or loaded at the first call, so models without such layers never wait for
it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu.library import DTYPE_CODES
from nanovllm.kernels.gated_delta import gated_delta_cpu

_GATED_DELTA_STEP = build.ArgumentStruct(
    "GatedDeltaStep",
    pointers="out qkv z ba conv a_log dt_bias norm conv_state state seq_len from is_new to",
    integers="num_rows num_taps key_heads value_heads key_size value_size "
    "qkv_stride z_stride ba_stride dtype state_dtype num_threads",
    floats="eps norm_eps",
)


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = build.load(Path(__file__).with_suffix(".cpp"), (_GATED_DELTA_STEP,))
    step = library.nanovllm_gated_delta_step
    step.argtypes, step.restype = (ctypes.c_char_p,), None
    cpu_library.lend_threads(cpu_library.load(), library)
    return library


def _by_rows(x: Tensor) -> Tensor:
    """The same numbers with the columns of a row next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def gated_delta_step(
    qkv_RC: Tensor,
    z_RP: Tensor,
    ba_RJ: Tensor,
    conv_CW: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    norm_I: Tensor,
    eps: float,
    conv_state_XWC: Tensor,
    state_XVHI: Tensor,
    seq_len_R: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """`reference.gated_delta.gated_delta_step` in one pass over the state."""
    qkv_RC, z_RP, ba_RJ = _by_rows(qkv_RC), _by_rows(z_RP), _by_rows(ba_RJ)
    conv_CW, num_rows = conv_CW.contiguous(), len(qkv_RC)
    dtypes = {x.dtype for x in (qkv_RC, z_RP, ba_RJ, conv_CW, norm_I, conv_state_XWC)}
    code, state_code = DTYPE_CODES.get(qkv_RC.dtype), DTYPE_CODES.get(state_XVHI.dtype)
    if code is None or state_code is None or len(dtypes) > 1:
        return reference.gated_delta.gated_delta_step(
            qkv_RC, z_RP, ba_RJ, conv_CW, a_log_V, dt_bias_V, norm_I, eps, conv_state_XWC,
            state_XVHI, seq_len_R, from_R, is_new_R, to_R,
        )  # fmt: skip
    _, num_heads, key_size, value_size = state_XVHI.shape
    num_keys = (qkv_RC.shape[1] - num_heads * value_size) // 2
    out_RP = torch.empty(z_RP.shape, dtype=z_RP.dtype)
    read = (qkv_RC, z_RP, ba_RJ, conv_CW, a_log_V, dt_bias_V, norm_I)
    updated, places = (conv_state_XWC, state_XVHI), (seq_len_R, from_R, is_new_R, to_R)
    _load().nanovllm_gated_delta_step(
        _GATED_DELTA_STEP.pack(
            *(tensor.data_ptr() for tensor in (out_RP, *read, *updated, *places)),
            num_rows,
            conv_CW.shape[1],
            num_keys // key_size,
            num_heads,
            key_size,
            value_size,
            qkv_RC.stride(0),
            z_RP.stride(0),
            ba_RJ.stride(0),
            code,
            state_code,
            torch.get_num_threads(),
            eps,
            reference.gated_delta.NORM_EPS,
        )
    )
    return out_RP


KERNELS: dict[str, Callable[..., object]] = {
    "gated_delta": gated_delta_cpu,
    "gated_delta_step": gated_delta_step,
}


def register() -> None:
    """Make these the ops' CPU kernels. The library is loaded at the first call."""
    ops.register_kernels("CPU", KERNELS)
