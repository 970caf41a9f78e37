"""Every architecture has a model file of the same form, and unsupported features are refused."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.models import dense, llama, mistral, qwen2, qwen3, registry
from nanovllm.models.config import ModelConfig

BY_TYPE = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
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


def described(model_type: str, **changes: Any) -> ModelConfig:
    return BY_TYPE[model_type].config(
        AutoConfig.for_model(model_type, **{**SIZES, **changes}), dtype=torch.bfloat16
    )


@pytest.mark.parametrize(("name", "model"), registry.ARCHITECTURES.items())
def test_names_are_those_of_transformers(name: str, model: ModuleType) -> None:
    model_type = next(kind for kind, module in BY_TYPE.items() if module is model)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    assert type(reference).__name__ == name
    assert described(model_type).architecture == name
    assert registry.architecture([name]) is model


def test_the_first_known_name_counts() -> None:
    assert registry.architecture(["SomethingElse", "Qwen3ForCausalLM", "LlamaForCausalLM"]) is qwen3


@pytest.mark.parametrize("names", [None, [], ["BertModel"], ["qwen3forcausallm"]])
def test_unknown_architectures_are_refused_with_the_known_ones(names: list[str] | None) -> None:
    with pytest.raises(
        ValueError, match="is not supported: use one of LlamaForCausalLM, MistralForCausalLM, Qwen2"
    ) as caught:
        registry.architecture(names)
    assert str(names) in str(caught.value)


@pytest.mark.parametrize("model", registry.ARCHITECTURES.values())
def test_model_files_have_one_form(model: ModuleType) -> None:
    for name in ("embed", "layer", "head"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(dense, name))
    assert list(inspect.signature(model.config).parameters) == ["hf", "dtype", "max_model_len"]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", BY_TYPE)
def test_declared_parameters_are_those_of_transformers(
    model_type: str, tied: bool, biased: bool
) -> None:
    model = BY_TYPE[model_type]
    changes = {"tie_word_embeddings": tied, "attention_bias": biased, "mlp_bias": biased}
    if model_type in ("mistral", "qwen2"):
        changes = {"tie_word_embeddings": tied}  # their biases do not depend on the config
    cfg = described(model_type, **changes)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**SIZES, **changes})
        )
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    declared: dict[str, tuple[int, ...]] = {}
    for params in [
        model.outer_params(cfg),
        *(model.layer_params(cfg, i) for i in range(cfg.num_layers)),
    ]:
        for param in params.values():
            assert sum(param.parts) == param.shape[0]
            for source, part in zip(param.sources, param.parts, strict=True):
                declared[source] = (part, *param.shape[1:])
    assert declared == expected
    if tied:
        assert "lm_head.weight" not in expected


def test_sizes_come_from_the_config() -> None:
    cfg = described("llama", rms_norm_eps=1e-5)
    assert (cfg.vocab_size, cfg.hidden_size, cfg.ffn_size, cfg.num_layers) == (99, 56, 96, 3)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.max_position) == (14, 2, 24, 128)
    assert (cfg.norm_eps, cfg.dtype, len(cfg.inv_freq)) == (1e-5, torch.bfloat16, 12)
    assert cfg.qkv_size == (14 + 2 * 2) * 24
    assert cfg.kv_bytes_per_token == 2 * 3 * 2 * 24 * 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", BY_TYPE)
def test_weight_bytes_count_every_matrix_that_a_step_reads(model_type: str, tied: bool) -> None:
    cfg = described(model_type, tie_word_embeddings=tied)
    params = [
        BY_TYPE[model_type].outer_params(cfg),
        *(BY_TYPE[model_type].layer_params(cfg, i) for i in range(3)),
    ]
    shapes = {
        name: param.shape
        for group in params
        for name, param in group.items()
        if len(param.shape) == 2
    }
    num_layers_of = {name: 1 if name in ("embed_VD", "head_VD") else 3 for name in shapes}
    total = sum(shape[0] * shape[1] * num_layers_of[name] for name, shape in shapes.items())
    if not tied:
        total -= 99 * 56  # the embedding table is only looked up
    assert cfg.weight_bytes == 2 * total


def test_missing_head_sizes_follow_from_the_hidden_size() -> None:
    assert described("llama", head_dim=None, hidden_size=112).head_dim == 8
    assert described("llama", num_key_value_heads=None).num_kv_heads == 14


def test_configs_are_frozen_and_comparable() -> None:
    cfg = described("qwen3")
    assert cfg == described("qwen3")
    assert hash(cfg) == hash(described("qwen3"))
    assert cfg != described("qwen3", rms_norm_eps=1e-4)
    with pytest.raises(FrozenInstanceError):
        cfg.vocab_size = 3  # type: ignore[misc]


# Windows ------------------------------------------------------------------------------------------


def test_mistral_windows_every_layer() -> None:
    assert described("mistral", sliding_window=16).layer_windows == (16, 16, 16)
    assert described("mistral", sliding_window=None).layer_windows == (0, 0, 0)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows_the_layers_that_the_config_names(model_type: str) -> None:
    def windows(**changes: Any) -> tuple[int, ...]:
        return described(model_type, **changes).layer_windows

    assert windows(sliding_window=16) == (0, 0, 0)  # not enabled
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=1) == (0, 16, 16)
    assert windows(use_sliding_window=True, sliding_window=16, max_window_layers=3) == (0, 0, 0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(use_sliding_window=True, sliding_window=9, layer_types=kinds) == (9, 0, 9)
    assert windows(use_sliding_window=False, sliding_window=9, layer_types=kinds) == (0, 0, 0)


def test_llama_has_no_windows() -> None:
    assert described("llama").layer_windows == (0, 0, 0)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BY_TYPE)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported by .*ForCausalLM: only 'silu' is",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantized checkpoints are not supported: .*awq",
        ),
        (
            {"head_dim": 264},
            "head_dim 264 is not supported: it must be a multiple of 8, at most 256",
        ),
        ({"head_dim": 20}, "head_dim 20 is not supported"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 14 is no multiple of num_key_value_heads 3",
        ),
    ],
)
def test_what_is_not_supported_is_refused_with_its_value(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        described(model_type, **changes)


def test_unknown_layer_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer types \['chunked_attention'\] are not supported"):
        described("qwen3", layer_types=["full_attention", "chunked_attention", "full_attention"])
