"""Every field of the config classes of further dense families is honoured, refused or unread.

`test_config_fields.py` does the same for Llama, Mistral and Qwen, field by field. Here fields that
are sizes change together, and so do those that no logits depend on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    SmolLM3Config,
)

from tests.conftest import save_tiny
from tests.models.families import GEMMA, GPT_OSS, GRANITE
from tests.models.harness import engine_logits, load, max_difference
from tests.models.test_config_fields import (
    HONOURED,
    KNOWN,
    LAYER_TYPES,
    LENGTH,
    ORIGINAL,
    OTHERS,
    TOLERANCE,
    UNREAD,
    YARN,
    edited,
    expected_logits,
)

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "smollm3": SmolLM3Config,
    "granite": GraniteConfig,
    "phi3": Phi3Config,
    "olmo2": Olmo2Config,
    "gemma3_text": Gemma3TextConfig,
    "gpt_oss": GptOssConfig,
}
ALL = tuple(FAMILIES)
WITH_BIASES = ("smollm3", "granite", "olmo2", "gemma3_text")
SMALL: dict[str, Any] = {"vocab_size": 96, "pad_token_id": None}
PLAIN: dict[str, dict[str, Any]] = {
    "smollm3": {**SMALL, "no_rope_layers": [1, 0]},
    "granite": {**SMALL, **GRANITE},
    "phi3": {**SMALL, "hidden_size": 128},  # see `families.PHI`
    "olmo2": SMALL,
    "gemma3_text": {**SMALL, **GEMMA, "num_hidden_layers": 2, "layer_types": LAYER_TYPES},
    "gpt_oss": {**SMALL, **GPT_OSS, "num_hidden_layers": 2, "tie_word_embeddings": True},
}
SIZES: dict[str, Any] = {
    "vocab_size": 77, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
    "tie_word_embeddings": False,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [0, 1, 1]},
    "phi3": {"hidden_size": 96},
    "gemma3_text": {"layer_types": [*LAYER_TYPES, LAYER_TYPES[0]]},
    "gpt_oss": {"layer_types": None, "num_local_experts": 5},
}
# No logits depend on these: see `test_config_fields.OTHERS`.
NOT_READ: dict[str, Any] = {
    case.field: case.value for case in OTHERS if case.outcome == UNREAD and not case.beside
}
NOT_READ |= {"max_position_embeddings": 77, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
# of which Granite and Gemma-3 have some
OWN_READ = {"embedding_multiplier", "final_logit_softcapping", "logit_scale"}


@dataclass(frozen=True)
class Case:
    """Fields and what becomes of them: see `test_config_fields.Case`."""

    values: dict[str, Any]
    outcome: str
    families: tuple[str, ...] = ALL
    beside: dict[str, Any] = field(default_factory=dict)
    draws: bool = False

    def __str__(self) -> str:
        return ",".join(f"{name}={str(value)[:20]}" for name, value in self.values.items())[:60]


def rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **more}}


WINDOW = {"sliding_window": 16, "layer_types": None}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 90000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
NOT_GEMMA = tuple(family for family in ALL if family != "gemma3_text")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
CASES = (
    Case({"rms_norm_eps": 0.5}, HONOURED),
    Case({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported", NOT_GEMMA),
    Case({"head_dim": 20}, "head_dim 20 is not supported"),
    Case({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
    Case({"attention_bias": True}, HONOURED, WITH_BIASES, draws=True),
    Case({"mlp_bias": True}, HONOURED, ("smollm3", "granite"), draws=True),
    Case({"attention_bias": True, "mlp_bias": True}, UNREAD, ("phi3",)),
    Case({"mlp_bias": True}, UNREAD, ("olmo2", "gemma3_text")),
    Case(rope("default"), HONOURED, NOT_GEMMA),
    Case(rope("yarn", **YARN), HONOURED, ("smollm3", "granite", "olmo2")),
    Case(rope("llama3", **LLAMA3), HONOURED, ("smollm3", "granite", "olmo2")),
    Case(rope("default", partial_rotary_factor=0.5), HONOURED, ("phi3",)),
    Case(rope("default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5", ("granite",)),
    Case(rope("proportional"), "'proportional' is not supported", ("granite", "olmo2")),
    Case({"model_type": "gpt2"}, "model_type 'gpt2' does not go with", NOT_GEMMA),
    Case({"architectures": ["ElectraModel"]}, r"architecture \['ElectraModel'\] is not supported"),
    Case({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    Case({"is_causal": False}, "is_causal False is not supported"),
    # SmolLM3
    Case({"no_rope_layers": [0, 1]}, HONOURED, ("smollm3",)),
    Case({"no_rope_layer_interval": 2}, HONOURED, ("smollm3",), {"no_rope_layers": None}),
    Case({"no_rope_layer_interval": 2}, UNREAD, ("smollm3",)),
    Case({"use_sliding_window": True}, HONOURED, ("smollm3",), WINDOW),
    Case({"sliding_window": 9}, HONOURED, ("smollm3",), {**WINDOW, "use_sliding_window": True}),
    Case({"sliding_window": 9}, UNREAD, ("smollm3",), {"layer_types": None}),
    Case(
        {"layer_types": LAYER_TYPES},
        HONOURED,
        ("smollm3",),
        {**WINDOW, "use_sliding_window": True, "no_rope_layers": [1, 1]},
    ),
    Case({"layer_types": ["chunked_attention"] * 2}, "chunked", ("smollm3",)),
    # Granite
    Case({"embedding_multiplier": 3.0}, HONOURED, ("granite",)),
    Case({"residual_multiplier": 0.5}, HONOURED, ("granite",)),
    Case({"attention_multiplier": 0.3}, HONOURED, ("granite",)),
    Case({"logits_scaling": 2.0}, HONOURED, ("granite",)),
    # Phi-3
    Case({"sliding_window": 9}, HONOURED, ("phi3",)),
    Case({"original_max_position_embeddings": 32}, UNREAD, ("phi3",)),  # read by longrope
    # Gemma-3
    Case({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not", ("gemma3_text",)),
    Case({"query_pre_attn_scalar": 20}, HONOURED, ("gemma3_text",)),
    Case({"sliding_window": 9}, HONOURED, ("gemma3_text",)),
    Case({"layer_types": LAYER_TYPES[::-1]}, HONOURED, ("gemma3_text",)),
    Case({"final_logit_softcapping": 2.0}, HONOURED, ("gemma3_text",)),
    Case({"attn_logit_softcapping": 2.0}, "attn_logit_softcapping 2.0", ("gemma3_text",)),
    Case({"use_bidirectional_attention": True}, "use_bidirectional_attention", ("gemma3_text",)),
    Case({"rope_parameters": GEMMA_ROPES}, HONOURED, ("gemma3_text",)),
    # gpt-oss
    Case({"num_experts_per_tok": 3}, HONOURED, ("gpt_oss",)),
    Case({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but there are 4", ("gpt_oss",)),
    Case({"attention_bias": False}, HONOURED, ("gpt_oss",), draws=True),
    Case({"sliding_window": 9}, HONOURED, ("gpt_oss",)),
    Case({"sliding_window": None}, "sliding_window is None", ("gpt_oss",)),
    Case({"layer_types": LAYER_TYPES[::-1]}, HONOURED, ("gpt_oss",)),
    Case({"layer_types": ["chunked_attention"] * 2}, "chunked", ("gpt_oss",)),
    Case(rope("yarn", **YARN, truncate=True), HONOURED, ("gpt_oss",)),
    Case(rope("yarn", **YARN, truncate=False), HONOURED, ("gpt_oss",)),
    Case({"swiglu_limit": -7.0}, "swiglu_limit is -7.0: it must be a number", ("gpt_oss",)),
    Case({"swiglu_alpha": -1.0}, "swiglu_alpha is -1.0: it must be a number", ("gpt_oss",)),
    Case({"router_aux_loss_coef": 0.5, "output_router_logits": True}, UNREAD, ("gpt_oss",)),
    # older versions of transformers compute with constants in their place
    *(
        Case({name: value}, HONOURED, ("gpt_oss",))
        for name, value in (("swiglu_alpha", 0.5), ("swiglu_limit", 0.5))
        if name in {field.name for field in fields(GptOssConfig)}
    ),
)
PAIRS = [pytest.param(name, case, id=f"{name}-{case}") for case in CASES for name in case.families]


def all_cases(family: str) -> list[Case]:
    sizes = {**SIZES, **OWN_SIZES.get(family, {})}
    own = {field.name for field in fields(FAMILIES[family])}
    unread = {name: value for name, value in NOT_READ.items() if name not in OWN_READ & own}
    return [
        *(case for case in CASES if family in case.families),
        Case(sizes, HONOURED, draws=True),
        Case(unread, UNREAD),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_further_families_has_a_case(family: str) -> None:
    decided = {name for case in all_cases(family) for name in case.values}
    assert {field.name for field in fields(FAMILIES[family])} - decided == set()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {family: save_tiny(folder / family, family, **PLAIN[family]) for family in FAMILIES}


_usual: dict[str, Tensor] = {}


def usual_logits(plain: Path, family: str, case: Case, tmp_path: Path) -> Tensor:
    """transformers' logits for the checkpoint with the fields beside the case's alone."""
    key = f"{family} {json.dumps(case.beside, sort_keys=True)}"
    if key not in _usual:
        _usual[key] = expected_logits(edited(plain, tmp_path / "usual", case.beside))
    return _usual[key]


def check(
    family: str, case: Case, plain: dict[str, Path], base: dict[str, Any], tmp_path: Path
) -> None:
    """`base` are the fields of the family's checkpoint in `plain`. Its name is transformers' model
    type, and may have another word after a hyphen."""
    options = {"enforce_eager": True, "max_model_len": LENGTH, "num_kvcache_blocks": 17}
    if case.draws:
        folder = save_tiny(
            tmp_path, family.partition("-")[0], **{**base, **case.beside, **case.values}
        )
    else:
        folder = edited(plain[family], tmp_path, {**case.beside, **case.values})
    if case.outcome not in (HONOURED, UNREAD):
        with pytest.raises(ValueError, match=case.outcome):
            load(folder, "cpu", **options)
        return
    expected = expected_logits(folder)
    usual = usual_logits(plain[family], family, case, tmp_path)
    is_same = usual.shape == expected.shape and torch.equal(usual, expected)
    assert is_same == (case.outcome == UNREAD)
    found = engine_logits(load(folder, "cpu", **options), KNOWN)
    assert max_difference(found, [expected]) <= TOLERANCE


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_a_field_of_a_further_family_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, case, plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_are_honoured_together(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, all_cases(family)[-2], plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_no_logits_depend_on_change_nothing(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, all_cases(family)[-1], plain, PLAIN[family], tmp_path)
