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
    """A checkpoint: transformers' model type and the fields of its config."""

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    max_model_len: int = 128

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
)  # fmt: skip
