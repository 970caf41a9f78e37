"""A DFlash draft in plain torch: a block of mask tokens that sees itself and the context.

In training each text has some blocks, at places in its answer. A block has the token there and mask
tokens after it; it sees the model's states before it, and all of itself. Source:
https://arxiv.org/abs/2602.06036.

B texts | T tokens | D hidden | J = D times the states | N blocks of a text | K drafts of a block
Q = N · (K + 1) tokens of blocks | S = T + Q | H head size
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from draft.collect import Examples, Target
from draft.head import DECAY, NOT_DRAFTED, THETA
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = 24  # of a text in a step of training


class Texts(NamedTuple):
    """Texts, padded at the end: tokens, states after them, and the model's choice after each token
    where it begins a part of the answer."""

    token_BT: Tensor
    states_BTJ: Tensor
    choice_BT: Tensor


class Layer(nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        cfg = target.config
        self.sizes = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        self.head_dim = cfg.head_dim
        hidden, parts = cfg.hidden_size, nn.ModuleDict()
        for name, num in zip("qkv", self.sizes):
            parts[f"{name}_proj"] = nn.Linear(hidden, num * cfg.head_dim, bias=False)
        parts["o_proj"] = nn.Linear(cfg.num_heads * cfg.head_dim, hidden, bias=False)
        for name in ("q_norm", "k_norm"):
            parts[name] = nn.RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.self_attn = parts
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, cfg.ffn_size, bias=False),
                "up_proj": nn.Linear(hidden, cfg.ffn_size, bias=False),
                "down_proj": nn.Linear(cfg.ffn_size, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, cfg.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, cfg.norm_eps)

    def forward(
        self, h_BQD: Tensor, context_BTD: Tensor, pos_BS: Tensor, mask_BQS: Tensor
    ) -> Tensor:
        attn, x_BQD = self.self_attn, self.input_layernorm(h_BQD)
        both_BSD = torch.cat((context_BTD, x_BQD), 1)
        q, k, v = (
            attn[f"{name}_proj"](x).unflatten(-1, (num, self.head_dim))
            for name, num, x in zip("qkv", self.sizes, (x_BQD, both_BSD, both_BSD))
        )
        q = rotated(attn["q_norm"](q.float()), pos_BS[:, -q.shape[1] :])
        k = rotated(attn["k_norm"](k.float()), pos_BS)
        repeats = self.sizes[0] // self.sizes[1]
        k, v = (one.repeat_interleave(repeats, 2).transpose(1, 2) for one in (k, v))
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask_BQS.unsqueeze(1))
        h_BQD = h_BQD + attn["o_proj"](o.transpose(1, 2).flatten(2))
        x_BQD = self.post_attention_layernorm(h_BQD)
        inner = F.silu(self.mlp["gate_proj"](x_BQD)) * self.mlp["up_proj"](x_BQD)
        return h_BQD + self.mlp["down_proj"](inner)


def rotated(x_BTNH: Tensor, pos_BT: Tensor) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    place = torch.arange(half, device=x_BTNH.device) / half
    angle = (pos_BT.unsqueeze(-1) * THETA**-place).unsqueeze(2)
    a, b = x_BTNH.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """The tensors have their published names. Embeddings and head are the model's."""

    def __init__(self, target: Target, num_layers: int, num_states: int) -> None:
        super().__init__()
        cfg = target.config
        self.mask_id = cfg.vocab_size - 1
        self.fc = nn.Linear(num_states * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.layers = nn.ModuleList(Layer(target) for _ in range(num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.register_buffer("embed_VD", target.embed_VD, persistent=False)
        self.register_buffer("head_VD", target.head_VD, persistent=False)
        with torch.no_grad():
            self.norm.weight.copy_(target.final_norm_D)

    def forward(self, token_BT: Tensor, states_BTJ: Tensor, place_BN: Tensor, num: int) -> Tensor:
        """Logits [B, N, K, V] of the K = `num` tokens after the tokens at `place_BN`."""
        num_texts, num_blocks = place_BN.shape
        context_BTD = self.hidden_norm(self.fc(states_BTJ).float())
        offset_K = torch.arange(num + 1, device=token_BT.device)
        pos_BQ = (place_BN.unsqueeze(-1) + offset_K).flatten(1)
        first_BN1 = token_BT.gather(1, place_BN).unsqueeze(-1)
        token_BQ = torch.where(offset_K == 0, first_BN1, self.mask_id).flatten(1)
        pos_T = torch.arange(token_BT.shape[1], device=token_BT.device)
        pos_BS = torch.cat((pos_T.expand(num_texts, -1), pos_BQ), 1)
        block_Q = torch.arange(num_blocks, device=token_BT.device).repeat_interleave(num + 1)
        is_own_QQ = block_Q.unsqueeze(1) == block_Q
        is_before_BQT = pos_T < place_BN.repeat_interleave(num + 1, 1).unsqueeze(-1)
        mask_BQS = torch.cat((is_before_BQT, is_own_QQ.expand(num_texts, -1, -1)), 2)
        h_BQD = F.embedding(token_BQ, self.embed_VD)
        for layer in self.layers:
            h_BQD = layer(h_BQD, context_BTD, pos_BS, mask_BQS)
        h_BNKD = self.norm(h_BQD.unflatten(1, (num_blocks, num + 1))[:, :, 1:])
        return F.linear(h_BNKD, self.head_VD)

    def loss(self, texts: Texts, num: int) -> tuple[Tensor, Tensor]:
        """The loss of blocks at random places, and the share of right tokens at each of theirs."""
        token_BT, states_BTJ, choice_BT = texts
        place_BN = torch.multinomial((choice_BT >= 0).float(), BLOCKS, replacement=True)
        logits_BNKV = self(token_BT, states_BTJ, place_BN, num)
        ahead_BNK = place_BN.unsqueeze(-1) + torch.arange(num, device=place_BN.device)
        padded = F.pad(choice_BT, (0, num), value=NOT_DRAFTED)
        label_BNK = padded.gather(1, ahead_BNK.flatten(1)).view_as(ahead_BNK)
        total, shares = torch.zeros((), device=token_BT.device), []
        for number in range(num):
            logits_XV, label_X = logits_BNKV[:, :, number].flatten(0, 1), label_BNK[..., number]
            num_labels = (label_X >= 0).sum().clamp(min=1)
            loss = F.cross_entropy(logits_XV, label_X.flatten(), reduction="sum")
            total = total + DECAY**number * loss / num_labels
            is_right_X = logits_XV.argmax(-1) == label_X.flatten()
            shares.append(is_right_X.sum() / num_labels)
        return total, torch.stack(shares).detach()


def texts_of(examples: Examples, numbers: Sequence[int]) -> Texts:
    """Padded texts. Only choices from the first token of an answer on count."""
    at_BT, is_own_BT, of_answer_BT = examples.places(numbers)
    choice_BT = examples.likely_NP[at_BT, 0].long()
    return Texts(
        examples.token_N[at_BT],
        examples.states_NJ[at_BT].float(),
        choice_BT.where(is_own_BT & (of_answer_BT >= -1), NOT_DRAFTED),
    )


def save(block: Block, target: Target, layers: Sequence[int], num: int, out: Path) -> None:
    """Write a draft of `num` tokens in the published layout."""
    cfg = target.config
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_size,
        "num_hidden_layers": len(block.layers),
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": THETA,
        "max_position_embeddings": cfg.max_position,
        "tie_word_embeddings": False,
        "vocab_size": cfg.vocab_size,
        "block_size": num + 1,
        "num_target_layers": cfg.num_layers,
        "dflash_config": {"mask_token_id": block.mask_id, "target_layer_ids": list(layers)},
        "torch_dtype": str(cfg.dtype).removeprefix("torch."),
    }
    tensors = {name: one.to(cfg.dtype).cpu() for name, one in block.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
