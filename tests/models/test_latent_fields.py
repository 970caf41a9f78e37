"""Every field of the configs of models with latents is honoured, refused or unread.

As in `test_family_fields.py`: fields that are sizes change together, and so do those that no logits
depend on. Fields that all families honour change together, too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig, PretrainedConfig

from tests.models import test_family_fields
from tests.models.harness import engine_logits, load, max_difference
from tests.models.latent_cases import BY_NAME, YARN
from tests.models.test_config_fields import (
    HONOURED,
    KNOWN,
    LENGTH,
    TOLERANCE,
    UNREAD,
    edited,
    expected_logits,
)
from tests.models.test_family_fields import NOT_READ, rope

V2, V3, GLM = "v2", "v3", "glm"
CLASSES: dict[str, type[PretrainedConfig]] = {
    V2: DeepseekV2Config,
    V3: DeepseekV3Config,
    GLM: Glm4MoeLiteConfig,
}
SIGMOID = (V3, GLM)


@dataclass(frozen=True)
class Case(test_family_fields.Case):
    families: tuple[str, ...] = tuple(CLASSES)


SIZES: dict[str, Any] = {
    "vocab_size": 77, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": None, "kv_lora_rank": 24,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 18,
    "n_routed_experts": 8, "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 3, "moe_intermediate_size": 20, "tie_word_embeddings": True,
    "attention_bias": False,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    V2: {"first_k_dense_replace": 2},
    V3: {"first_k_dense_replace": 2},
    GLM: {"mlp_layer_types": ["sparse", "dense", "sparse"]},
}
UNREAD_HERE: dict[str, Any] = {
    "output_router_logits": True, "num_nextn_predict_layers": 2, "seq_aux": False, "ep_size": 2,
    "aux_loss_alpha": 0.5,
}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 1}
TOGETHER = {"rms_norm_eps": 0.5, "routed_scaling_factor": 3.0, **rope(**YARN), **GROUPS}
CASES = (
    Case(TOGETHER, HONOURED),
    Case({"norm_topk_prob": False, "rope_interleave": False}, HONOURED, SIGMOID),
    Case({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    Case({"num_key_value_heads": 2}, "num_key_value_heads is 2, but all heads have"),
    Case({"head_dim": 16}, "head_dim is 16: it must be qk_rope_head_dim, 8", (V3,)),
    Case({"head_dim": 16}, UNREAD, (V2,)),
    Case({"kv_lora_rank": 1024}, "kv_lora_rank 1024 is not supported: it must be", (V3,)),
    Case({"q_lora_rank": 0}, "q_lora_rank is 0: it must be null or at least 1", (V3,)),
    Case({"v_head_dim": 0}, "v_head_dim is 0: it must be at least 1", (V3,)),
    Case({"n_shared_experts": 0}, "n_shared_experts is 0: it must be at least 1", (V3,)),
    Case({"attention_bias": True}, HONOURED, (V3, GLM), draws=True),
    Case({"attention_bias": True}, "True is not supported with q_lora_rank null", (V3,),
         {"q_lora_rank": None}),
    Case(rope(**{**YARN, "mscale_all_dim": 0.3}), HONOURED, (V3,), rope(**YARN)),
    Case(rope(**{**YARN, "mscale": 0.2}), HONOURED, (V3,), rope(**YARN)),
    Case(rope("linear", factor=2.0, mscale_all_dim=0.5), HONOURED, (V3,)),
    Case(rope("default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported"),
    Case({"model_type": "gpt2"}, "model_type 'gpt2' does not go with"),
    Case({"architectures": ["ElectraModel"]}, r"architecture \['ElectraModel'\] is not supported"),
    Case({"quantization_config": {"quant_method": "hqq"}}, "quantization_config"),
    Case({"is_causal": False}, "is_causal False is not supported"),
    Case({"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported: only 1 is", (V2, V3)),
    Case({"first_k_dense_replace": 9}, "first_k_dense_replace is 9: it must be from", (V2, V3)),
    Case({"num_nextn_predict_layers": 99}, "num_nextn_predict_layers is 99: it must", (V3,)),
    # the router
    Case({"norm_topk_prob": True}, "norm_topk_prob True is not supported by DeepseekV2", (V2,)),
    Case(GROUPS, UNREAD, (V2,), {"topk_method": "greedy"}),
    Case({"topk_method": "greedy"}, HONOURED, (V2,)),
    Case({"topk_method": "noaux_tc"}, "'noaux_tc' is not supported by DeepseekV2", (V2,)),
    Case({"topk_method": "greedy"}, "topk_method 'greedy' is not supported by", SIGMOID),
    Case({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0: it must be", (V2, V3)),
    Case({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported", (V2,)),
    Case({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported", SIGMOID),
    Case({"num_experts_per_tok": None}, "num_experts_per_tok is 0: it must be", (V2,)),
    Case({"n_group": 5}, "n_group is 5: it must divide 12 experts", (V3,)),
    Case({"n_group": 4, "topk_group": 5}, "topk_group is 5: it must be from 1 to", (V3,)),
    Case({"n_group": 12, "topk_group": 4}, "a group has 1 of 12 experts: it must have at", SIGMOID),
    Case({"n_group": 6, "topk_group": 1}, "1 of 6 groups have 2 experts", (V3,)),
    Case({"mlp_bias": True}, "mlp_bias True is not supported by DeepseekV2", (V2,)),
    # GLM
    Case({"mlp_layer_types": ["moe"] * 2}, "it must have 'sparse' or 'dense' for each", (GLM,)),
    Case({"first_k_dense_replace": 2}, "first_k_dense_replace is 2, but mlp_layer_types", (GLM,)),
)  # fmt: skip
PLAIN = {"num_hidden_layers": 2, **rope("default")}
PAIRS = [pytest.param(name, case, id=f"{name}-{case}") for case in CASES for name in case.families]


def sizes(family: str) -> Case:
    return Case({**SIZES, **OWN_SIZES[family]}, HONOURED, draws=True)


def unread(family: str) -> Case:
    return Case({**NOT_READ, **UNREAD_HERE}, UNREAD)


@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_models_with_latents_has_a_case(family: str) -> None:
    own = [*(case for case in CASES if family in case.families), sizes(family), unread(family)]
    decided = {name for case in own for name in case.values}
    assert {field.name for field in fields(CLASSES[family])} - decided <= {"num_mtp_layers"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {family: BY_NAME[family].save(folder / family, **PLAIN) for family in CLASSES}


_usual: dict[str, Tensor] = {}


def usual_logits(plain: Path, family: str, case: Case, tmp_path: Path) -> Tensor:
    """transformers' logits for the checkpoint with the fields beside the case's alone."""
    key = f"{family} {case.beside}"
    if key not in _usual:
        _usual[key] = expected_logits(edited(plain, tmp_path / "usual", case.beside))
    return _usual[key]


def check(family: str, case: Case, plain: dict[str, Path], tmp_path: Path) -> None:
    options = {"enforce_eager": True, "max_model_len": LENGTH, "num_kvcache_blocks": 17}
    if case.draws:
        folder = BY_NAME[family].save(tmp_path, **{**PLAIN, **case.beside, **case.values})
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
def test_a_field_of_a_model_with_latents_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, case, plain, tmp_path)


@pytest.mark.parametrize("kind", [sizes, unread])
@pytest.mark.parametrize("family", CLASSES)
def test_sizes_are_honoured_and_other_fields_change_nothing(
    family: str, kind: Any, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, kind(family), plain, tmp_path)
