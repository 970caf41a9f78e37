"""Small random checkpoints of decoders with Mamba-2 mixers: Falcon-H1 and Nemotron-H."""

from __future__ import annotations

import math
from typing import Any

from tests.models.families import Family

# No two sizes are equal, but two groups and two key-value heads, which two ranks share.
FALCON: dict[str, Any] = {
    "head_dim": 32, "mamba_d_ssm": 72, "mamba_n_heads": 6, "mamba_d_head": 12, "mamba_n_groups": 2,
    "mamba_d_state": 16, "mamba_d_conv": 4, "tie_word_embeddings": False, "initializer_range": 0.1,
    "mamba_chunk_size": 16, "embedding_multiplier": 3.0, "lm_head_multiplier": 1.7,
    "mlp_multipliers": [0.7, 1.3], "key_multiplier": 0.6, "attention_out_multiplier": 0.8,
    "attention_in_multiplier": 1.2, "ssm_multipliers": [0.6, 0.8, 1.4, 0.5, 0.9],
    "ssm_in_multiplier": 1.1, "ssm_out_multiplier": 0.9,
}  # fmt: skip
# The last layer keeps nothing. transformers limits time steps by `time_step_min`, the engine by
# `time_step_limit`, which are no limits here.
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["mlp", "linear_attention", "full_attention", "linear_attention", "mlp"],
    "mamba_num_heads": 6, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 16,
    "chunk_size": 16, "tie_word_embeddings": False, "initializer_range": 0.1,
    "time_step_min": 1e-9, "time_step_floor": 0.01, "time_step_limit": [0.0, math.inf],
}  # fmt: skip
# layers with experts in two groups of four, of which one is chosen from
EXPERTS: dict[str, Any] = {
    **NEMOTRON, "layers_block_type": ["moe", "linear_attention", "full_attention", "mlp", "moe"],
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
CASES = (
    Family("falcon_h1", "falcon_h1", FALCON),
    Family(
        "falcon_h1-norm", "falcon_h1",
        {
            **FALCON, "mamba_rms_norm": True, "attention_bias": True, "mlp_bias": True,
            "mamba_proj_bias": True, "projectors_bias": True, "tie_word_embeddings": True,
        },
    ),
    Family("nemotron_h", "nemotron_h", NEMOTRON),
    Family(
        "nemotron_h-biased", "nemotron_h",
        {
            **NEMOTRON, "use_bias": True, "mlp_bias": True, "time_step_min": 0.7,
            "time_step_limit": [0.7, math.inf],
            "layers_block_type": NEMOTRON["layers_block_type"][1:4],
        },
        modes=("eager",),
    ),
    Family("nemotron_h-experts", "nemotron_h", EXPERTS),
    Family(
        "nemotron_h-latent", "nemotron_h",
        {
            **EXPERTS, "moe_latent_size": 24, "mlp_bias": True, "norm_topk_prob": False,
            "layers_block_type": ["moe", "linear_attention", "full_attention", "moe"],
        },
        modes=("eager",),
    ),
)  # fmt: skip
