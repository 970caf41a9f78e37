"""Rotary frequencies and tables equal transformers' for every rope type and spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nanovllm.kernels import ops
from nanovllm.models import llama
from nanovllm.models.rope import SUPPORTED_ROPE_TYPES, rotary_frequencies, rotary_table

MAX_POSITION = 256
SIZES = {"hidden_size": 112, "num_attention_heads": 7, "max_position_embeddings": MAX_POSITION}
ORIGINAL = {"original_max_position_embeddings": 64}


def longrope(head_dim: int, **more: Any) -> dict[str, Any]:
    """Parameters of a longrope with different factors for its two sides."""
    short, long = ([start + 0.1 * i for i in range(head_dim // 2)] for start in (1.0, 3.0))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **ORIGINAL, **more}


def parameters(name: str, head_dim: int) -> dict[str, Any]:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **ORIGINAL,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
    return {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 2.5},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": yarn,
        "yarn_attention_factor": {**yarn, "attention_factor": 1.3},
        "yarn_mscale": {**yarn, "mscale": 0.7, "mscale_all_dim": 0.4},
        "yarn_betas": {**yarn, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        "longrope": longrope(head_dim, factor=4.0),
        "longrope_attention_factor": longrope(head_dim, factor=4.0, attention_factor=1.1),
        "longrope_no_factor": longrope(head_dim),
        "llama3": llama3,
    }[name]


NAMES = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "yarn_attention_factor",
    "yarn_mscale",
    "yarn_betas",
    "longrope",
    "longrope_attention_factor",
    "longrope_no_factor",
    "llama3",
)


def hf_config(
    rope: dict[str, Any], head_dim: int, theta: float = 10000.0, **more: Any
) -> LlamaConfig:
    return LlamaConfig(
        **SIZES, head_dim=head_dim, rope_parameters={"rope_theta": theta, **rope}, **more
    )


def module_at(config: LlamaConfig, num_positions: int) -> tuple[LlamaRotaryEmbedding, torch.Tensor]:
    """transformers' module after a sequence of that length, and cos | sin for each position."""
    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.empty(1, dtype=torch.float32), torch.arange(num_positions)[None])
    half = cos.shape[-1] // 2
    return module, torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


def test_every_supported_type_is_among_the_cases() -> None:
    assert {parameters(name, 32)["rope_type"] for name in NAMES} == set(SUPPORTED_ROPE_TYPES)


@pytest.mark.parametrize("max_model_len", [63, 64, 65, MAX_POSITION])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("name", NAMES)
def test_frequencies_and_table_are_those_of_transformers(
    name: str, head_dim: int, max_model_len: int
) -> None:
    rope = parameters(name, head_dim)
    theta = 500000.0 if head_dim == 128 else 10000.0
    inv_freq, scale = rotary_frequencies(hf_config(rope, head_dim, theta), head_dim, max_model_len)
    module, expected = module_at(hf_config(rope, head_dim, theta), max_model_len)
    assert torch.equal(torch.tensor(inv_freq), module.inv_freq)
    assert scale == module.attention_scaling
    table_MH = rotary_table(inv_freq, scale, max_model_len, torch.device("cpu"))
    assert table_MH.dtype == torch.float32
    torch.testing.assert_close(table_MH, expected, atol=1e-6, rtol=0)


def test_the_table_lies_on_the_device(device: str) -> None:
    table_MH = rotary_table((1.0, 0.5), 2.0, 3, torch.device(device))
    assert table_MH.device.type == device
    assert table_MH[0].tolist() == [2.0, 2.0, 0.0, 0.0]
    angle = torch.tensor([2.0, 1.0])
    expected = torch.cat((2.0 * angle.cos(), 2.0 * angle.sin()))
    torch.testing.assert_close(table_MH[2].cpu(), expected)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_dynamic_beyond_the_trained_length_is_that_of_the_longest_sequence(head_dim: int) -> None:
    rope = parameters("dynamic", head_dim)
    inv_freq, _ = rotary_frequencies(hf_config(rope, head_dim), head_dim, 1000)
    module, _ = module_at(hf_config(rope, head_dim), 1000)
    torch.testing.assert_close(torch.tensor(inv_freq), module.inv_freq, rtol=1e-6, atol=0)
    unscaled, _ = rotary_frequencies(
        hf_config(parameters("default", head_dim), head_dim), head_dim, 1000
    )
    assert inv_freq[-1] < unscaled[-1]


def test_longrope_has_a_side_for_each_length() -> None:
    hf = hf_config(parameters("longrope", 32), 32)
    short, at_limit, beyond = (
        rotary_frequencies(hf, 32, max_model_len)[0] for max_model_len in (1, 64, 65)
    )
    assert short == at_limit
    assert beyond[0] == pytest.approx(at_limit[0] / 3.0)


def length(name: str, max_model_len: int | None, **more: Any) -> int:
    """The longest sequence of a model with one of the rope types above."""
    hf = hf_config({**parameters(name, 32), **more}, 32)
    return llama.model(hf, dtype=torch.float32, max_model_len=max_model_len).config.max_position


def test_a_scaled_context_is_as_long_as_the_scaling_makes_it() -> None:
    assert [length("yarn", asked) for asked in (None, 200, 256, 257)] == [256, 200, 256, 256]
    assert length("yarn", None, factor=9.5) == length("yarn", 10**6, factor=9.5) == int(64 * 9.5)
    assert length("yarn", None, factor=2.0) == MAX_POSITION
    assert length("linear", None) == length("linear", 10**6) == int(2.5 * MAX_POSITION)
    assert length("linear", 10**6, factor=8.0, **ORIGINAL) == 8 * 64
    assert length("llama3", None) == length("llama3", 10**6) == MAX_POSITION
    assert length("default", None) == length("default", 10**6) == MAX_POSITION
    assert [length("dynamic", asked) for asked in (None, 10**6)] == [MAX_POSITION, 10**6]


def test_a_longrope_context_is_long_if_that_is_asked_for() -> None:
    asked = (None, 63, 65, MAX_POSITION, MAX_POSITION + 1)
    assert [length("longrope", one) for one in asked] == [64, 63, 65, MAX_POSITION, MAX_POSITION]


@pytest.mark.parametrize("max_model_len", [None, 64, 65])
def test_the_longest_sequence_decides_the_frequencies(max_model_len: int | None) -> None:
    hf = hf_config(parameters("longrope", 32), 32)
    config = llama.model(hf, dtype=torch.float32, max_model_len=max_model_len).config
    assert config.inv_freq == rotary_frequencies(hf, 32, max_model_len or 64)[0]


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_mean_the_same(name: str, type_key: str) -> None:
    rope = parameters(name, 32)
    scaling = {
        type_key: rope["rope_type"],
        **{key: value for key, value in rope.items() if key != "rope_type"},
    }
    old = LlamaConfig(
        **SIZES, head_dim=32, rope_theta=5000.0, rope_scaling=None if name == "default" else scaling
    )
    assert rotary_frequencies(old, 32, 65) == rotary_frequencies(
        hf_config(rope, 32, 5000.0), 32, 65
    )


def test_original_length_may_stand_outside_the_rope_parameters() -> None:
    rope = {
        key: value
        for key, value in parameters("longrope_no_factor", 32).items()
        if key not in ORIGINAL
    }
    outside, inside = (
        hf_config(rope, 32, **ORIGINAL),
        hf_config(parameters("longrope_no_factor", 32), 32),
    )
    assert rotary_frequencies(outside, 32, 65) == rotary_frequencies(inside, 32, 65)


def test_unknown_types_are_refused_by_name() -> None:
    hf = hf_config({"rope_type": "proportional", "partial_rotary_factor": 0.5}, 32)
    with pytest.raises(
        ValueError, match=r"rope type 'proportional' is not supported: use one of default, linear"
    ):
        rotary_frequencies(hf, 32, 64)


def test_partial_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5 is not supported"):
        rotary_frequencies(
            hf_config({"rope_type": "default", "partial_rotary_factor": 0.5}, 32), 32, 64
        )
    assert (
        rotary_frequencies(
            hf_config({"rope_type": "default", "partial_rotary_factor": 1.0}, 32), 32, 64
        )[1]
        == 1.0
    )


@pytest.mark.parametrize("name", ["default", "yarn", "longrope"])
def test_rotated_heads_are_those_of_transformers(name: str, device: str) -> None:
    head_dim, pos_T = 80, torch.tensor([0, 5, 98, 64, 1])
    inv_freq, scale = rotary_frequencies(
        hf_config(parameters(name, head_dim), head_dim), head_dim, 99
    )
    table_MH = rotary_table(inv_freq, scale, 99, torch.device(device))
    x_TNH = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    module, _ = module_at(hf_config(parameters(name, head_dim), head_dim), 99)
    cos, sin = module(x_TNH, pos_T[None])
    expected, _ = apply_rotary_pos_emb(x_TNH[None], x_TNH[None], cos, sin, unsqueeze_dim=2)
    rotated_TNH = ops.rope(x_TNH.to(device), table_MH, pos_T.to(device))
    torch.testing.assert_close(rotated_TNH.cpu(), expected[0], atol=2e-6, rtol=0)
