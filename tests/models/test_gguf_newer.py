"""GGUF files of gpt-oss, DeepSeek, Gemma 4, hybrids and decoders with mixers give the logits of
their real values, though llama.cpp's converter has cut, joined and reordered their tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig

from nanovllm.config import EngineConfig
from tests.conftest import save_tiny
from tests.models import gpt_oss_cases, harness, latent_cases, mamba_cases
from tests.models.families import GEMMA4, GEMMA4_EXPERTS, GEMMA4_SMALL
from tests.models.gguf_cases import Written, in_turns
from tests.models.gguf_newer import fold_factors, write
from tests.models.harness import engine_logits, max_difference, sequences, transformers_logits
from tests.models.hybrid_cases import EXPERTS, HYBRID
from tests.models.routes import edit
from tests.models.test_gguf import TOLERANCE, check
from tests.models.test_shards import load_rank, options
from tests.models.thread_ranks import on_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "pad_token_id": None,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
YARN = {**latent_cases.YARN, "beta_fast": 32.0, "mscale": 0.7}  # what files can say
LATENTS = {
    "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 48, "n_routed_experts": 12,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "tie_word_embeddings": False,
}  # fmt: skip
DENSE_FIRST = {"first_k_dense_replace": 1}
RULE = {**HYBRID, "linear_key_head_dim": 16, "linear_value_head_dim": 32}
OF_EXPERTS = {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
WIDE = {"head_dim": 32, "global_head_dim": 64, "moe_intermediate_size": 32}
# rows of whole blocks
FALCON = {
    **{key: one for key, one in mamba_cases.FALCON.items() if "multiplier" not in key},
    "mamba_d_ssm": 96, "mamba_d_head": 16, "num_key_value_heads": 2, "num_attention_heads": 4,
    "mamba_norm_before_gate": False,
}  # fmt: skip
NEMOTRON = {
    **mamba_cases.NEMOTRON, "mamba_head_dim": 16, "num_key_value_heads": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_hidden_layers": 5, "layer_norm_epsilon": 1e-3,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", gpt_oss_cases.SIZES),
    "v2-lite": (
        "deepseek_v2", {**LATENTS, **DENSE_FIRST, "q_lora_rank": None, "rope_parameters": YARN}
    ),
    "v2": (
        "deepseek_v2",
        {**LATENTS, **DENSE_FIRST, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
         "topk_method": "group_limited_greedy"},
    ),
    "v3": (
        "deepseek_v3",
        {**LATENTS, **DENSE_FIRST, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    ),
    "glm-flash": ("glm4_moe_lite", {**LATENTS, "n_group": 1, "topk_group": 1}),
    "gemma4": (
        "gemma4_text",
        {**GEMMA4, **WIDE, "attention_k_eq_v": True, "final_logit_softcapping": 3.0},
    ),
    "gemma4-small": (
        "gemma4_text",
        {**GEMMA4_SMALL, **WIDE, "hidden_size_per_layer_input": 32,
         "vocab_size_per_layer_input": 101},
    ),
    "gemma4-experts": ("gemma4_text", {**GEMMA4_EXPERTS, **WIDE}),
    "qwen3-next": ("qwen3_next", {**RULE, **OF_EXPERTS}),
    "qwen3.5": ("qwen3_5_text", {**RULE, "tie_word_embeddings": True}),
    "qwen3.5-moe": ("qwen3_5_moe_text", {**RULE, **OF_EXPERTS}),
    "falcon-h1": ("falcon_h1", FALCON),
    "falcon-h1-norm": ("falcon_h1", {**FALCON, "mamba_rms_norm": True}),
    "nemotron-h": ("nemotron_h", NEMOTRON),
}  # fmt: skip


def written(name: str, folder: Path, *types: str) -> Written:
    model_type, changes = CASES[name]
    save_tiny(folder, model_type, **{**SIZES, **changes, "hidden_size": 64,
                                     "intermediate_size": 128})  # fmt: skip

    def draw(weights: dict[str, Tensor]) -> None:
        gpt_oss_cases.draw(weights)
        latent_cases.biased(weights)

    return write(edit(folder, draw), in_turns(*types))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_real_values(name: str, tmp_path: Path) -> None:
    """With types in turns, so that matrices that are read together differ."""
    check(written(name, tmp_path, "Q8_0", "Q5_0", "BF16"))


@pytest.mark.parametrize(
    "name, types", [("gpt-oss", "Q8_0"), ("v2-lite", "BF16"), ("qwen3.5", "Q8_0")]
)
def test_two_ranks_read_their_parts(name: str, types: str, tmp_path: Path) -> None:
    file, known = written(name, tmp_path, types, "F32"), sequences(99, (19, 22))
    expected = transformers_logits(file.real, known, "cpu")
    config = EngineConfig.from_options(str(file.path), options(2))
    for found in on_ranks(2, lambda group: engine_logits(load_rank(config, group), known)):
        assert max_difference(found, expected) < TOLERANCE


def test_blocks_of_several_heads_are_dequantized(tmp_path: Path) -> None:
    """Blocks of 256 columns have eight value heads of the output projection, in another order."""
    saved = save_tiny(
        tmp_path, "qwen3_5_text",
        **{**SIZES, **RULE, "num_hidden_layers": 2, "tie_word_embeddings": True,
           "layer_types": RULE["layer_types"][:2]},
    )  # fmt: skip
    params = check(write(saved, lambda name: "Q6_K" if "ssm_out" in name else "Q8_0"))
    assert isinstance(params.layers[0].out_DP, Tensor)


def test_factors_of_falcon_h1_are_in_the_weights(tmp_path: Path) -> None:
    """The file has no factors, and gives the logits of the checkpoint that has them."""
    changes = {**SIZES, **mamba_cases.FALCON, **FALCON, "num_hidden_layers": 2}
    whole = save_tiny(tmp_path / "whole", "falcon_h1", **changes)
    factors, folder = AutoConfig.from_pretrained(whole), tmp_path / "folded"
    shutil.copytree(whole, folder)
    edit(folder, lambda weights: fold_factors(weights, factors))
    file, known = write(folder, in_turns("F32")), sequences(99, (19, 22))
    found = engine_logits(harness.load(file.path, "cpu", enforce_eager=True), known)
    assert max_difference(found, transformers_logits(whole, known, "cpu")) < TOLERANCE


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("ssm.group_count", 3, "3 key heads, 8 value heads and values of 256 numbers do not fit"),
        ("ssm.conv_kernel", 5, r"ssm_conv1d.weight has shape \[384, 4\], but .* \[384, 5\]"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    name: str, changes: int, message: str, tmp_path: Path
) -> None:
    file = written("qwen3.5", tmp_path, "F32")
    with file.path.open("r+b") as opened:
        content = opened.read()
        key = f"qwen35.{name}".encode()
        opened.seek(content.index(key) + len(key) + 4)  # after the type
        opened.write(changes.to_bytes(4, "little"))
    with pytest.raises(ValueError, match=message):
        harness.load(file.path, "cpu", enforce_eager=True)
