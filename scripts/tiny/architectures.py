"""The embedded models by architecture, and how their experts run in training.

T tokens | E experts | K experts per token | D hidden | F expert width | G = 2F
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tiny.chat_tokenizer import END, MAX_POSITIONS, PAD, VOCAB_SIZE
from torch import Tensor
from torch.nn import functional
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

TinyModel = Qwen3ForCausalLM | MixtralForCausalLM | Qwen3_5ForCausalLM
MODEL_NAMES = {"qwen3": "tiny-qwen3", "mixtral": "tiny-mixtral", "qwen3_5": "tiny-qwen3.5"}
BALANCE_COEF = 0.01
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def build_model(arch: str, tokenizer: PreTrainedTokenizerFast) -> TinyModel:
    """A new model with random weights of torch's seed. `arch` is a key of MODEL_NAMES."""
    vocab = tokenizer.get_vocab()
    end_id, pad_id = vocab[END], vocab[PAD]
    model: TinyModel = _BUILDERS[arch](end_id, pad_id)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [end_id, pad_id]
    model.generation_config.pad_token_id = pad_id
    return model


def _qwen3(end_id: int, pad_id: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters=dict(_ROPE),
            tie_word_embeddings=True,
            max_window_layers=6,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )
    )


def _mixtral(end_id: int, pad_id: int) -> MixtralForCausalLM:
    """Of its weights, three quarters are experts. All experts of a layer are 1024 wide."""
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE_COEF,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters=dict(_ROPE),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )
    )
    model.set_experts_implementation("all_experts")
    return model


def _qwen3_5(end_id: int, pad_id: int) -> Qwen3_5ForCausalLM:
    """A hybrid: of its layers, three quarters are a gated delta rule, without a cache of tokens."""
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={**_ROPE, "partial_rotary_factor": 0.25},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )
    )


_BUILDERS = {"qwen3": _qwen3, "mixtral": _mixtral, "qwen3_5": _qwen3_5}


def all_experts(
    module: MixtralExperts, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """[T, D]: transformers' MixtralExperts, as two products with the matrices of all experts.

    Experts that a token did not choose get weight 0. This takes E / K times the needed flops, but
    no sort, gather or host synchronization: the fastest way to train narrow experts.
    """
    gate_up_EGD, down_EDF = module.gate_up_proj, module.down_proj
    E, D, F = down_EDF.shape
    weight_TE = x_TD.new_zeros(len(x_TD), E).scatter(1, expert_TK, weight_TK.to(x_TD.dtype))
    gate_TEF, up_TEF = (
        functional.linear(x_TD, gate_up_EGD.flatten(0, 1)).unflatten(1, (E, 2 * F)).chunk(2, dim=-1)
    )
    hidden_TEF = functional.silu(gate_TEF) * up_TEF
    hidden_TEF = hidden_TEF * weight_TE.to(hidden_TEF.dtype)[..., None]
    down_DEF = down_EDF.transpose(0, 1).reshape(D, E * F)
    return functional.linear(hidden_TEF.flatten(1), down_DEF).to(x_TD.dtype)


ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)


class Output(NamedTuple):
    """The model's outputs for training. B rows | S positions | L layers."""

    hidden_BSD: Tensor
    router_logits: tuple[Tensor, ...]  # L times [B · S, E]; empty for a dense model


def forward(model: TinyModel, input_BS: Tensor) -> Output:
    if isinstance(model, MixtralForCausalLM):
        output = model.model(input_ids=input_BS, use_cache=False, output_router_logits=True)
        return Output(output.last_hidden_state, output.router_logits)
    output = model.model(input_ids=input_BS, use_cache=False)
    return Output(output.last_hidden_state, ())


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """The mean over layers of Switch Transformers' loss: E · sum_e(share_e · probability_e).

    share_e is the number of times that a token chose expert e, by the number of tokens. The least
    value is K. The source is transformers' load_balancing_loss_func, which takes the means over all
    layers together: there a layer that never uses one expert could be balanced by another layer. It
    also counts with `bincount`, which synchronizes a GPU with the host.
    """
    losses = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        chosen_TE = torch.zeros_like(probability_TE).scatter(
            1, probability_TE.topk(top_k, dim=-1).indices, 1.0
        )
        share_E, probability_E = chosen_TE.mean(0), probability_TE.mean(0)
        losses.append(logits_TE.shape[1] * (share_E * probability_E).sum())
    return torch.stack(losses).mean()


def expert_shares(router_logits: tuple[Tensor, ...], top_k: int) -> list[list[float]]:
    """[L][E]: the share of each expert among the choices of all tokens."""
    shares: list[list[float]] = []
    for logits_TE in router_logits:
        counts_E = (
            logits_TE.topk(top_k, dim=-1).indices.flatten().bincount(minlength=logits_TE.shape[1])
        )
        shares.append((counts_E / counts_E.sum()).tolist())
    return shares
