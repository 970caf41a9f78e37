"""Configs with experts, as they are on the Hub and as they should not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm.models import registry
from nanovllm.models.config import MoeConfig
from nanovllm.models.model import Model
from nanovllm.startup.config_file import transformers_config

SHARED = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
    "output_router_logits": False,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    **SHARED, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "attention_bias": False, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "transformers_version": "4.51.0",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN15_MOE: dict[str, Any] = {
    **SHARED, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "transformers_version": "4.39.0", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    **SHARED, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1,
    "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0,
    "sliding_window": None, "transformers_version": "4.36.0", "vocab_size": 32000,
}  # fmt: skip
HUB = {"Qwen3-30B-A3B": QWEN3_30B_A3B, "Qwen1.5-MoE": QWEN15_MOE, "Mixtral-8x7B": MIXTRAL_8X7B}
EXPERTS = {
    "Qwen3-30B-A3B": MoeConfig(128, 8, 768, normalize=True),
    "Qwen1.5-MoE": MoeConfig(60, 4, 1408, normalize=False, shared_size=5632),
    "Mixtral-8x7B": MoeConfig(8, 2, 14336, normalize=True),
}


def read(fields: dict[str, Any], folder: Path) -> tuple[Any, Model]:
    """transformers' config of these fields in a config.json, and the model."""
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    hf = transformers_config(path, {})
    return hf, registry.architecture(hf.architectures)(hf, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_have_the_sizes_of_transformers(name: str, tmp_path: Path) -> None:
    hf, model = read(HUB[name], tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hf)
    assert model.param_bytes == 2 * sum(weight.numel() for weight in theirs.parameters())
    assert model.config.moe == EXPERTS[name]
    assert all(kind.sparse and not kind.window for kind in model.layer_kinds)
    assert len(set(model.layer_kinds)) == 1


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Mixtral-8x7B"])
def test_both_names_of_the_number_of_experts_are_read(name: str, tmp_path: Path) -> None:
    """A version of transformers writes one name or the other, and reads both."""
    fields = {**HUB[name]}
    number = fields.pop("num_experts", None) or fields.pop("num_local_experts")
    models = [
        read({**fields, spelling: number}, tmp_path)[1]
        for spelling in ("num_experts", "num_local_experts")
    ]
    assert models[0] == models[1] and models[0].config.moe == EXPERTS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, but there are 128 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0: it must be at least 1"),
        ({"num_experts": 0}, "num_experts is 0: it must be at least 1"),
        ({"num_experts": -1}, "num_experts is -1: it must be at least 1"),
        ({"moe_intermediate_size": 0}, "intermediate size is 0: it must be at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0: it must be at least 1"),
        ({"mlp_only_layers": [3, 48]}, "mlp_only_layers names layer 48, but there are 48 layers"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers names layer -1, but there are 48 layers"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported by Qwen3MoeForCaus"),
        ({"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy' is not supp"),
        ({"n_group": 8, "topk_group": 4}, "n_group 8 is not supported by .*: only 1 is"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5 is not supported"),
    ],
)
def test_bad_values_are_refused_with_their_limit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read({**QWEN3_30B_A3B, **changes}, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("Dots1ForCausalLM", "dots1"), ("MiniMaxM2ForCausalLM", "minimax_m2")],
)
def test_families_with_another_router_are_refused_by_name(
    architecture: str, model_type: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{architecture}.* is not supported: use one of Llama"):
        read({"architectures": [architecture], "model_type": model_type}, tmp_path)
    named = {**QWEN3_30B_A3B, "model_type": model_type}
    with pytest.raises(ValueError, match=f"model_type '{model_type}' does not go with"):
        read(named, tmp_path)
