"""Every field of the config classes of more families is honoured, refused or unread.

As `test_family_fields.py`, with the fields of one outcome together: where all are honoured, the
logits are transformers' own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.conftest import save_tiny
from tests.models.families import ALPHA, COHERE, GEMMA4, GRANITE, GROWING, ROPES, WINDOWS
from tests.models.harness import engine_logits, load, max_difference
from tests.models.routes import edit
from tests.models.test_config_fields import KNOWN, LENGTH, TOLERANCE, edited, expected_logits
from tests.models.test_family_fields import NOT_READ, SIZES
from tests.models.test_moe_configs import read
from tests.models.test_more_experts import CASES as MIXTURES
from tests.models.test_more_experts import biased

Fields = dict[str, Any]
SMALL: Fields = {"vocab_size": 96, "pad_token_id": None}
THREE: Fields = {**SMALL, "num_hidden_layers": 3}
THETA: Fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
PARTLY: Fields = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
    }
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
THREE_GEMMA = {**THREE, **GEMMA4, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}
EPS: Fields = {"rms_norm_eps": 0.5}
REFUSED = (  # by every family
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"architectures": ["ElectraModel"]}, r"architecture \['ElectraModel'\] is not supported"),
)
WINDOWS_BACK: Fields = {
    "sliding_window": 9, "layer_types": ["full_attention", *WINDOWS["layer_types"][:2]],
}  # fmt: skip
UNBIASED: Fields = {"attention_bias": True, "mlp_bias": True}


@dataclass(frozen=True)
class Family:
    """The fields of a family's small checkpoint, and what becomes of changes of them.

    `drawn` changes sizes, `honoured` other fields, and each of `refused` is fields and a message.
    """

    config: str
    plain: Fields
    drawn: Fields = field(default_factory=dict)
    honoured: Fields = field(default_factory=dict)
    unread: Fields = field(default_factory=dict)
    refused: tuple[tuple[Fields, str], ...] = ()


def mixture(name: str) -> Fields:
    return {**SMALL, **MIXTURES[name][1]}


EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 40}
FAMILIES: dict[str, Family] = {
    "ministral": Family(
        "MinistralConfig", {**THREE, **WINDOWS}, honoured={**EPS, **THETA, **WINDOWS_BACK},
        unread=UNBIASED,
        refused=(({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),),
    ),
    "ministral3": Family(
        "Ministral3Config", {**SMALL, **GROWING},
        honoured={
            **EPS, "sliding_window": 9, "rope_parameters": {
                **GROWING["rope_parameters"], "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 8, "rope_theta": 500.0,
            },
        },
        unread=UNBIASED,
        refused=(
            (
                {"rope_parameters": {**GROWING["rope_parameters"], "llama_4_scaling_beta": -1.0}},
                "llama_4_scaling_beta is -1.0: it must be a number from 0",
            ),
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                     "llama_4_scaling_beta": 0.5}},
                "original_max_position_embeddings is None: it must be at least 1",
            ),
        ),
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig", {**THREE_GEMMA, "attention_k_eq_v": True},
        {"attention_bias": True, "global_head_dim": 48, "num_global_key_value_heads": 3,
         "attention_k_eq_v": False, "layer_types": [FULL, SLIDING, FULL],
         "num_key_value_heads": 6, "head_dim": 24, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 100, "num_kv_shared_layers": 1, "use_double_wide_mlp": True,
         "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2,
         "moe_intermediate_size": 40},
        {**EPS, "sliding_window": 9, "final_logit_softcapping": 2.0, "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 500.0,
                               "partial_rotary_factor": 0.5, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        }},
        {"mlp_bias": True, "use_bidirectional_attention": "vision", "use_double_wide_mlp": True,
         "vocab_size_per_layer_input": 7, "num_experts": 3, "top_k_experts": 2,
         "moe_intermediate_size": 7},
        (
            ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3"),
            ({"enable_moe_block": True}, "num_experts is null: enable_moe_block needs a number"),
            ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ),
    ),
    "glm4": Family(
        "Glm4Config", SMALL, {"attention_bias": False}, {**EPS, **PARTLY}, {"mlp_bias": True}
    ),
    "olmo3": Family(
        "Olmo3Config", {**THREE, **WINDOWS, **ROPES}, {"attention_bias": True},
        {**EPS, **WINDOWS_BACK, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        }},
        {"mlp_bias": True, "default_theta": 3.0},
    ),
    "seed_oss": Family(
        "SeedOssConfig", SMALL,
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}, {**EPS, **THETA},
        {"residual_dropout": 0.5},
    ),
    "exaone4": Family(
        "Exaone4Config", {**THREE, **WINDOWS}, {}, {**EPS, **THETA, **WINDOWS_BACK},
        {**UNBIASED, "sliding_window_pattern": 2},
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1Config", {**SMALL, "head_dim": 32}, {"attention_bias": True},
        {**EPS, **ALPHA}, {"mlp_bias": True, "eod_token_id": 7},
        (({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0,
                               "alpha": -1.0}}, "alpha is -1.0: it must be a number above 0"),),
    ),
    "ernie4_5": Family(
        "Ernie4_5Config", SMALL, {"use_bias": True}, {**EPS, **THETA},
        {**UNBIASED, "default_theta": 3.0},
    ),
    "cohere": Family(
        "CohereConfig", SMALL,
        {"attention_bias": True, "use_qk_norm": True, "hidden_size": 96},
        {"layer_norm_eps": 0.5, **THETA, "logit_scale": 0.7}, {"default_theta": 3.0, **EPS},
        (({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"), ({"logit_scale": 0}, "logit_scale")),
    ),
    "cohere2": Family(
        "Cohere2Config", {**THREE, **WINDOWS, "hidden_size": 64},
        {"attention_bias": True, **COHERE},
        {"layer_norm_eps": 0.5, **THETA, "logit_scale": 0.7, **WINDOWS_BACK}, EPS,
        (({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"), ({"logit_scale": 0}, "logit_scale")),
    ),
    "starcoder2": Family(
        "Starcoder2Config", {**SMALL, "use_bias": False}, {"use_bias": True},
        {"norm_epsilon": 0.5, **THETA, "sliding_window": 9},
        {**UNBIASED, **EPS, "residual_dropout": 0.5, "embedding_dropout": 0.5},
        (({"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),),
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig", mixture("glm-groups"),
        {**EXPERTS, "n_routed_experts": 9, "n_shared_experts": 1, "use_qk_norm": False,
         "attention_bias": True, "first_k_dense_replace": 2, "topk_group": 3},
        {**EPS, **PARTLY, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 2,
         "routed_scaling_factor": 0.5, "norm_topk_prob": False},
        {"mlp_bias": True, "num_mtp_layers": 2, "output_router_logits": True},
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig", mixture("ernie"),
        {"moe_num_experts": 5, "moe_intermediate_size": 40, "moe_num_shared_experts": 1,
         "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 2},
        {**EPS, **THETA, "moe_k": 3, "moe_norm_min": 0.9},
        {"router_aux_loss_coef": 0.5, "output_router_logits": True, "default_theta": 3.0,
         **UNBIASED},
        (({"use_bias": True}, "use_bias True is not supported"),),
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1Config", {**mixture("hunyuan"), "head_dim": 32, "attention_bias": False},
        {"num_experts": 5, "attention_bias": True}, {**EPS, **THETA, "moe_topk": 3},
        {"mlp_bias": True, "eod_token_id": 7, "sep_token_id": 7, "output_router_logits": True},
        (({"moe_topk": [1, 2]}, r"moe_topk is \[1, 2\]"),),
    ),
    "granitemoe": Family(
        "GraniteMoeConfig", {**SMALL, **MIXTURES["granite"][1], "attention_bias": False},
        {"num_local_experts": 5, "attention_bias": True},
        {**EPS, **THETA, "num_experts_per_tok": 3, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
        {"router_aux_loss_coef": 0.5, "mlp_bias": True, "output_router_logits": True},
        (({"attention_multiplier": 0}, "attention_multiplier is 0"),),
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig", mixture("granite-shared"),
        {"num_local_experts": 5, "attention_bias": True, "shared_intermediate_size": 40},
        {**EPS, **THETA, "num_experts_per_tok": 1, **GRANITE, "logits_scaling": 2.0},
        {"router_aux_loss_coef": 0.5, "mlp_bias": True, "output_router_logits": True},
        (({"logits_scaling": 0}, "logits_scaling is 0"),),
    ),
}  # fmt: skip
OWN = {
    "logit_scale",
    "embedding_multiplier",
    "final_logit_softcapping",
}  # of `NOT_READ`, which these families may read


def unread(name: str) -> Fields:
    family = FAMILIES[name]
    read = {one.name for one in fields(getattr(transformers, family.config))} & OWN
    not_read = {key: value for key, value in NOT_READ.items() if key not in read}
    return {**not_read, **family.unread}


def sizes(name: str) -> Fields:
    """Sizes that differ from those of the plain checkpoint, and from each other."""
    family = FAMILIES[name]
    layers = family.plain.get("layer_types")
    own = {"layer_types": layers[::-1]} if layers else {}
    return {**SIZES, **own, **family.drawn}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: save(folder / name, name, family.plain) for name, family in FAMILIES.items()}


def save(folder: Path, name: str, changes: Fields) -> Path:
    return edit(save_tiny(folder, name, **changes), biased)


def difference(folder: Path) -> float:
    options = {"enforce_eager": True, "max_model_len": LENGTH, "num_kvcache_blocks": 33}
    found = engine_logits(load(folder, "cpu", **options), KNOWN)
    return max_difference(found, [theirs(folder)])


@cache
def theirs(folder: Path) -> Tensor:
    return expected_logits(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_more_families_has_a_case(name: str) -> None:
    family = FAMILIES[name]
    decided = {*sizes(name), *family.honoured, *unread(name)}
    decided |= {key for changes, _ in (*REFUSED, *family.refused) for key in changes}
    config = getattr(transformers, family.config)
    assert {one.name for one in fields(config)} - decided == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_are_honoured_together(name: str, tmp_path: Path) -> None:
    changes = {**FAMILIES[name].plain, **sizes(name), **FAMILIES[name].honoured}
    assert difference(save(tmp_path, name, changes)) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_without_an_effect_change_nothing(
    name: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(plain[name], tmp_path, unread(name))
    assert torch.equal(theirs(folder), theirs(plain[name]))
    assert difference(folder) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_computed_is_refused(name: str, plain: dict[str, Path], tmp_path: Path) -> None:
    written = json.loads((plain[name] / "config.json").read_text())
    for changes, message in (*REFUSED, *FAMILIES[name].refused):
        with pytest.raises(ValueError, match=message):
            read({**written, **changes}, tmp_path)
