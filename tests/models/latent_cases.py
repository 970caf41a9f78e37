"""Small random checkpoints with latent attention and grouped experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import save_tiny
from tests.models.routes import edit

VOCAB_SIZE = 96
# (prompt, total) tokens: a single token, a prompt that needs two steps, no multiple of a block
LENGTHS = ((1, 6), (19, 23), (70, 73), (33, 35))
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.9, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint: a model type of transformers and the fields of its config."""

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def save(self, folder: Path, **changes: Any) -> Path:
        # no two sizes are equal, to show code that confuses them
        fields: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 56,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 40,
            "qk_rope_head_dim": 8,
            "head_dim": 8,  # the same
            "qk_nope_head_dim": 16,
            "v_head_dim": 20,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "tie_word_embeddings": False,
            "max_position_embeddings": 256,
            "pad_token_id": None,
        }
        if self.model_type != "glm4_moe_lite":
            fields["first_k_dense_replace"] = 1
        saved = {**fields, **self.changes, **changes}
        save_tiny(folder, self.model_type, **saved)
        return edit(folder, biased)


def biased(weights: dict[str, Tensor]) -> None:
    """Router biases that change which experts are chosen."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


CASES = (
    Case("v2-lite", "deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN}),
    Case(
        "v2",
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 16.0, "attention_bias": True,
        },
    ),
    Case(
        "v3",
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "rope_parameters": YARN},
    ),
    Case(
        "moonlight",
        "deepseek_v3",
        {
            "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
            "rope_interleave": False, "first_k_dense_replace": 0,
        },
    ),
    Case("glm", "glm4_moe_lite", {"v_head_dim": 24, "rms_norm_eps": 1e-3, "n_shared_experts": 1}),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
