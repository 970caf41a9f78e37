"""States of rows on an NPU: the store, and the gated delta rule and Mamba-2's recurrence in plain
torch with that store.

Shapes: those of `reference.gated_delta` and `reference.ssd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import gated_delta as rule
from nanovllm.kernels import reference
from nanovllm.kernels import ssd as mixer


def store_state(x: Tensor, state: Tensor, index_N: Tensor) -> None:
    """Writes into the whole tensor, as `store_kv` does."""
    torch.ops.npu.npu_scatter_nd_update_(state, index_N.unsqueeze(-1), x.to(state.dtype))


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    state_XWC: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
    bias_C: Tensor | None = None,
) -> Tensor:
    """See `reference.gated_delta.causal_conv`."""
    y_TC, after_NWC, to_N = reference.gated_delta.convolved(
        x_TC, weight_CW, state_XWC, seq_len_R, q_start_S, from_R, to_R, to_T, bias_C
    )
    store_state(after_NWC, state_XWC, to_N)
    return y_TC


def gated_delta(
    qkv_TC: Tensor,
    ba_TJ: Tensor,
    a_log_V: Tensor,
    dt_bias_V: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """See `reference.gated_delta.gated_delta`."""
    out_TVI, after_NVHI, to_N = rule.computed(
        qkv_TC, ba_TJ, a_log_V, dt_bias_V, state_XVHI, q_start_S, from_R, is_new_R, to_R, to_T
    )
    store_state(after_NVHI, state_XVHI, to_N)
    return out_TVI


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
    """See `reference.gated_delta.gated_delta_step`."""
    y_RP, conv_RWC, after_RVHI = reference.gated_delta.stepped(
        qkv_RC, z_RP, ba_RJ, conv_CW, a_log_V, dt_bias_V, norm_I, eps, conv_state_XWC, state_XVHI,
        seq_len_R, from_R, is_new_R, to_R,
    )  # fmt: skip
    store_state(conv_RWC, conv_state_XWC, to_R)
    store_state(after_RVHI, state_XVHI, to_R)
    return y_RP


def ssd(
    xbc_TC: Tensor,
    dt_TV: Tensor,
    log_decay_TV: Tensor,
    state_XVHI: Tensor,
    q_start_S: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor | None = None,
    to_T: Tensor | None = None,
) -> Tensor:
    """See `reference.ssd.ssd`."""
    out_TVI, after_NVHI, to_N = mixer.computed(
        xbc_TC, dt_TV, log_decay_TV, state_XVHI, q_start_S, from_R, is_new_R, to_R, to_T
    )
    store_state(after_NVHI, state_XVHI, to_N)
    return out_TVI


def ssd_step(
    xbc_RC: Tensor,
    dt_RV: Tensor,
    log_decay_RV: Tensor,
    state_XVHI: Tensor,
    from_R: Tensor,
    is_new_R: Tensor,
    to_R: Tensor,
) -> Tensor:
    """See `reference.ssd.ssd_step`."""
    out_RVI, after_RVHI = reference.ssd.stepped(
        xbc_RC, dt_RV, log_decay_RV, state_XVHI, from_R, is_new_R
    )
    store_state(after_RVHI, state_XVHI, to_R)
    return out_RVI
