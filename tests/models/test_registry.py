"""Every architecture has a model file of the same form, and unsupported features are refused."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.compile.trace import tensors
from nanovllm.models import (
    cohere,
    cohere2,
    dense,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    falcon_h1,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron_h,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    registry,
    seed_oss,
    smollm3,
    starcoder2,
)
from nanovllm.models import loader as weights
from nanovllm.models.model import Model
from nanovllm.models.schemes import OPTIONS

BY_TYPE = {
    "llama": llama.model,
    "mistral": mistral.model,
    "qwen2": qwen2.model,
    "qwen3": qwen3.model,
    "mixtral": mixtral.model,
    "qwen2_moe": qwen2_moe.model,
    "qwen3_moe": qwen3_moe.model,
    "smollm3": smollm3.model,
    "granite": granite.model,
    "phi3": phi3.model,
    "olmo2": olmo2.model,
    "gemma3_text": gemma3.model,
    "gpt_oss": gpt_oss.model,
    "gemma4_text": gemma4.model,
    "ministral": ministral.model,
    "ministral3": ministral3.model,
    "glm4": glm4.model,
    "olmo3": olmo3.model,
    "seed_oss": seed_oss.model,
    "exaone4": exaone4.model,
    "hunyuan_v1_dense": hunyuan_v1_dense.model,
    "ernie4_5": ernie4_5.model,
    "cohere": cohere.model,
    "cohere2": cohere2.model,
    "starcoder2": starcoder2.model,
    "glm4_moe": glm4_moe.model,
    "ernie4_5_moe": ernie4_5_moe.model,
    "hunyuan_v1_moe": hunyuan_v1_moe.model,
    "granitemoe": granitemoe.model,
    "granitemoeshared": granitemoeshared.model,
    "qwen3_next": qwen3_next.model,
    "qwen3_5_text": qwen3_5.model,
    "qwen3_5_moe_text": qwen3_5_moe.model,
    "falcon_h1": falcon_h1.model,
    "nemotron_h": nemotron_h.model,
}
# Those without a class for text alone in transformers, and those with latents, have tests of their
# own.
TESTED_ELSEWHERE = {
    "DeepseekV2ForCausalLM": "test_latent_models.py",
    "DeepseekV3ForCausalLM": "test_latent_models.py",
    "Glm4MoeLiteForCausalLM": "test_latent_models.py",
    "MiniCPMForCausalLM": "test_minicpm.py",
    "Mistral3ForConditionalGeneration": "test_mistral3.py",
    "Gemma3ForConditionalGeneration": "test_gemma3_images.py",
    "Gemma4ForConditionalGeneration": "test_gemma4.py",
    "Qwen2_5_VLForConditionalGeneration": "test_vision_text.py",
    "Qwen2_5OmniModel": "test_omni.py",
    "Qwen2_5OmniForConditionalGeneration": "test_omni.py",
    "Qwen2_5OmniThinkerForConditionalGeneration": "test_omni.py",
    "Qwen3VLForConditionalGeneration": "test_vision_text.py",
    "Qwen3VLMoeForConditionalGeneration": "test_vision_text.py",
    "Qwen3_5ForConditionalGeneration": "test_hybrid_images.py",
    "Qwen3_5MoeForConditionalGeneration": "test_hybrid_images.py",
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 56,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
}
# the second of the three layers is dense
EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1],
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "partial_rotary_factor": 0.5,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "smollm3": {"pad_token_id": None},
    "phi3": {"pad_token_id": None},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    **{
        name: {"pad_token_id": None}
        for name in (
            "ministral3", "glm4", "olmo3", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "cohere",
        )
    },
    "cohere2": {"pad_token_id": None, "hidden_size": 14 * 8},
    "starcoder2": {"pad_token_id": None, "hidden_act": "gelu_pytorch_tanh"},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 48, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe": {
        "pad_token_id": None, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3,
        "topk_group": 2, "moe_intermediate_size": 40,
    },
    "ernie4_5_moe": {
        "pad_token_id": None, "moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 40,
    },
    "hunyuan_v1_moe": {"pad_token_id": None, "num_experts": 5, "moe_topk": 2},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "granitemoeshared": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 40,
    },
    "qwen3_next": {**EXPERTS, **HYBRID},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {**EXPERTS, **HYBRID, "mlp_only_layers": None},
    "falcon_h1": {
        "mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 16,
        "mamba_rms_norm": True,
    },
    "nemotron_h": {
        "layers_block_type": [*HYBRID["layer_types"][:2], "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 16,
    },
}  # fmt: skip
# The name of the norms' eps, where it is another.
EPS = {
    "cohere": "layer_norm_eps", "cohere2": "layer_norm_eps", "starcoder2": "norm_epsilon",
    "nemotron_h": "layer_norm_epsilon",
}  # fmt: skip
# Names of tensors in checkpoints that transformers renames when it reads them.
RENAMED = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "mlp.moe_statics.": "mlp.gate.moe_statics.",
}
# The fields that give a model biases; those of Mistral, Qwen2, Mixtral and Phi-3 do not depend on
# any.
BIASES = {
    "llama": ("attention_bias", "mlp_bias"),
    "qwen3": ("attention_bias", "mlp_bias"),
    "qwen2_moe": ("qkv_bias",),
    "qwen3_moe": ("attention_bias",),
    "smollm3": ("attention_bias", "mlp_bias"),
    "granite": ("attention_bias", "mlp_bias"),
    "olmo2": ("attention_bias",),
    "gemma3_text": ("attention_bias",),
    "gpt_oss": ("attention_bias",),
    "gemma4_text": ("attention_bias",),
    "glm4": ("attention_bias",),
    "olmo3": ("attention_bias",),
    "seed_oss": ("attention_bias", "attention_out_bias", "mlp_bias"),
    "hunyuan_v1_dense": ("attention_bias",),
    "ernie4_5": ("use_bias",),
    "cohere": ("attention_bias", "use_qk_norm"),
    "cohere2": ("attention_bias",),
    "starcoder2": ("use_bias",),
    "glm4_moe": ("attention_bias",),
    "hunyuan_v1_moe": ("attention_bias",),
    "granitemoe": ("attention_bias",),
    "granitemoeshared": ("attention_bias",),
    "qwen3_next": ("attention_bias",),
    "qwen3_5_text": ("attention_bias",),
    "qwen3_5_moe_text": ("attention_bias",),
    "falcon_h1": ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"),
    "nemotron_h": ("use_bias", "mlp_bias"),
}


def config_of(model_type: str, **changes: Any) -> Any:
    fields = {**SIZES, **OWN_SIZES.get(model_type, {}), **changes}
    return AutoConfig.for_model(model_type, **fields)


def described(model_type: str, **changes: Any) -> Model:
    return BY_TYPE[model_type](config_of(model_type, **changes), dtype=torch.bfloat16)


def test_every_architecture_is_tested() -> None:
    elsewhere = {registry.ARCHITECTURES[name] for name in TESTED_ELSEWHERE}
    assert elsewhere | set(BY_TYPE.values()) == set(registry.ARCHITECTURES.values())
    for name, file in TESTED_ELSEWHERE.items():
        assert name in Path(__file__).with_name(file).read_text()


@pytest.mark.parametrize("name", sorted(set(registry.ARCHITECTURES) - set(TESTED_ELSEWHERE)))
def test_names_are_those_of_transformers(name: str) -> None:
    architecture = registry.ARCHITECTURES[name]
    model_type = next(kind for kind, known in BY_TYPE.items() if known is architecture)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config_of(model_type))
    assert type(reference).__name__ == name
    assert described(model_type).config.architecture == name
    found: Any = registry.architecture([name])
    assert found.args == (architecture,)


def test_the_first_known_name_counts() -> None:
    names = ["SomethingElse", "Qwen3ForCausalLM", "LlamaForCausalLM"]
    found: Any = registry.architecture(names)
    assert found.args == (qwen3.model,)


@pytest.mark.parametrize("names", [None, [], ["ElectraModel"], ["qwen3forcausallm"]])
def test_unknown_architectures_are_refused_with_the_known_ones(names: list[str] | None) -> None:
    with pytest.raises(
        ValueError,
        match=r"is not supported: use one of LlamaForCausalLM, MistralForCausalLM, .*, SmolLM3",
    ) as caught:
        registry.architecture(names)
    assert str(names) in str(caught.value)


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_model_files_have_one_form(model_type: str) -> None:
    model = described(model_type)
    for name in ("embed", "layer", "head"):
        own, dense_s = (
            inspect.signature(getattr(owner, name)).parameters for owner in (model, dense)
        )
        assert list(own) == list(dense_s)
    parameters = inspect.signature(BY_TYPE[model_type]).parameters
    assert list(parameters) == ["hf", "dtype", "max_model_len"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", BY_TYPE)
def test_declared_parameters_are_those_of_transformers(
    model_type: str, tied: bool, biased: bool
) -> None:
    changes = {"tie_word_embeddings": tied, **dict.fromkeys(BIASES.get(model_type, ()), biased)}
    model = described(model_type, **changes)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config_of(model_type, **changes))
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    stored = reference.state_dict()
    expected |= {name: tuple(x.shape) for name, x in reference.named_buffers() if name in stored}
    declared: dict[str, tuple[int, ...]] = {}
    for params in model.declared:
        for param in params.values():
            if param.other_name is not None:  # transformers' own
                num, *matrix = param.shape
                is_transposed = param.is_interleaved
                declared[param.other_name] = (num, *(matrix[::-1] if is_transposed else matrix))
                continue
            assert sum(param.parts) == param.shape[0]
            for source, part in zip(param.sources, param.parts, strict=True):
                declared[source] = (part, *param.shape[1:])
    for name in list(declared):
        for part, theirs in RENAMED.items():
            if part in name:
                declared[name.replace(part, theirs)] = declared.pop(name)
    assert declared == expected
    if model.config.tied_embeddings:
        assert "lm_head.weight" not in expected


def test_sizes_come_from_the_config() -> None:
    model = described("llama", rms_norm_eps=1e-5)
    cfg = model.config
    assert (cfg.vocab_size, cfg.hidden_size, cfg.ffn_size, cfg.num_layers) == (99, 56, 96, 3)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.max_position) == (14, 2, 24, 128)
    assert (cfg.norm_eps, cfg.dtype, len(cfg.inv_freq)) == (1e-5, torch.bfloat16, 12)
    assert cfg.qkv_size == (14 + 2 * 2) * 24
    assert model.page_groups.token_bytes(torch.bfloat16) == 2 * 3 * 2 * 24 * 2
    assert model.page_groups.token_bytes(torch.float8_e4m3fn) == 2 * 3 * 2 * 24


@pytest.mark.parametrize("quantization", [None, *OPTIONS])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", BY_TYPE)
def test_bytes_are_those_of_the_loaded_weights(
    model_type: str, tied: bool, quantization: str | None
) -> None:
    """A decode step reads every weight, and the embedding table only if it is the head."""
    changes = {"mlp_bias": True, "attention_bias": True} if model_type == "llama" else {}
    model = described(model_type, tie_word_embeddings=tied, **changes)
    converts_head = quantization is not None and OPTIONS[quantization].has_head
    if quantization is not None:
        model = model.with_scheme(OPTIONS[quantization])
    params = weights.random(model, weights.Target(torch.device("cpu")), 0, int)
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(params)}
    assert model.param_bytes == sum(unique.values())
    is_head = params.head_VD is params.embed_VD
    assert is_head == (model.config.tied_embeddings and not converts_head)
    looked_up = 0 if is_head else 99 * model.config.hidden_size * 2
    assert model.weight_bytes == sum(unique.values()) - looked_up


def test_missing_head_sizes_follow_from_the_hidden_size() -> None:
    assert described("llama", head_dim=None, hidden_size=112).config.head_dim == 8
    assert described("llama", num_key_value_heads=None).config.num_kv_heads == 14


def test_configs_are_frozen_and_comparable() -> None:
    cases = {"qwen3": {"rms_norm_eps": 1e-4}, "qwen3_moe": {"norm_topk_prob": True}}
    for model_type, changes in cases.items():
        for part in (lambda model: model, lambda model: model.config):
            found = part(described(model_type))
            assert found == part(described(model_type))
            assert hash(found) == hash(part(described(model_type)))
            assert found != part(described(model_type, **changes))
            with pytest.raises(FrozenInstanceError):
                found.vocab_size = 3


# Windows ------------------------------------------------------------------------------------------


def layer_windows(model_type: str, **changes: Any) -> tuple[int, ...]:
    return tuple(kind.window for kind in described(model_type, **changes).layer_kinds)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "qwen3_moe"])
def test_mistral_mixtral_and_qwen3_moe_window_every_layer(model_type: str) -> None:
    used = {"use_sliding_window": True} if model_type == "qwen3_moe" else {}
    assert layer_windows(model_type, sliding_window=16, **used) == (16, 16, 16)
    assert layer_windows(model_type, sliding_window=None, **used) == (0, 0, 0)
    if used:
        assert layer_windows(model_type, sliding_window=16) == (0, 0, 0)  # not enabled


def test_qwen2_moe_windows_every_other_layer_up_to_a_limit() -> None:
    def windows(**changes: Any) -> tuple[int, ...]:
        return layer_windows("qwen2_moe", sliding_window=16, **changes)

    assert windows() == (0, 0, 0)  # not enabled
    assert windows(use_sliding_window=True, max_window_layers=2) == (16, 0, 0)
    assert windows(use_sliding_window=True, max_window_layers=3) == (16, 0, 16)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert windows(use_sliding_window=True, layer_types=kinds) == (0, 16, 16)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows_the_layers_that_the_config_names(model_type: str) -> None:
    def windows(**changes: Any) -> tuple[int, ...]:
        return layer_windows(model_type, **changes)

    assert windows(sliding_window=16) == (0, 0, 0)  # not enabled
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=1) == (0, 16, 16)
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=3) == (0, 0, 0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(use_sliding_window=True, sliding_window=9, layer_types=kinds) == (9, 0, 9)
    assert windows(use_sliding_window=False, sliding_window=9, layer_types=kinds) == (0, 0, 0)


def test_llama_has_no_windows() -> None:
    assert layer_windows("llama") == (0, 0, 0)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BY_TYPE)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported by .*ForCausalLM: only '(silu|gelu_.*)' is",
        ),
        ({"head_dim": 264}, "head_dim 264 is not supported: it must be a multiple of 8, up to 256"),
        ({"head_dim": 20}, "head_dim 20 is not supported"),
        ({"vocab_size": -5}, "vocab_size is -5: it must be at least 1"),
        ({"rms_norm_eps": float("nan")}, "(eps|epsilon) is nan: it must be a (finite )?number"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 14 is not a multiple of num_key_value_heads 3",
        ),
    ],
)
def test_what_is_not_supported_is_refused_with_its_value(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    if model_type in EPS and "rms_norm_eps" in changes:
        changes = {EPS[model_type]: changes["rms_norm_eps"]}
    with pytest.raises(ValueError, match=message):
        described(model_type, **changes)


@pytest.mark.parametrize(
    ("written", "named"),
    [({"quant_method": "mystery"}, "'mystery'"), ({"bits": 4}, "None"), ("oddity", "'oddity'")],
    ids=str,
)
def test_a_quantized_checkpoint_that_no_scheme_knows_is_refused_by_its_method(
    written: Any, named: str
) -> None:
    hf = config_of("llama", quantization_config=written)
    with pytest.raises(ValueError, match=f"quant_method {named}, which is not supported"):
        registry.architecture(["LlamaForCausalLM"])(hf, dtype=torch.bfloat16)


def test_unknown_layer_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer types \['chunked_attention'\] are not supported"):
        described("qwen3", layer_types=["full_attention", "chunked_attention", "full_attention"])
