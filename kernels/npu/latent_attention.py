"""Attention over latents on Ascend: in eager mode alone.

The attention itself is plain torch (`reference.latent_attention`), which reads lengths on the host
for prompts. So a graph cannot hold it.

Shapes: T tokens | N heads | P, H size of a head's query before and with its rotated part | L latent
size | r rotated size | Z = L + r | C blocks in the cache | B block size
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference


def latent_inputs(
    q_TNH: Tensor,
    key_NPL: Tensor,
    kv_TZ: Tensor,
    norm_L: Tensor,
    cos_sin_Mr: Tensor,
    pos_T: Tensor,
    slot_T: Tensor,
    cache_CBZ: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference.latent_attention.latent_inputs` by Ascend's norm, rotation and write, which goes
    to the whole cache tensor at (block, offset) as in `kernels.store_kv`."""
    plain_size, latent_size = key_NPL.shape[1:]
    latent_TL, key_Tr = kv_TZ.split([latent_size, kv_TZ.shape[1] - latent_size], dim=-1)
    latent_TL = ops.rms_norm(latent_TL.contiguous(), norm_L, eps)
    key_T1r = ops.rope(key_Tr.unsqueeze(1).contiguous(), cos_sin_Mr, pos_T)
    entry_TZ = torch.cat((latent_TL, key_T1r.squeeze(1)), dim=-1)
    block_size = cache_CBZ.shape[1]
    index_T2 = torch.stack((slot_T // block_size, slot_T % block_size), dim=-1)
    torch.ops.npu.npu_scatter_nd_update_(cache_CBZ, index_T2, entry_TZ)
    plain_TNP, rotated_TNr = q_TNH.split([plain_size, q_TNH.shape[2] - plain_size], dim=-1)
    absorbed_TNL = reference.latent_attention.head_linear(plain_TNP, key_NPL.transpose(1, 2))
    rotated_TNr = ops.rope(rotated_TNr.contiguous(), cos_sin_Mr, pos_T)
    return torch.cat((absorbed_TNL, rotated_TNr), dim=-1), entry_TZ


def no_graph(*args: object) -> Tensor:
    """Raises ValueError: no graph has this op."""
    raise ValueError(
        "attention over latents (DeepSeek-V2, DeepSeek-V3, GLM-4.7-Flash) has no graph on an NPU: "
        "use enforce_eager=True"
    )
