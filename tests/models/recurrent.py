"""A tiny architecture whose layers keep a recurrent state, or keys and values; and a plain loop.

A recurrent layer is a short causal convolution of queries, keys and values, then a gated linear
recurrence: S = a · S + k vᵀ, o = q S for each token and head. Its state is the convolution's last
inputs, and S. The layer computes all tokens of a step at once, `expected_logits` one by one.

T tokens | R rows | N heads | H head size | C = 3N channels | W taps of the convolution
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.models import dense, registry
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import Recurrent, StateTensor
from nanovllm.models.model import Batch, Kept, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.rope import rotary_table

NAME, VOCAB_SIZE, WIDTH, TAPS = "RecurrentForCausalLM", 128, 56, 3
NUM_HEADS, HEAD = 2, 16
IS_RECURRENT = (True, False, True)


class Layer(NamedTuple):
    """Weights of one layer. An attention layer has all that `dense.attention` reads."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    gate_ND: Weight | None
    conv_W: Tensor | None


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Layer,
    kv: Kept,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """h + attention, or h + the recurrence."""
    if isinstance(kv, LayerCache):
        return dense.attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    u_TCH = linear(x_TD, w.qkv_ED, None).view(len(x_TD), -1, cfg.head_dim)
    log_a_TN = torch.sigmoid(linear(x_TD, w.gate_ND, None).float() + 1).log()
    o_TNH = _recurrence(kv, batch, u_TCH, log_a_TN, w.conv_W)
    o_TQ, h_TD = dense.kept(batch, o_TNH.flatten(1).to(h_TD.dtype), h_TD)
    return dense.summed_linear(cfg, o_TQ, w.out_DQ, None, h_TD)


def _recurrence(
    kv: tuple[Tensor, ...], batch: Batch, u_TCH: Tensor, log_a_TN: Tensor, conv_W: Tensor | None
) -> Tensor:
    """The recurrence's outputs [T, N, H]; writes the states after these tokens."""
    states, conv_state, sum_state = batch.states, *kv
    assert states is not None and conv_W is not None
    num_tokens, num_rows = len(u_TCH), len(states.from_R)
    is_new = states.is_new_R.view(-1, 1, 1, 1)
    conv_RVCH = torch.where(is_new, 0, conv_state.index_select(0, states.from_R))
    sum_RNHH = torch.where(is_new, 0, sum_state.index_select(0, states.from_R))
    token_T = torch.arange(num_tokens, device=u_TCH.device)
    row_T = (token_T.unsqueeze(1) >= batch.q_start_S[1:]).sum(1).clamp(max=num_rows - 1)
    idx_T = token_T - batch.q_start_S.long().index_select(0, row_T)
    # the inputs of the convolution: number W − 1 is the token's own
    taps = []
    for shift in range(TAPS - 1, -1, -1):
        before_TCH = u_TCH.index_select(0, (token_T - shift).clamp(min=0))
        at_T = row_T * (TAPS - 1) + (TAPS - 1 + idx_T - shift).clamp(0, TAPS - 2)
        stored_TCH = conv_RVCH.flatten(0, 1).index_select(0, at_T)
        taps.append(torch.where((idx_T >= shift).view(-1, 1, 1), before_TCH, stored_TCH))
    conv_TWCH = torch.stack(taps, 1)
    mixed_TCH = (conv_TWCH * conv_W.view(1, -1, 1, 1)).sum(1)
    q_TNH, k_TNH, v_TNH = mixed_TCH.float().chunk(3, 1)
    # the decay from before a row's first token to after token t, and from token s to token t
    total_TN = log_a_TN.cumsum(0)
    first_T = (token_T - idx_T).clamp(0, num_tokens - 1)
    since_TN = total_TN - (total_TN - log_a_TN).index_select(0, first_T)
    is_before_TT = (row_T.unsqueeze(1) == row_T) & (token_T.unsqueeze(1) >= token_T)
    decay_TTN = torch.where(
        is_before_TT.unsqueeze(2), total_TN.unsqueeze(1) - total_TN, -torch.inf
    ).exp()
    outer_TNHH = k_TNH.unsqueeze(3) * v_TNH.unsqueeze(2)
    after_TNHH = since_TN.exp()[:, :, None, None] * sum_RNHH.index_select(0, row_T)
    after_TNHH = after_TNHH + (decay_TTN[:, :, :, None, None] * outer_TNHH).sum(1)
    to = states.to_T
    conv_after, sum_after = conv_TWCH.narrow(1, 1, TAPS - 1), after_TNHH
    if to is None:
        assert states.to_R is not None
        to, last_R = states.to_R, (batch.q_start_S[1:].long() - 1).clamp(min=0)
        conv_after, sum_after = (x.index_select(0, last_R) for x in (conv_after, sum_after))
    ops.store_state(conv_after, conv_state, to)
    ops.store_state(sum_after, sum_state, to)
    return (q_TNH.unsqueeze(3) * after_TNHH).sum(2)


# the model ---------------------------------------------------------------------------------------


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    prefix, size = f"blocks.{layer_idx}.", NUM_HEADS * HEAD
    qkv = tuple(prefix + c for c in "qkv")
    declared = {
        "attn_norm_D": Param.one("norm", prefix + "norm", WIDTH),
        "qkv_ED": Param.stack("linear", qkv, (size,) * 3, WIDTH)._replace(units=(NUM_HEADS,) * 3),
        "out_DQ": Param.one("linear", prefix + "out", WIDTH, size, shard_axis=1),
    }
    if isinstance(kind.keeps, Recurrent):
        declared["gate_ND"] = Param.one("linear", prefix + "gate", NUM_HEADS, WIDTH, shard_axis=0)
        declared["conv_W"] = Param.one("norm", prefix + "conv", TAPS)
    return declared


def recurrent(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    cfg = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    state = Recurrent(
        (
            StateTensor("conv", (TAPS - 1, 3 * NUM_HEADS, HEAD), shard_axis=1),
            StateTensor("sum", (NUM_HEADS, HEAD, HEAD), torch.float32, shard_axis=0),
        )
    )
    kinds = LayerKind("attention", dense.paged_kv(cfg)), LayerKind("recurrent", state)
    return replace(
        dense.dense_model(cfg),
        layer_kinds=tuple(kinds[one] for one in IS_RECURRENT),
        layer=layer,
        layer_params=layer_params,
        layer_type=lambda kind: Layer,
    )


CONFIG = {
    "model_type": "llama", "architectures": [NAME], "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": len(IS_RECURRENT),
    "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS, "head_dim": HEAD,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "eos_token_id": 3,
}  # fmt: skip


@contextmanager
def checkpoint(folder: Path) -> Iterator[Path]:
    """A checkpoint of the architecture, which the registry knows meanwhile."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    from transformers import AutoConfig

    generator = torch.Generator().manual_seed(3)
    model = recurrent(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    drawn = {
        source: torch.randn(part, *param.shape[1:], generator=generator) * 0.2
        + (param.kind == "norm")
        for group in model.declared
        for param in group.values()
        for source, part in zip(param.sources, param.parts)
    }
    save_file(drawn, folder / "model.safetensors")
    registry.ARCHITECTURES[NAME] = recurrent
    try:
        yield folder
    finally:
        del registry.ARCHITECTURES[NAME]


@torch.no_grad()
def expected_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """The logits after each token, in plain torch on the checkpoint's tensors."""
    from transformers import AutoConfig

    stored = load_file(folder / "model.safetensors")
    cfg = recurrent(AutoConfig.from_pretrained(folder), dtype=torch.float32).config
    num, pos = len(token_ids), torch.arange(len(token_ids))
    table = rotary_table(cfg.inv_freq, cfg.rope_scale, num, torch.device("cpu"))
    norm = partial(torch.nn.functional.rms_norm, normalized_shape=(WIDTH,), eps=cfg.norm_eps)
    h = stored["model.embed_tokens.weight"][token_ids]
    for layer_idx, is_recurrent in enumerate(IS_RECURRENT):
        prefix = f"blocks.{layer_idx}."
        w = {name[len(prefix) :]: x for name, x in stored.items() if name.startswith(prefix)}
        x = norm(h, weight=w["norm"])
        q, k, v = ((x @ w[c].T).view(num, NUM_HEADS, HEAD) for c in "qkv")
        if is_recurrent:
            o = _loop(torch.cat((q, k, v), 1), torch.sigmoid(x @ w["gate"].T + 1), w["conv"])
        else:
            q, k = (
                reference.rope_store.rope(q, table, pos),
                reference.rope_store.rope(k, table, pos),
            )
            scores = torch.einsum("qnh,knh->nqk", q, k) / HEAD**0.5
            probs = scores.masked_fill(pos[:, None] < pos, -torch.inf).softmax(-1)
            o = (probs @ v.transpose(0, 1)).transpose(0, 1)
        h = h + o.flatten(1) @ w["out"].T
    return norm(h, weight=stored["model.norm.weight"]) @ stored["lm_head.weight"].T


def _loop(u_TCH: Tensor, a_TN: Tensor, conv_W: Tensor) -> Tensor:
    """The recurrence, token by token."""
    conv, sum_NHH = (
        u_TCH.new_zeros(TAPS - 1, *u_TCH.shape[1:]),
        u_TCH.new_zeros(NUM_HEADS, HEAD, HEAD),
    )
    outs = []
    for u_CH, a_N in zip(u_TCH, a_TN):
        taps = torch.cat((conv, u_CH[None]))
        q, k, v = (taps * conv_W.view(-1, 1, 1)).sum(0).chunk(3)
        conv, sum_NHH = taps[1:], a_N[:, None, None] * sum_NHH + k[:, :, None] * v[:, None]
        outs.append((q[:, None] @ sum_NHH)[:, 0])
    return torch.stack(outs)


def greedy_tokens(folder: Path, prompt: list[int], num: int) -> list[int]:
    """The likeliest answer, by the plain loop."""
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(expected_logits(folder, ids)[-1].argmax()))
    return ids[len(prompt) :]
