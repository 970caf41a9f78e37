"""The audio encoder of Qwen2.5-Omni: the encoder of Whisper (Radford et al. 2022,
https://arxiv.org/abs/2212.04356) on chunks of two seconds, and a mean of every two positions
(Xu et al. 2025, https://arxiv.org/abs/2503.20215). Letters are in `interface`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad

from nanovllm.kernels import ops
from nanovllm.models.audio.audio_encoder import AudioConfig, AudioMerger, AudioOuter, AudioTower
from nanovllm.models.model import Param

NAME = "Qwen2_5OmniThinkerForConditionalGeneration"
MAX_TIMESCALE = 10000.0  # of the sinusoids


class AudioBlock(NamedTuple):
    """Weights of one block. Keys have no bias."""

    attn_norm_D: Tensor
    attn_norm_bias_D: Tensor
    qkv_ED: Tensor
    q_bias_D: Tensor
    v_bias_D: Tensor
    out_DD: Tensor
    out_bias_D: Tensor
    mlp_norm_D: Tensor
    mlp_norm_bias_D: Tensor
    up_UD: Tensor
    up_bias_U: Tensor
    down_DU: Tensor
    down_bias_D: Tensor


def tower(audio: Any, dtype: torch.dtype) -> AudioTower:
    """The tower of transformers' `Qwen2_5OmniAudioEncoderConfig`. Raises ValueError for settings
    that no region computes."""
    if audio.activation_function != "gelu":
        raise ValueError(
            f"activation_function {audio.activation_function!r} of the audio tower is not "
            "supported: only 'gelu' is"
        )
    if audio.max_source_positions < audio.n_window:
        raise ValueError(
            f"max_source_positions of the audio tower is {audio.max_source_positions}: a chunk has "
            f"{audio.n_window} positions (n_window)"
        )
    config = AudioConfig(
        architecture=NAME,
        depth=audio.encoder_layers,
        hidden_size=audio.d_model,
        num_heads=audio.encoder_attention_heads,
        ffn_size=audio.encoder_ffn_dim,
        out_size=audio.output_dim,
        num_mels=audio.num_mel_bins,
        chunk_frames=2 * audio.n_window,
        dtype=dtype,
    )
    return AudioTower(
        config=config,
        embed=embed,
        block=block,
        merge=merge,
        outer_params=outer_params,
        block_params=block_params,
        merger_params=merger_params,
        block_type=AudioBlock,
        unused=("audio_bos_eos_token.weight",),
    )


# regions -----------------------------------------------------------------------------------------


def embed(cfg: AudioConfig, w: AudioOuter, frames_K: Tensor, mel_KFM: Tensor) -> Tensor:
    """Mel features to the hidden state [T, D]. Frames after a chunk's end count as silence."""
    frame_F = torch.arange(cfg.chunk_frames, device=mel_KFM.device)
    own_KF1 = (frame_F < frames_K.unsqueeze(1)).unsqueeze(2)
    x_KFD = gelu(_conv(mel_KFM.where(own_KF1, 0), w.conv1_DM3, w.conv1_bias_D, 1))
    x_KPD = gelu(_conv(x_KFD.where(own_KF1, 0), w.conv2_DD3, w.conv2_bias_D, 2))
    return (x_KPD + _sinusoids(cfg, x_KPD)).flatten(0, 1)


def block(cfg: AudioConfig, w: AudioBlock, start_S: Tensor, h_TD: Tensor) -> Tensor:
    """One block; segments are chunks."""
    x_TD = _normed(cfg, h_TD, w.attn_norm_D, w.attn_norm_bias_D)
    q_TD, k_TD, v_TD = ops.linear(x_TD, w.qkv_ED, None).chunk(3, dim=1)
    q_TNH, k_TNH, v_TNH = (
        x.unflatten(1, (cfg.num_heads, cfg.head_dim))
        for x in (q_TD + w.q_bias_D, k_TD.contiguous(), v_TD + w.v_bias_D)
    )
    max_len, scale = cfg.chunk_frames // 2, cfg.head_dim**-0.5
    o_TNH = ops.varlen_attention(q_TNH, k_TNH, v_TNH, start_S, max_len, scale)
    h_TD = ops.linear(o_TNH.flatten(1), w.out_DD, w.out_bias_D, h_TD)
    x_TD = _normed(cfg, h_TD, w.mlp_norm_D, w.mlp_norm_bias_D)
    x_TU = gelu(ops.linear(x_TD, w.up_UD, w.up_bias_U))
    h_TD = ops.linear(x_TU, w.down_DU, w.down_bias_D, h_TD)
    if h_TD.dtype is not torch.float16:
        return h_TD
    most = torch.finfo(torch.float16).max - 1000  # as in transformers
    return h_TD.clamp(-most, most)


def merge(cfg: AudioConfig, w: AudioMerger, h_TD: Tensor) -> Tensor:
    """Tokens [G, O]: the means of two positions each."""
    h_G2D = h_TD.unflatten(0, (-1, 2))
    h_GD = (h_G2D[:, 0] + h_G2D[:, 1]) / 2
    return ops.linear(_normed(cfg, h_GD, w.norm_D, w.norm_bias_D), w.out_OD, w.out_bias_O)


def _conv(x_KFC: Tensor, weight_DC3: Tensor, bias_D: Tensor, stride: int) -> Tensor:
    """A convolution over 3 frames with one frame of zeros before and after: [K, F / stride, D]."""
    x_KFC3 = pad(x_KFC, (0, 0, 1, 1)).unfold(1, 3, stride)
    num_chunks, num_frames = x_KFC3.shape[:2]
    y = ops.linear(x_KFC3.flatten(2).flatten(0, 1), weight_DC3.flatten(1), bias_D)
    return y.unflatten(0, (num_chunks, num_frames))


def _sinusoids(cfg: AudioConfig, x_KPD: Tensor) -> Tensor:
    """Positions in a chunk, [P, D]: sines, then cosines, of D / 2 wavelengths."""
    num_waves = cfg.hidden_size // 2
    step = math.log(MAX_TIMESCALE) / (num_waves - 1)
    wave_d = torch.exp(-step * torch.arange(num_waves, device=x_KPD.device).float())
    position_P = torch.arange(x_KPD.shape[1], device=x_KPD.device)
    angle_Pd = position_P.unsqueeze(1) * wave_d
    return torch.cat((angle_Pd.sin(), angle_Pd.cos()), dim=1).to(x_KPD.dtype)


def _normed(cfg: AudioConfig, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, cfg.norm_eps)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: AudioConfig) -> dict[str, Param]:
    hidden = cfg.hidden_size
    return {
        "conv1_DM3": Param.one("conv", "conv1.weight", hidden, cfg.num_mels, 3),
        "conv1_bias_D": Param.one("bias", "conv1.bias", hidden),
        "conv2_DD3": Param.one("conv", "conv2.weight", hidden, hidden, 3),
        "conv2_bias_D": Param.one("bias", "conv2.bias", hidden),
    }


def block_params(cfg: AudioConfig, block_idx: int) -> dict[str, Param]:
    """Parameters of one block, by the fields of `AudioBlock`."""
    prefix, hidden, ffn = f"layers.{block_idx}.", cfg.hidden_size, cfg.ffn_size
    attention = prefix + "self_attn."
    qkv = tuple(f"{attention}{name}_proj.weight" for name in "qkv")
    return {
        **_norm_params("attn_norm", prefix + "self_attn_layer_norm", hidden),
        "qkv_ED": Param.stack("linear", qkv, (hidden,) * 3, hidden),
        "q_bias_D": Param.one("bias", attention + "q_proj.bias", hidden),
        "v_bias_D": Param.one("bias", attention + "v_proj.bias", hidden),
        **_product("out", "DD", attention + "out_proj", hidden, hidden),
        **_norm_params("mlp_norm", prefix + "final_layer_norm", hidden),
        **_product("up", "UD", prefix + "fc1", ffn, hidden),
        **_product("down", "DU", prefix + "fc2", hidden, ffn),
    }


def merger_params(cfg: AudioConfig) -> dict[str, Param]:
    """Parameters after the last block, by the fields of `AudioMerger`."""
    return {
        **_norm_params("norm", "ln_post", cfg.hidden_size),
        **_product("out", "OD", "proj", cfg.out_size, cfg.hidden_size),
    }


def _norm_params(name: str, source: str, size: int) -> dict[str, Param]:
    return {
        f"{name}_D": Param.one("norm", f"{source}.weight", size),
        f"{name}_bias_D": Param.one("bias", f"{source}.bias", size),
    }


def _product(name: str, dims: str, source: str, rows: int, columns: int) -> dict[str, Param]:
    """A product with a bias: the fields NAME_dims and NAME_bias_dims[0]."""
    return {
        f"{name}_{dims}": Param.one("linear", f"{source}.weight", rows, columns),
        f"{name}_bias_{dims[0]}": Param.one("bias", f"{source}.bias", rows),
    }
