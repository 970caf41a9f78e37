"""Further architectures with experts give transformers' logits: other routers, shared experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures import of_types
from tests.conftest import save_tiny, tiny_config
from tests.models import test_shards
from tests.models.families import ALPHA, GRANITE
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.moe_cases import FEW_ROWS, HIDDEN, TOLERANCE, VOCAB_SIZE
from tests.models.routes import edit
from tests.models.test_moe_configs import read

LENGTHS = ((1, 6), (19, 23), (70, 73))
# no two sizes are equal, to show code that confuses them
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "intermediate_size": 56, "head_dim": 16,
    "num_hidden_layers": 3, "tie_word_embeddings": False, "max_position_embeddings": 256,
    "pad_token_id": None,
}  # fmt: skip
GLM = {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
ERNIE = {
    "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
}  # fmt: skip
GRANITE_MOE = {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-groups": ("glm4_moe", {**GLM, "use_qk_norm": True}),
    "glm-one-group": (
        "glm4_moe",
        {**GLM, "n_group": 1, "topk_group": 1, "attention_bias": True, "norm_topk_prob": False},
    ),
    "ernie": ("ernie4_5_moe", ERNIE),
    "hunyuan": (
        "hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 2, "attention_bias": True, **ALPHA}
    ),
    "granite": ("granitemoe", {**GRANITE_MOE, "attention_bias": True}),
    "granite-shared": ("granitemoeshared", {**GRANITE_MOE, "shared_intermediate_size": 24}),
}  # fmt: skip
NAMES = of_types(*(model_type for model_type, _ in CASES.values()))
GRAPHS = ("glm-groups", "ernie", "hunyuan", "granite", "granite-shared")


def save(folder: Path, name: str, **changes: Any) -> Path:
    model_type, own = CASES[name]
    save_tiny(folder, model_type, **{**SIZES, **own, **changes})
    return edit(folder, biased)


def biased(weights: dict[str, Tensor]) -> None:
    """Biases of routers, which transformers initializes to zeros, decide a part of the choices."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def check(folder: Path, lengths: tuple[tuple[int, int], ...] = LENGTHS, **options: Any) -> None:
    known = sequences(VOCAB_SIZE, *lengths)
    found = engine_logits(load(folder, "cpu", **options), known)
    assert max_difference(found, transformers_logits(folder, known, "cpu")) <= TOLERANCE


@pytest.mark.shows("eager", architectures=NAMES)
@pytest.mark.parametrize("name", CASES)
def test_eager_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(save(tmp_path, name), enforce_eager=True)


@pytest.mark.shows("graph", architectures=of_types(*(CASES[name][0] for name in GRAPHS)))
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    num_layers = 1 if name == "hunyuan" else 2  # a rotation before a norm takes long to compile
    check(save(tmp_path, name, num_hidden_layers=num_layers), LENGTHS[1:], **FEW_ROWS)


@pytest.mark.shows("ranks", architectures=NAMES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "glm-groups"])
def test_ranks_give_the_logits_of_one(name: str, tmp_path: Path) -> None:
    """Half of the cases have whole experts on each rank."""
    folder, whole = save(tmp_path, name), name in ("glm-one-group", "ernie", "granite-shared")
    test_shards.check(folder, 2, VOCAB_SIZE, enable_expert_parallel=whole)


def test_biases_of_routers_change_choices(tmp_path: Path) -> None:
    """So the cases above show them."""
    known = sequences(VOCAB_SIZE, (19, 23))
    for name in ("glm-groups", "ernie"):
        folder = save(tmp_path / name, name)
        before = transformers_logits(folder, known, "cpu")
        edit(folder, without_biases)
        assert max_difference(before, transformers_logits(folder, known, "cpu")) > 0.1


def without_biases(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            weight.zero_()


def test_layers_that_propose_tokens_are_not_read(tmp_path: Path) -> None:
    """GLM-4.5 has them after the last layer, ERNIE 4.5 under a name of their own."""
    for name, extra in (("glm-groups", "model.layers.3.eh_proj.weight"),
                        ("ernie", "model.mtp_linear_proj.0.weight")):  # fmt: skip
        folder = save(tmp_path / name, name, num_nextn_predict_layers=1)
        edit(folder, lambda weights, extra=extra: {**weights, extra: torch.ones(2, 2)})
        load(folder, "cpu", enforce_eager=True)


def test_scores_are_in_fp32_in_a_model_in_bf16(tmp_path: Path) -> None:
    """Two experts whose scores are equal in bf16 are told apart."""
    folder = save(tmp_path, "glm-one-group", dtype="bfloat16")
    runner = load(folder, "cpu", dtype="bfloat16", enforce_eager=True)
    layer = runner.params.layers[-1]
    assert layer.router_ED.dtype == layer.router_bias_E.dtype == torch.float32
    assert layer.mlp_norm_D.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("glm-groups", {"n_group": 5}, "n_group is 5: it must divide 12 experts"),
        ("glm-groups", {"topk_group": 5}, "topk_group is 5: it must be from 1 to n_group 4"),
        ("glm-groups", {"topk_group": 1, "num_experts_per_tok": 4}, "groups have 3 experts"),
        ("glm-groups", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0"),
        ("glm-groups", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("glm-groups", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("ernie", {"use_bias": True}, "use_bias True is not supported"),
        ("ernie", {"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ("ernie", {"moe_norm_min": 0.0}, "moe_norm_min is 0.0"),
        ("hunyuan", {"moe_topk": [1, 2, 2]}, r"moe_topk is \[1, 2, 2\]"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model_type, own = CASES[name]
    fields = tiny_config(model_type, **{**SIZES, **own}).to_dict()
    fields |= {"architectures": list(of_types(model_type)), **changes}
    with pytest.raises(ValueError, match=message):
        read(fields, tmp_path)
