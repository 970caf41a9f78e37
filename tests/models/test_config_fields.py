"""Every field of transformers' config classes is honoured, refused by name, or shown to be unread.

Each case gives a field a value that matters. A field that a newer transformers adds fails the first
test until it has a case.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nanovllm.models import rope
from tests.conftest import save_tiny
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits

TOLERANCE = 1e-4
VOCAB_SIZE, LENGTH = 96, 44
KNOWN = sequences(77, (LENGTH - 2, LENGTH))  # ids that every vocabulary here has
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": MixtralConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
QWEN = ("qwen2", "qwen3")
QWEN_MOE = ("qwen2_moe", "qwen3_moe")
MOE = ("mixtral", *QWEN_MOE)
NOT_MIXTRAL = tuple(family for family in FAMILIES if family != "mixtral")
# The fields of a family's checkpoint. The second layer of the last two is dense.
SMALL = {"vocab_size": VOCAB_SIZE, "num_experts_per_tok": 2}
EXPERTS = {**SMALL, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
PLAIN: dict[str, dict[str, Any]] = {
    **{family: {"vocab_size": VOCAB_SIZE} for family in FAMILIES},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS,
}
HONOURED, UNREAD = "honoured", "unread"


@dataclass(frozen=True)
class Case:
    """A field's value and what becomes of it.

    HONOURED: transformers' logits change, and ours are equal to them. UNREAD: by transformers' own
    code, the value changes no logits. Anything else is the message of a refusal. `beside` are
    fields without which the value would not matter. With `draws`, transformers makes a checkpoint
    with the value; otherwise config.json is changed.
    """

    field: str
    value: Any
    outcome: str
    families: tuple[str, ...] = tuple(FAMILIES)
    beside: dict[str, Any] = field(default_factory=dict)
    draws: bool = False

    def __str__(self) -> str:
        return f"{self.field}={str(self.value)[:40]}"


def rope_case(
    outcome: str,
    rope_type: str,
    name: str = "rope_parameters",
    families: tuple[str, ...] = tuple(FAMILIES),
    **more: Any,
) -> Case:
    """A case of a rope type. The types that extend a context extend 32 positions."""
    positions = 32 if rope_type in ("linear", "dynamic", "yarn") else 128
    value = {"rope_theta": 10000.0, "rope_type": rope_type, **more}
    beside = {"max_position_embeddings": positions, "rope_parameters": None}
    return Case(name, value, outcome, families, beside)


SWAP: dict[str, Any] = {"rope_parameters": None}  # transformers wrote it, in its default form
ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"factor": 4.0, **ORIGINAL}
LONGROPE = {
    "short_factor": [1.0 + 0.01 * i for i in range(16)],
    "long_factor": [1.5 + 0.1 * i for i in range(16)],
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
WINDOW = {"sliding_window": 16, "layer_types": None}
WINDOWS = {"use_sliding_window": True, **WINDOW}
LAYER_TYPES = ["sliding_attention", "full_attention"]

SIZES = (
    Case("vocab_size", 77, HONOURED, draws=True),
    Case("hidden_size", 40, HONOURED, draws=True),
    Case("intermediate_size", 56, HONOURED, draws=True),
    Case("intermediate_size", 0, "intermediate size is 0", ("mixtral",)),
    Case("num_hidden_layers", 3, HONOURED, draws=True),
    Case("num_attention_heads", 8, HONOURED, draws=True),
    Case("num_key_value_heads", 1, HONOURED, draws=True),
    Case(
        "num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"
    ),
    Case("head_dim", 16, HONOURED, draws=True),
    Case("head_dim", 20, "head_dim 20 is not supported"),
)
LAYERS = (
    Case("hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
    Case("rms_norm_eps", 0.5, HONOURED),
    Case("tie_word_embeddings", False, HONOURED, draws=True),
    Case("attention_bias", True, HONOURED, ("llama", "qwen3", "qwen3_moe"), draws=True),
    Case("attention_bias", True, UNREAD, ("mistral", "qwen2", "mixtral", "qwen2_moe")),
    Case("mlp_bias", True, HONOURED, ("llama",), draws=True),
    Case("mlp_bias", True, UNREAD, ("mistral", *QWEN, *MOE)),
    Case("qkv_bias", False, HONOURED, ("qwen2_moe",), draws=True),
    Case("qkv_bias", True, UNREAD, ("mixtral", "qwen3_moe")),
    Case("is_causal", False, "is_causal False is not supported"),
    Case("per_layer_config", {"0": {"rms_norm_eps": 0.5}}, "per_layer_config"),
    Case("quantization_config", {"quant_method": "awq"}, "quantization_config"),
)
SPARSE = (
    Case("num_experts", 5, HONOURED, QWEN_MOE, draws=True),
    Case("num_local_experts", 5, HONOURED, ("mixtral",), draws=True),
    Case("num_experts", 0, "num_experts is 0: it must be at least 1", ("qwen2_moe",)),
    Case("num_local_experts", 0, "num_experts is 0", ("mixtral", "qwen3_moe")),
    Case("num_experts_per_tok", 1, HONOURED, MOE),
    Case("num_experts_per_tok", 0, "num_experts_per_tok is 0: it must be at least 1", MOE),
    Case("num_experts_per_tok", 5, "num_experts_per_tok is 5, but there are 4 experts", MOE),
    Case("moe_intermediate_size", 40, HONOURED, QWEN_MOE, draws=True),
    Case("moe_intermediate_size", 0, "the experts' intermediate size is 0", QWEN_MOE),
    Case("shared_expert_intermediate_size", 24, HONOURED, ("qwen2_moe",), draws=True),
    Case("shared_expert_intermediate_size", 0, "does not have, e.g. .*shared_", ("qwen2_moe",)),
    Case("norm_topk_prob", True, HONOURED, QWEN_MOE),
    Case("norm_topk_prob", False, UNREAD, ("mixtral",)),
    Case("mlp_only_layers", [0], HONOURED, QWEN_MOE, draws=True),
    Case("mlp_only_layers", [0, 1], HONOURED, QWEN_MOE, draws=True),
    Case("mlp_only_layers", [2], "mlp_only_layers names layer 2", QWEN_MOE),
    Case("decoder_sparse_step", 2, HONOURED, QWEN_MOE, {"mlp_only_layers": []}, draws=True),
    Case("decoder_sparse_step", 0, "decoder_sparse_step is 0: it must be at least 1", QWEN_MOE),
    # Fields of training.
    Case("output_router_logits", True, UNREAD, MOE),
    Case("router_aux_loss_coef", 0.5, UNREAD, MOE),
    Case("router_jitter_noise", 0.5, UNREAD, MOE),
    # Fields of other families' routers.
    Case("scoring_func", "sigmoid", "scoring_func 'sigmoid' is not supported", MOE),
    Case("scoring_func", "softmax", UNREAD, MOE),
    Case("score_function", "sigmoid", "score_function 'sigmoid' is not supported", MOE),
    Case("topk_method", "noaux_tc", "topk_method 'noaux_tc' is not supported", MOE),
    Case("n_group", 8, "n_group 8 is not supported", MOE),
    Case("n_group", 1, UNREAD, MOE),
    Case("topk_group", 4, "topk_group 4 is not supported", MOE),
    Case("routed_scaling_factor", 2.5, "routed_scaling_factor 2.5 is not supported", MOE),
    Case("routed_scaling_factor", 1.0, UNREAD, MOE),
    Case("use_routing_bias", True, "use_routing_bias True is not supported", MOE),
)
ATTENTION = (
    Case("sliding_window", 9, HONOURED, ("mistral", "mixtral")),
    Case("sliding_window", 9, HONOURED, ("qwen3_moe",), {"use_sliding_window": True}),
    Case("sliding_window", 9, UNREAD, QWEN_MOE),
    Case("sliding_window", 9, HONOURED, ("qwen2_moe",), {**WINDOWS, "max_window_layers": 1}),
    Case("use_sliding_window", True, HONOURED, ("qwen2_moe",), {**WINDOW, "max_window_layers": 1}),
    Case("use_sliding_window", True, HONOURED, ("qwen3_moe",), {"sliding_window": 16}),
    Case("max_window_layers", 0, HONOURED, ("qwen2_moe",), WINDOWS),
    Case("max_window_layers", 1, UNREAD, ("qwen3_moe",), WINDOWS),
    Case("layer_types", LAYER_TYPES, HONOURED, ("qwen2_moe",), {**WINDOWS, "max_window_layers": 0}),
    Case("layer_types", LAYER_TYPES, UNREAD, ("mixtral", "qwen3_moe"), WINDOWS),
    Case("layer_types", ["chunked_attention"] * 2, "chunked_attention", ("qwen2_moe",)),
    Case("sliding_window", 9, HONOURED, QWEN, {**WINDOWS, "max_window_layers": 1}),
    Case("sliding_window", 9, UNREAD, QWEN, {"layer_types": None, "max_window_layers": 1}),
    Case("sliding_window", 9, UNREAD, ("llama",)),
    Case("use_sliding_window", True, HONOURED, QWEN, {**WINDOW, "max_window_layers": 1}),
    Case("max_window_layers", 0, HONOURED, QWEN, WINDOWS),
    Case("layer_types", LAYER_TYPES, HONOURED, QWEN, {**WINDOWS, "max_window_layers": 9}),
    Case("layer_types", LAYER_TYPES, HONOURED, ("mistral",), {"sliding_window": 16}),
    Case("layer_types", ["chunked_attention"] * 2, "chunked_attention", ("mistral", *QWEN)),
    Case("layer_types", LAYER_TYPES, UNREAD, ("llama",), {"sliding_window": 16}),
)
ROPE = (
    rope_case(HONOURED, "default", rope_theta=5000.0),
    rope_case(HONOURED, "default", "rope_scaling", rope_theta=5000.0),
    rope_case(HONOURED, "linear", factor=4.0),
    rope_case(HONOURED, "dynamic", factor=4.0),
    rope_case(HONOURED, "yarn", **YARN),
    rope_case(HONOURED, "yarn", "rope_scaling", **YARN),
    rope_case(HONOURED, "yarn", **YARN, attention_factor=1.5),
    rope_case(HONOURED, "yarn", **YARN, beta_fast=16.0, beta_slow=2.0, truncate=False),
    rope_case(HONOURED, "yarn", **YARN, mscale=0.7, mscale_all_dim=0.4),
    rope_case(HONOURED, "llama3", **LLAMA3),
    rope_case(UNREAD, "default", families=NOT_MIXTRAL, mrope_section=[4, 6, 6]),
    rope_case(
        UNREAD, "default", families=("mixtral",), mrope_section=[4, 6, 6], rope_theta=1_000_000.0
    ),
    rope_case("rope_theta None", "default", rope_theta=None),
    rope_case("factor 0", "linear", factor=0),
    rope_case("rope type 'proportional' is not supported", "proportional"),
    rope_case("partial_rotary_factor 0.5", "default", partial_rotary_factor=0.5),
    rope_case("extrapolation_factor 2.0", "yarn", **YARN, extrapolation_factor=2.0),
    rope_case("attn_factor 0.9 is not supported with", "linear", factor=2.0, attn_factor=0.9),
    rope_case("both attn_factor", "yarn", **YARN, attn_factor=0.9, attention_factor=0.9),
    rope_case("transformers refuses .*validate_rope", "yarn", **YARN, beta_fast="x"),
    rope_case("cannot be used", "longrope", short_factor=[1.0] * 3, long_factor=[1.0] * 3),
    Case(
        "rope_parameters",
        {"full_attention": {"rope_theta": 5000.0, "rope_type": "default"}},
        "full_attention",
    ),
    Case(
        "rope_parameters",
        {"rope_type": "longrope", "factor": 4.0, **LONGROPE, **ORIGINAL},
        HONOURED,
        beside={"max_position_embeddings": 128},
    ),
    Case(  # as Phi-3 writes it
        "original_max_position_embeddings",
        32,
        HONOURED,
        beside={
            "rope_parameters": None,
            "rope_scaling": {"rope_type": "longrope", **LONGROPE},
            "max_position_embeddings": 128,
        },
    ),
    Case("rope_theta", 100.0, HONOURED, beside=SWAP),
    Case("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5", beside=SWAP),
    Case("max_position_embeddings", 77, UNREAD),  # the limit of max_model_len: see test_rope.py
)
OTHERS = (
    Case("architectures", ["ElectraModel"], r"architecture \['ElectraModel'\] is not supported"),
    Case("model_type", "gpt2", "model_type 'gpt2' does not go with"),
    # The answer's end and text depend on ids of special tokens; no logits do.
    Case("bos_token_id", 7, UNREAD),
    Case("eos_token_id", [7, 8], UNREAD),
    Case("eos_token_id", [7, None], "eos_token_id"),
    Case("pad_token_id", 7, UNREAD),
    # The engine's `dtype` decides, see `choose_dtype`.
    Case("dtype", "float16", UNREAD),
    Case("torch_dtype", "float16", UNREAD, beside={"dtype": None}),
    # Fields of training, of other tasks and of transformers' own calls.
    Case("attention_dropout", 0.5, UNREAD),
    Case("chunk_size_feed_forward", 2, UNREAD),
    Case("id2label", {"0": "a", "1": "b", "2": "c"}, UNREAD),
    Case("initializer_range", 0.7, UNREAD),
    Case("is_encoder_decoder", True, UNREAD),
    Case("label2id", {"a": 0}, UNREAD),
    Case("output_hidden_states", True, UNREAD),
    Case("pretraining_tp", 2, UNREAD),
    Case("problem_type", "regression", UNREAD),
    Case("return_dict", False, UNREAD),
    Case("transformers_version", "4.30.0", UNREAD),
    Case("use_cache", False, UNREAD),
    # Fields of other families.
    Case("logit_scale", 3.0, UNREAD),
    Case("final_logit_softcapping", 1.0, UNREAD),
    Case("embedding_multiplier", 3.0, UNREAD),
)
CASES = (*SIZES, *LAYERS, *SPARSE, *ATTENTION, *ROPE, *OTHERS)
PAIRS = [
    pytest.param(family, case, id=f"{family}-{case}") for case in CASES for family in case.families
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_a_case(family: str) -> None:
    decided = {case.field for case in CASES if family in case.families}
    assert {field.name for field in fields(FAMILIES[family])} - decided == set()


def test_every_key_of_rope_parameters_is_known() -> None:
    from transformers.modeling_rope_utils import RopeParameters

    assert set(RopeParameters.__annotations__) <= rope.KEYS


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    folder = tmp_path_factory.mktemp("plain")
    return {family: save_tiny(folder / family, family, **PLAIN[family]) for family in FAMILIES}


def changed(plain: Path, family: str, case: Case, folder: Path) -> Path:
    """The checkpoint of a case."""
    if case.draws:
        return save_tiny(folder, family, **{**PLAIN[family], **case.beside, case.field: case.value})
    return edited(plain, folder, {**case.beside, case.field: case.value})


def edited(plain: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@torch.no_grad()
def expected_logits(folder: Path) -> Tensor:
    # without return_dict transformers' own classes cannot read each other's results
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", return_dict=True
    )
    return model.eval()(torch.tensor([KNOWN[0].token_ids])).logits[0]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_a_field_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(plain[family], family, case, tmp_path)
    # dynamic frequencies depend on the length: here it is that of the sequence
    options = {"enforce_eager": True, "max_model_len": LENGTH, "num_kvcache_blocks": 17}
    if case.outcome not in (HONOURED, UNREAD):
        with pytest.raises(ValueError, match=case.outcome):
            load(folder, "cpu", **options)
        return
    expected, usual = expected_logits(folder), usual_logits(plain[family], family, case, tmp_path)
    is_same = usual.shape == expected.shape and torch.equal(usual, expected)
    assert is_same == (case.outcome == UNREAD)
    found = engine_logits(load(folder, "cpu", **options), KNOWN)
    assert max_difference(found, [expected]) <= TOLERANCE


_usual: dict[str, Tensor] = {}


def usual_logits(plain: Path, family: str, case: Case, tmp_path: Path) -> Tensor:
    """transformers' logits for the checkpoint with the fields beside the case's alone."""
    key = f"{family} {json.dumps(case.beside, sort_keys=True)}"
    if key not in _usual:
        _usual[key] = expected_logits(edited(plain, tmp_path / "usual", case.beside))
    return _usual[key]


# What transformers does not compute -------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1 / (0.1 * math.log(4.0) + 1.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_attn_factor_multiplies_what_yarn_computes(
    family: str, factor: float, plain: dict[str, Path], tmp_path: Path
) -> None:
    """The second value is that of DeepSeek-R1-0528-Qwen3-8B: the product is 1."""
    product = factor * (0.1 * math.log(4.0) + 1.0)
    ours = rope_case(HONOURED, "yarn", **YARN, attn_factor=factor)
    theirs = rope_case(HONOURED, "yarn", **YARN, attention_factor=product)
    expected = expected_logits(changed(plain[family], family, theirs, tmp_path / "theirs"))
    folder = changed(plain[family], family, ours, tmp_path / "ours")
    runner = load(folder, "cpu", enforce_eager=True, max_model_len=LENGTH)
    assert max_difference(engine_logits(runner, KNOWN), [expected]) <= TOLERANCE
    assert (expected - expected_logits(folder)).abs().max() > 0.01  # transformers does not read it


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longrope_checkpoint_as_it_is_answers_as_transformers_does(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    """Up to the original length, which is the default `max_model_len`."""
    case = next(case for case in ROPE if case.field == "original_max_position_embeddings")
    folder = changed(plain[family], family, case, tmp_path)
    known = sequences(VOCAB_SIZE, (1, 6), (29, 32))
    runner = load(folder, "cpu", enforce_eager=True, max_model_len=None)
    assert runner.layout.max_model_len == 32
    expected = transformers_logits(folder, known, "cpu")
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE
