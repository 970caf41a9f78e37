"""Small random checkpoints of the dense families beyond Llama, Mistral and Qwen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import save_tiny

VOCAB_SIZE = 99
ORIGINAL_LEN = 64  # of longrope
# (prompt, total) tokens: a single token, a prompt that needs two steps, no multiple of a block
LENGTHS = ((1, 6), (19, 24), (99, 103))
SHORT_LENGTHS = ((1, 6), (19, 24), (50, 64))  # up to the original length
LONG_LENGTHS = ((66, 70), (99, 103))  # longer than it from the first step on


@dataclass(frozen=True)
class Family:
    """A checkpoint: transformers' model type and the fields of its config.

    Of a `plain` one, whose layers are close to those of another family, only the logits are
    compared, in `modes`. `ranks` are the numbers of ranks whose logits are compared with those of
    one.
    """

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    max_model_len: int = 128
    plain: bool = False
    ranks: tuple[int, ...] = (2, 4)
    modes: tuple[str, ...] = ("eager", "graph")

    def __str__(self) -> str:
        return self.name

    def save(self, folder: Path, **changes: Any) -> Path:
        fields = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 56,
            "max_position_embeddings": 256,
            "pad_token_id": None,
        }
        return save_tiny(folder, self.model_type, **{**fields, **self.changes, **changes})


BIASED = {"attention_bias": True, "mlp_bias": True}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 6.0,
}


def longrope(num: int) -> dict[str, Any]:
    """Fields of a Phi-3 that extends ORIGINAL_LEN positions, with `num` frequencies."""
    return {
        "original_max_position_embeddings": ORIGINAL_LEN,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.01 * i for i in range(num)],
            "long_factor": [1.5 + 0.1 * i for i in range(num)],
        },
    }


def partly(changes: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same, with a part of each head rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, **changes.get("rope_parameters", {})}
    return {**changes, "rope_parameters": {**rope, "partial_rotary_factor": factor}}


PHI = {"hidden_size": 128}  # transformers takes the head's size from it, to check longrope
GEMMA = {
    "num_hidden_layers": 3,
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 50,
}
GPT_OSS = {
    "num_hidden_layers": 3,
    "sliding_window": 17,
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
# every token goes to all experts, so that rounding changes none's; scores of attention are small
ALL_EXPERTS = {"num_experts_per_tok": GPT_OSS["num_local_experts"], "initializer_range": 0.12}
WINDOWS = {
    "num_hidden_layers": 3,
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Ministral 3: queries grow at positions 32, 64 and 96
GROWING = {
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 32, "max_position_embeddings": 256,
    },
}  # fmt: skip
# OLMo-3: full layers alone are extended
ROPES = {
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
}  # fmt: skip
ALPHA = {
    "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0,
    }
}  # fmt: skip
# full layers have heads twice as large: two of them share a tensor of the cache
GEMMA4 = {
    "num_hidden_layers": 5,
    "sliding_window": 17,
    "layer_types": [*["sliding_attention"] * 2, *["full_attention"] * 3],
    "num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
}  # fmt: skip
# the last three layers read the caches of the second and the third
GEMMA4_SMALL = {
    **GEMMA4, "num_hidden_layers": 6,
    "layer_types": [
        "full_attention", *["sliding_attention", "full_attention"] * 2, "full_attention"
    ],
    "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": VOCAB_SIZE + 2,
}  # fmt: skip
GEMMA4_EXPERTS = {
    **GEMMA4, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
COHERE = {"hidden_size": 96}  # transformers takes the head's size from it
FAMILIES = (
    # the second and the third layer rotate nothing
    Family("smollm3", "smollm3", {"no_rope_layers": [1, 0, 0, 1], "num_hidden_layers": 4}),
    Family(
        "smollm3-windows",
        "smollm3",
        {
            "num_hidden_layers": 3, "no_rope_layer_interval": 2, "use_sliding_window": True,
            "sliding_window": 17, "tie_word_embeddings": False, **BIASED,
        },
    ),
    Family("granite", "granite", {**GRANITE, **BIASED, "rms_norm_eps": 1e-2}),
    Family("granite-untied", "granite", {**GRANITE, "tie_word_embeddings": False}),
    Family("phi3", "phi3", {"sliding_window": 17, "tie_word_embeddings": False}),
    Family("phi3-partial", "phi3", partly(PHI, 0.75)),
    Family(
        "phi3-longrope-short", "phi3", {**PHI, **longrope(16)}, SHORT_LENGTHS, ORIGINAL_LEN
    ),
    Family("phi3-longrope-partial", "phi3", partly({**PHI, **longrope(12)}, 0.75), LONG_LENGTHS),
    Family("olmo2", "olmo2", {"attention_bias": True}),
    Family("gemma3", "gemma3_text", GEMMA),
    Family(
        "gemma3-capped",
        "gemma3_text",
        {
            **GEMMA, "tie_word_embeddings": False, "final_logit_softcapping": 3.0,
            "attention_bias": True, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 90000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    Family("gpt-oss", "gpt_oss", GPT_OSS),
    # Mistral-Small: no window, and a head that does not divide the hidden size
    Family("mistral-small", "mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    Family("ministral", "ministral", WINDOWS, plain=True, ranks=(2,)),
    Family("ministral3", "ministral3", GROWING, plain=True, ranks=(2,)),
    Family("glm4", "glm4", {"attention_bias": True, "tie_word_embeddings": False}, ranks=(2,)),
    Family("olmo3", "olmo3", {**WINDOWS, **ROPES}, plain=True, ranks=(2,)),
    Family(
        "seed_oss", "seed_oss",
        {**BIASED, "attention_out_bias": True, "tie_word_embeddings": False},
        plain=True, ranks=(2,),
    ),
    Family("exaone4", "exaone4", WINDOWS, plain=True, ranks=(2,)),
    Family(
        "hunyuan", "hunyuan_v1_dense", {"attention_bias": True, **ALPHA}, plain=True, ranks=(2,)
    ),
    Family("cohere", "cohere", {"attention_bias": True, "logit_scale": 0.3}, plain=True, ranks=()),
    Family(
        "cohere-qk-norm", "cohere",
        {"use_qk_norm": True, "tie_word_embeddings": False, "logit_scale": 0.3},
        ranks=(4,), modes=("eager",),
    ),
    Family("cohere2", "cohere2", {**WINDOWS, **COHERE, "logit_scale": 0.3}, plain=True, ranks=(2,)),
    Family(
        "starcoder2", "starcoder2",
        {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 17, "use_bias": True}, ranks=(2,),
    ),
    Family(
        "gemma4", "gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "attention_bias": True},
        ranks=(4,),
    ),
    Family(
        "gemma4-capped", "gemma4_text",
        {**GEMMA4, "final_logit_softcapping": 3.0, "tie_word_embeddings": False,
         "num_global_key_value_heads": None},
        plain=True, ranks=(), modes=("eager",),
    ),
    Family("gemma4-small", "gemma4_text", GEMMA4_SMALL, plain=True, ranks=(2,)),
    Family("gemma4-experts", "gemma4_text", GEMMA4_EXPERTS, plain=True, ranks=(2, 4)),
    Family("ernie4_5", "ernie4_5", {"use_bias": True}, plain=True, ranks=(2,)),
)  # fmt: skip
