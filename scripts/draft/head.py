"""An EAGLE-3 head in plain torch, and its training as it is used: on its own states.

In round k the head reads its own states of round k − 1, as it does for the (k + 1)-th draft token.
An entry then sees the entries of round 0 up to k places before it, and those of its own chain of
rounds 1 … k. Source: Li et al. 2025, https://arxiv.org/abs/2503.01840, section 3.2.

B texts | T entries | D hidden | J = 3·D states | N heads | K kv heads | H head size | X tokens that
the head can draft | P likely tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from draft.collect import Examples, Target
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

THETA = 10_000.0
DECAY = 0.8  # of a round's weight in the loss
STATE_WEIGHT = 1.0  # of the distance of states in the loss
NOT_DRAFTED = -100  # the label of tokens that the head cannot draft


class Batch(NamedTuple):
    """Texts, padded at the end. Entry t has token t + 1 and the states after token t, and should
    give the model's last state after token t + 1, and the numbers of the tokens that it finds
    likely there, with their probabilities. The first is the label."""

    token_BT: Tensor
    states_BTJ: Tensor
    last_BTD: Tensor
    likely_BTP: Tensor
    chance_BTP: Tensor


class Layer(nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        cfg = target.config
        self.sizes = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        self.head_dim = cfg.head_dim
        hidden, heads = cfg.hidden_size, nn.ModuleDict()
        for name, num in zip(("q_proj", "k_proj", "v_proj"), self.sizes):
            heads[name] = nn.Linear(2 * hidden, num * self.head_dim, bias=False)
        heads["o_proj"] = nn.Linear(cfg.num_heads * self.head_dim, hidden, bias=False)
        self.self_attn = heads
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, cfg.ffn_size, bias=False),
                "up_proj": nn.Linear(hidden, cfg.ffn_size, bias=False),
                "down_proj": nn.Linear(cfg.ffn_size, hidden, bias=False),
            }
        )
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            setattr(self, name, nn.RMSNorm(hidden, cfg.norm_eps))

    def forward(
        self, embed_BTD: Tensor, state_BTD: Tensor, seen: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The new states. `seen` are keys and values of earlier rounds; this one's are added."""
        x_BTJ = torch.cat((self.input_layernorm(embed_BTD), self.hidden_norm(state_BTD)), -1)
        q, k, v = (
            self.self_attn[f"{name}_proj"](x_BTJ).unflatten(-1, (num, self.head_dim))
            for name, num in zip("qkv", self.sizes)
        )
        seen.append((rotated(k), v))
        o_BTQ = attend(rotated(q), seen).flatten(2)
        h_BTD = state_BTD + self.self_attn["o_proj"](o_BTQ)
        x_BTD = self.post_attention_layernorm(h_BTD)
        inner = F.silu(self.mlp["gate_proj"](x_BTD)) * self.mlp["up_proj"](x_BTD)
        return h_BTD + self.mlp["down_proj"](inner)


class Head(nn.Module):
    """The tensors have their published names. `target_X` are the ids of the tokens it can draft."""

    def __init__(self, target: Target, target_X: Tensor) -> None:
        super().__init__()
        cfg = target.config
        hidden = cfg.hidden_size
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = Layer(target)
        self.norm = nn.RMSNorm(hidden, cfg.norm_eps)
        self.lm_head = nn.Linear(hidden, len(target_X), bias=False)
        self.register_buffer("embed_VD", target.embed_VD, persistent=False)
        goal_D = target.final_norm_D.clone()
        self.register_buffer("goal_norm_D", goal_D, persistent=False)
        with torch.no_grad():  # it chooses among the tokens as the model does
            self.norm.weight.copy_(target.final_norm_D)
            self.lm_head.weight.copy_(target.head_VD[target_X])

    def loss(self, batch: Batch, num_rounds: int) -> tuple[Tensor, Tensor]:
        """The loss, and the share of right tokens in each round.

        The head learns the model's probabilities, which tell more than its choices, and its last
        states, normalised, which tell more again: there is more to learn from few texts.
        """
        embed_BTD = F.embedding(batch.token_BT, self.embed_VD)
        state_BTD, seen = self.fc(batch.states_BTJ).float(), []  # sums of layers are in fp32
        goal_D = self.goal_norm_D
        goal_BTD = F.rms_norm(batch.last_BTD, goal_D.shape, goal_D, self.norm.eps)
        total, shares = torch.zeros((), device=state_BTD.device), []
        for number in range(num_rounds):
            if number:  # the state of the entry before
                state_BTD = F.pad(state_BTD, (0, 0, 1, 0))[:, :-1]
            state_BTD = self.midlayer(embed_BTD, state_BTD, seen)
            is_label_BT = batch.likely_BTP[..., 0] >= 0
            is_label_BT[:, :number] = False
            # only what counts is multiplied by the head
            out_ND, likely_NP = self.norm(state_BTD[is_label_BT]), batch.likely_BTP[is_label_BT]
            loss, logits_NX = self._loss(out_ND, likely_NP, batch.chance_BTP[is_label_BT])
            num_labels = max(len(out_ND), 1)
            distance = (out_ND - goal_BTD[is_label_BT]).pow(2).sum() / num_labels
            distance = distance / goal_BTD.pow(2).sum(-1).mean()
            total = total + DECAY**number * (loss + STATE_WEIGHT * distance)
            shares.append((logits_NX.argmax(-1) == likely_NP[:, 0]).sum() / num_labels)
        return total, torch.stack(shares).detach()

    def _loss(self, out_ND: Tensor, likely_NP: Tensor, chance_NP: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy with the probabilities of likely tokens, and the logits [N, X]."""
        logits_NX = self.lm_head(out_ND)
        log_NP = logits_NX.log_softmax(-1).gather(1, likely_NP.clamp(min=0))
        chance_NP = chance_NP * (likely_NP >= 0)
        return -(log_NP * chance_NP).sum() / chance_NP.sum().clamp(min=1e-6), logits_NX


def rotated(x_BTNH: Tensor) -> Tensor:
    half = x_BTNH.shape[-1] // 2
    place = torch.arange(half, device=x_BTNH.device) / half
    angle = torch.arange(x_BTNH.shape[1], device=x_BTNH.device).unsqueeze(1) * THETA**-place
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    a, b = x_BTNH.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q_BTNH: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention in the newest of the rounds whose keys and values are `seen`."""
    number, repeats = len(seen) - 1, q_BTNH.shape[2] // seen[0][0].shape[2]
    rounds = [
        # the entry of round j in the chain of an entry is number − j places before it
        tuple(
            F.pad(x, (0, 0, 0, 0, number - j, 0))[:, : x.shape[1]] if j and number > j else x
            for x in (one.repeat_interleave(repeats, 2) for one in pair)
        )
        for j, pair in enumerate(seen)
    ]
    (k0, v0), own = rounds[0], rounds[1:]
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH, k0)
    mask_TS = torch.ones(scores_BNTS.shape[2:], dtype=torch.bool, device=q_BTNH.device)
    scores_BNTS = scores_BNTS.masked_fill(mask_TS.triu(1 - number), -torch.inf)
    chain = [torch.einsum("btnh,btnh->bnt", q_BTNH, k).unsqueeze(-1) for k, _ in own]
    all_scores = torch.cat((scores_BNTS, *chain), -1) * q_BTNH.shape[-1] ** -0.5
    weights = all_scores.softmax(-1)
    out = torch.einsum("bnts,bsnh->btnh", weights[..., : k0.shape[1]], v0)
    for i, (_, v) in enumerate(own):
        out = out + weights[..., k0.shape[1] + i].transpose(1, 2).unsqueeze(-1) * v
    return out


def drafted_tokens(choice_N: Tensor, num: int, vocab_size: int) -> Tensor:
    """The ids of the `num` tokens that the model chooses most often, ascending."""
    counts_V = torch.bincount(choice_N, minlength=vocab_size).cpu()
    return counts_V.argsort(descending=True, stable=True)[:num].sort().values


def numbers_of(target_X: Tensor, vocab_size: int) -> Tensor:
    """The head's number of each token, or NOT_DRAFTED: [V]."""
    number_V = torch.full((vocab_size,), NOT_DRAFTED)
    number_V[target_X] = torch.arange(len(target_X))
    return number_V


def batch_of(examples: Examples, numbers: Sequence[int], number_V: Tensor) -> Batch:
    """Padded texts. Only tokens of answers are labels. `number_V` is that of `numbers_of`, on the
    device of the examples."""
    places = examples.places(numbers)
    at_BT, after_BT = places.at_BT[:, :-1], places.at_BT[:, 1:]
    is_label_BT = places.is_own_BT[:, 1:] & (places.of_answer_BT[:, 1:] >= -1)
    likely_BTP = number_V[examples.likely_NP[after_BT].long()]
    return Batch(
        examples.token_N[after_BT],
        examples.states_NJ[at_BT].float(),
        examples.last_ND[after_BT].float(),
        likely_BTP.where(is_label_BT.unsqueeze(-1), NOT_DRAFTED),
        examples.chance_NP[after_BT],
    )


def save(head: Head, target: Target, target_X: Tensor, layers: Sequence[int], out: Path) -> None:
    """Write the head in the published layout: SGLang and vLLM read it too."""
    cfg = target.config
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": cfg.hidden_size,
        "target_hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.ffn_size,
        "num_hidden_layers": 1,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": THETA,
        "max_position_embeddings": cfg.max_position,
        "tie_word_embeddings": False,
        "vocab_size": cfg.vocab_size,
        "draft_vocab_size": len(target_X),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(layers),
        },
        "torch_dtype": str(cfg.dtype).removeprefix("torch."),
    }
    tensors = {name: one.to(cfg.dtype).contiguous() for name, one in head.state_dict().items()}
    tensors["d2t"] = target_X - torch.arange(len(target_X))
    tensors["t2d"] = torch.zeros(cfg.vocab_size, dtype=torch.bool)
    tensors["t2d"][target_X] = True
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    cpu = {name: one.cpu() for name, one in tensors.items()}
    save_file(cpu, out / "model.safetensors", metadata={"format": "pt"})
