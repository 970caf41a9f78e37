"""Small random checkpoints with experts, and changes of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import save_tiny
from tests.models.harness import max_difference
from tests.models.routes import Routes, edit, stacked

TOLERANCE = 1e-4
ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
VOCAB_SIZE = 96
HIDDEN = 40
# (prompt, total) tokens: a single token, a prompt that needs two steps, no multiple of a block
LENGTHS = ((1, 6), (19, 23), (70, 73), (33, 35))


@dataclass(frozen=True)
class Case:
    """A checkpoint: `num` experts, of which a token goes to `top_k`."""

    architecture: str
    num: int
    top_k: int
    changes: dict[str, Any] = field(default_factory=dict)
    stacked: bool = False  # one tensor for the experts of a layer, not one for each

    def __str__(self) -> str:
        return f"{self.architecture}-{self.top_k}of{self.num}"

    def save(self, folder: Path) -> Path:
        # no two sizes are equal, to show code that confuses them
        fields: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "max_position_embeddings": 256,
            "num_experts_per_tok": self.top_k,
        }
        if self.architecture == "mixtral":
            fields["num_local_experts"] = self.num
        else:
            fields |= {"num_experts": self.num, "moe_intermediate_size": 24}
        if self.architecture == "qwen2_moe":
            fields["shared_expert_intermediate_size"] = 32
        save_tiny(folder, self.architecture, **{**fields, **self.changes})
        return edit(folder, stacked) if self.stacked else folder


NORMALIZED = {"norm_topk_prob": True}
WINDOW = {"sliding_window": 16}
USED_WINDOW = {"use_sliding_window": True, **WINDOW}
CASES = (
    Case("mixtral", 5, 1, {**WINDOW, "tie_word_embeddings": True}, stacked=True),
    Case("mixtral", 8, 2),
    Case("mixtral", 8, 8, {"intermediate_size": 19}),
    Case("qwen2_moe", 5, 1, {"decoder_sparse_step": 2, **NORMALIZED, "moe_intermediate_size": 19}),
    Case("qwen2_moe", 7, 2, {**USED_WINDOW, "max_window_layers": 2}, stacked=True),
    Case("qwen2_moe", 16, 8, {"qkv_bias": False, "mlp_only_layers": [2], **NORMALIZED}),
    Case("qwen2_moe", 4, 2, {"shared_expert_intermediate_size": 1, "num_key_value_heads": 4}),
    Case("qwen3_moe", 5, 1, {"attention_bias": True, "mlp_only_layers": [0, 2]}),
    Case("qwen3_moe", 7, 2, {**NORMALIZED, **USED_WINDOW, "tie_word_embeddings": True}),
    Case("qwen3_moe", 16, 8, {"decoder_sparse_step": 3, **NORMALIZED}, stacked=True),
    Case("qwen3_moe", 8, 8, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, stacked=True),
)


# One engine in graph mode for each architecture, with every way in which its layers can differ
GRAPH_CASES = {
    "mixtral": Case("mixtral", 8, 2, {"num_hidden_layers": 2, **WINDOW}),
    "qwen2_moe": Case(
        "qwen2_moe",
        7,
        2,
        {"num_hidden_layers": 2, "mlp_only_layers": [1], **USED_WINDOW, "max_window_layers": 1},
    ),
    "qwen3_moe": Case(
        "qwen3_moe", 16, 8, {"attention_bias": True, "decoder_sparse_step": 2, **NORMALIZED}
    ),
}
NUM_ROWS = 64
GRAPH_SIZES: dict[str, Any] = {
    "max_num_seqs": NUM_ROWS,
    "graph_batch_sizes": [1, NUM_ROWS],
    "max_num_batched_tokens": 64,
    "num_kvcache_blocks": 1 + 2 * NUM_ROWS,  # of two groups of layers
}
FEW_ROWS = {"max_num_seqs": 2, "graph_batch_sizes": [2], "max_num_batched_tokens": 64}


def assert_same(found: tuple[list[Tensor], Routes], expected: tuple[list[Tensor], Routes]) -> None:
    assert found[1] == expected[1]
    assert max_difference(found[0], expected[0]) <= TOLERANCE


def routers(weights: dict[str, Tensor]) -> list[Tensor]:
    ends = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
    return [weight for name, weight in weights.items() if name.endswith(ends)]


def matrices(weights: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """All matrices of one expert, by their names without its number."""
    part = f".experts.{expert}."
    return {name.replace(part, "."): x for name, x in weights.items() if part in name}


def towards(liked: int, disliked: int) -> Callable[[dict[str, Tensor]], None]:
    """All tokens go to expert `liked` first, and none to `disliked`, whose weights are NaN."""

    def change(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][:, 0] = 30.0  # the largest number of every token
        for name, weight in weights.items():
            if "post_attention_layernorm" in name:
                weight[0] = 1.0
        for router_ED in routers(weights):
            router_ED[:, 0] = 0.0
            router_ED[liked, 0], router_ED[disliked, 0] = 2.0, -2.0
        for matrix in matrices(weights, disliked).values():
            matrix.fill_(torch.nan)

    return change
