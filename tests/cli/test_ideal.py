"""The limit that the benchmark compares with: what a step must read and multiply, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nanovllm.cli.bench.ideal import ideal_seconds
from nanovllm.models import registry
from nanovllm.models.model import Model
from nanovllm.tools.device_limits import DeviceLimits
from nanovllm.tools.shapes import CONFIGS

SPEC: Any = SimpleNamespace(cache_dtype=torch.bfloat16)
READING = DeviceLimits(bandwidth=1.0, flops=float("inf"))
MULTIPLYING = DeviceLimits(bandwidth=float("inf"), flops=1.0)


def shape(folder: Path, name: str, **changes: object) -> Model:
    """The model of a shape that the benchmark knows."""
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    hf = AutoConfig.from_pretrained(folder)
    return registry.architecture(hf.architectures)(hf, dtype=torch.bfloat16)


def seconds(model: Model, num_requests: int, limits: DeviceLimits, num_steps: int = 1) -> float:
    """The limit of prompts of one token whose answers take `num_steps` decode steps."""
    prompts, output_lens = [[0]] * num_requests, [1 + num_steps] * num_requests
    return ideal_seconds(model, SPEC, prompts, output_lens, num_requests, limits)


@pytest.mark.parametrize(("name", "total"), [("DeepSeek-V2-Lite", 15.7e9), ("GLM-4.7-Flash", 30e9)])
def test_a_step_of_latents_reads_one_for_each_token(
    name: str, total: float, tmp_path: Path
) -> None:
    """The model has as many weights as its release names."""
    model = shape(tmp_path, name)
    moe, num_layers = model.config.moe, model.config.num_layers
    assert moe is not None
    assert model.param_bytes / 2 == pytest.approx(total, rel=0.01)
    for num_rows in (1, 19):
        distinct = moe.distinct_experts(num_rows) / moe.num_experts
        read = model.weight_bytes - (1 - distinct) * model.expert_bytes
        read += 2 * num_rows * num_layers * (512 + 64) * 2
        assert seconds(model, num_rows, READING) == pytest.approx(read, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "others", "one_expert", "num_layers", "kv_bytes"),
    [
        # attention, norms, router; gate, up and down
        ("Qwen3-30B-A3B", 2048 * (40 + 32) * 128 + 2 * 2048 + 2 * 128 + 128 * 2048,
         3 * 2048 * 768, 48, 2 * 2 * 48 * 4 * 128),
        ("Mixtral-8x7B", 4096 * (48 + 32) * 128 + 2 * 4096 + 8 * 4096,
         3 * 4096 * 14336, 32, 2 * 2 * 32 * 8 * 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_rows", [1, 19])
def test_a_step_reads_and_multiplies_by_the_experts_that_rows_choose(
    name: str,
    others: int,
    one_expert: int,
    num_layers: int,
    kv_bytes: int,
    num_rows: int,
    tmp_path: Path,
) -> None:
    model = shape(tmp_path, name)
    moe = model.config.moe
    assert moe is not None
    num_experts, top_k = moe.num_experts, moe.top_k
    head = model.config.vocab_size * model.config.hidden_size + model.config.hidden_size
    distinct = num_experts * (1 - ((num_experts - top_k) / num_experts) ** num_rows)
    read = 2 * (head + num_layers * (others + distinct * one_expert)) + 2 * num_rows * kv_bytes
    assert seconds(model, num_rows, READING) == pytest.approx(read, rel=1e-6)
    weights = num_layers * (others + top_k * one_expert)
    flops = 2 * num_rows * (2 * weights + head)  # in the prompt's layers and in the step
    assert seconds(model, num_rows, MULTIPLYING) == pytest.approx(flops, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "num_layers", "num_experts"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)]
)
@pytest.mark.parametrize("num_rows", [1, 19])
def test_experts_in_mxfp4_are_read_as_they_are_stored(
    name: str, num_layers: int, num_experts: int, num_rows: int, tmp_path: Path
) -> None:
    """A byte has two numbers, and 32 numbers a scale of two bytes. Biases are those of experts."""
    model, size, heads, kv = shape(tmp_path, name), 2880, 64 * 64, 8 * 64
    qkv, out = (size + 1) * (heads + 2 * kv), (heads + 1) * size
    others = 2 * (qkv + out + 64 + 2 * size + (size + 1) * num_experts)
    one_expert = 3 * size * size * 18 // 32 + 2 * 3 * size
    tables = num_layers * 2 * 16 * 2  # of levels, in fp16
    assert model.expert_bytes == num_layers * num_experts * one_expert + tables
    distinct = num_experts * (1 - (1 - 4 / num_experts) ** num_rows)
    cached = 2 * num_rows * num_layers * 2 * 2 * kv  # two tokens of a row, within the window
    head = 2 * (201088 + 1) * size
    read = head + num_layers * (others + distinct * one_expert) + cached
    assert seconds(model, num_rows, READING) == pytest.approx(read, rel=1e-6)


def test_recurrent_states_are_read_and_written_once_a_step(tmp_path: Path) -> None:
    model, rows = shape(tmp_path, "Qwen3.5-35B-A3B"), 19
    hidden, channels, values = 2048, 2 * 16 * 128 + 32 * 128, 32 * 128
    delta = hidden * (channels + 2 * values + 2 * 32) + 4 * channels + 2 * 32 + 128
    attention = hidden * (2 * 16 + 2 * 2 + 16) * 256 + 2 * 256
    second = 256 * hidden + hidden + 3 * hidden * 512 + 2 * hidden
    head = 248320 * hidden + hidden
    others = 30 * delta + 10 * attention + 40 * second + head
    distinct = 256 * (1 - (248 / 256) ** rows)
    state = 30 * (32 * 128 * 128 * 4 + 4 * channels * 2)
    read = 2 * (others + 40 * distinct * 3 * hidden * 512) + 2 * rows * 2 * 2 * 10 * 2 * 256
    assert seconds(model, rows, READING) == pytest.approx(read + 2 * rows * state, rel=1e-6)
    smaller = model.with_state_dtype(torch.bfloat16)
    saved = 2 * rows * 30 * 32 * 128 * 128 * 2
    assert seconds(smaller, rows, READING) == pytest.approx(read + 2 * rows * state - saved)


def test_a_model_whose_tokens_choose_all_experts_reads_all_weights(tmp_path: Path) -> None:
    model = shape(tmp_path, "Mixtral-8x7B", num_experts_per_tok=8, num_hidden_layers=2)
    kv_bytes = model.page_groups.token_bytes(torch.bfloat16)
    for num_rows in (1, 19):
        read = model.weight_bytes + 2 * num_rows * kv_bytes
        assert seconds(model, num_rows, READING) == read


def test_a_dense_model_reads_each_weight_once_a_step(tmp_path: Path) -> None:
    model = shape(tmp_path, "Qwen3-0.6B")
    assert model.expert_bytes == 0
    num_weights, kv_bytes = model.weight_bytes / 2, 2 * 2 * 28 * 8 * 128
    for num_rows, num_steps in ((1, 1), (1, 19), (19, 3)):
        cached = num_rows * (num_steps + num_steps * (num_steps + 1) / 2)
        read = num_steps * 2 * num_weights + cached * kv_bytes
        assert seconds(model, num_rows, READING, num_steps) == read
        prompts = 2 * (num_weights - 1024 * 151936) * num_rows
        flops = prompts + num_steps * num_rows * 2 * num_weights
        assert seconds(model, num_rows, MULTIPLYING, num_steps) == flops


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (8, 2), (128, 8), (19, 19)])
def test_the_expected_experts_are_those_of_random_routing(
    num_experts: int, top_k: int, tmp_path: Path
) -> None:
    changes = {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    moe = shape(tmp_path, "Mixtral-8x7B", **changes).config.moe
    assert moe is not None
    for num_tokens in (1, 7, 99):
        chosen = torch.rand(400, num_tokens, num_experts).topk(top_k, 2).indices.flatten(1)
        drawn = sum(len(one.unique()) for one in chosen) / len(chosen)
        assert moe.distinct_experts(num_tokens) == pytest.approx(drawn, rel=0.02)
