"""Every field of the config classes of hybrid decoders is honoured, refused or unread.

The mechanism is that of `test_family_fields.py`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from tests.conftest import save_tiny
from tests.models.hybrid_cases import EXPERTS, HYBRID
from tests.models.test_config_fields import HONOURED, UNREAD, YARN
from tests.models.test_family_fields import NOT_READ, Case, check, rope

NEXT, DENSE, SPARSE = "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"
FAMILIES: dict[str, type[PretrainedConfig]] = {
    NEXT: Qwen3NextConfig,
    DENSE: Qwen3_5TextConfig,
    SPARSE: Qwen3_5MoeTextConfig,
}
TYPES = ["linear_attention", "full_attention"]
TWO: dict[str, Any] = {
    **HYBRID, "vocab_size": 96, "num_hidden_layers": 2, "layer_types": TYPES,
    "pad_token_id": None,
}  # fmt: skip
PLAIN: dict[str, dict[str, Any]] = {
    NEXT: {**TWO, **EXPERTS, "mlp_only_layers": [1]},
    DENSE: TWO,
    SPARSE: {**TWO, **EXPERTS},
}
SIZES: dict[str, Any] = {
    "vocab_size": 77, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "linear_num_key_heads": 3,
    "linear_num_value_heads": 9, "linear_key_head_dim": 8, "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 3, "tie_word_embeddings": True,
    "layer_types": [*TYPES, TYPES[0]],
}  # fmt: skip
OF_EXPERTS = {
    "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 23,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    NEXT: {**OF_EXPERTS, "intermediate_size": 72},
    DENSE: {"intermediate_size": 72},
    SPARSE: OF_EXPERTS,
}
UNREAD_FIELDS = {**NOT_READ, "output_router_logits": True, "router_aux_loss_coef": 0.5}
ALL, ONE = tuple(FAMILIES), (DENSE,)
CASES = (
    Case({"rms_norm_eps": 0.5}, HONOURED, ONE),
    Case({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported", ALL),
    Case({"head_dim": 20}, "rotates 5 of 20 elements of a head", ONE),
    Case({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple", ONE),
    Case({"attention_bias": True}, HONOURED, ONE, draws=True),
    Case(rope("default", partial_rotary_factor=0.25), HONOURED, ONE),
    Case(rope("default", partial_rotary_factor=0.5), HONOURED, (NEXT, DENSE)),
    Case(rope("yarn", partial_rotary_factor=0.5, **YARN), HONOURED, ONE),
    Case(
        rope("default", partial_rotary_factor=0.25, rope_theta=10000.0, mrope_section=[2, 1, 1]),
        UNREAD,
        ONE,
    ),
    Case({"layer_types": TYPES[::-1]}, HONOURED, ONE, draws=True),
    Case({"layer_types": ["chunked_attention"] * 2}, "chunked", ONE),
    Case({"linear_num_value_heads": 6}, "linear_num_value_heads 6 is not a multiple", ONE),
    Case({"linear_conv_kernel_dim": 0}, "num_taps of the delta rule is 0", ONE),
    Case({"num_experts_per_tok": 1}, HONOURED, (NEXT, SPARSE)),
    Case({"norm_topk_prob": False}, HONOURED, (NEXT,)),
    Case({"mlp_only_layers": []}, HONOURED, (NEXT,), draws=True),
    Case({"decoder_sparse_step": 2}, HONOURED, (NEXT,), {"mlp_only_layers": []}, draws=True),
    Case({"num_experts": 0}, HONOURED, (NEXT,), draws=True),
    Case({"num_experts": 0}, "num_experts is 0: it must be at least 1", (SPARSE,)),
    Case({"model_type": "gpt2"}, "model_type 'gpt2' does not go with", ONE),
    Case({"architectures": ["GPT2Model"]}, r"architecture \['GPT2Model'\] is not supported", ONE),
    Case({"quantization_config": {"quant_method": "awq"}}, "quantization_config", ONE),
    Case({"is_causal": False}, "is_causal False is not supported", ONE),
)
PAIRS = [pytest.param(name, case, id=f"{name}-{case}") for case in CASES for name in case.families]


def sizes(family: str) -> Case:
    return Case({**SIZES, **OWN_SIZES[family]}, HONOURED, draws=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_a_case(family: str) -> None:
    # what one family shows, the others read by the same code
    cases = [*CASES, sizes(family)]
    decided = {name for case in cases for name in case.values} | set(UNREAD_FIELDS)
    assert {field.name for field in fields(FAMILIES[family])} - decided == set()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {family: save_tiny(folder / family, family, **PLAIN[family]) for family in FAMILIES}


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_a_field_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, case, plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_are_honoured_together(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, sizes(family), plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_no_logits_depend_on_change_nothing(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, Case(UNREAD_FIELDS, UNREAD), plain, PLAIN[family], tmp_path)
