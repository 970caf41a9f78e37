"""gpt-oss: layouts of its experts, strong sinks, what is refused. `test_families` has the rest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.shards import Shard
from nanovllm.startup.resolve import resolve_without_weights
from tests.engines import greedy, tokens
from tests.models import test_shards
from tests.models.gpt_oss_cases import VOCAB_SIZE, save, save_mxfp4
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.routes import edit
from tests.models.test_quantized_checkpoints import check_ranks
from tests.models.test_quantized_checkpoints import plain_device as plain_device

LENGTHS = ((1, 6), (19, 24), (70, 73))
TOLERANCE = 1e-4
EAGER: dict[str, Any] = {"enforce_eager": True}
GRAPH: dict[str, Any] = {"max_num_seqs": 3, "graph_batch_sizes": [3]}


@pytest.mark.parametrize("options", [EAGER, {**EAGER, "attention_backend": "sdpa"}], ids=str)
def test_strong_sinks_and_clamped_activations(
    options: dict[str, Any], device: str, tmp_path: Path
) -> None:
    folder, known = save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    found = engine_logits(load(folder, device, **options), known)
    expected = transformers_logits(folder, known, device)
    assert max_difference(found, expected) <= TOLERANCE

    def weaken(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if name.endswith("sinks"):
                weight.fill_(-1e4)

    without = transformers_logits(edit(folder, weaken), known, device)
    assert max_difference(without, expected) > 0.1


@pytest.mark.parametrize("options", [EAGER, GRAPH], ids=["eager", "graph"])
def test_experts_in_mxfp4_have_the_logits_of_their_numbers(
    options: dict[str, Any], tmp_path: Path
) -> None:
    packed, known = save_mxfp4(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    runner = load(packed, "cpu", **options)
    experts = runner.params.layers[0].experts
    assert isinstance(experts.gate_up_EGD, PackedWeight)
    assert isinstance(experts.down_EDF, PackedWeight)
    expected = transformers_logits(packed / "real", known, "cpu")
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.usefixtures("plain_device")
def test_devices_without_products_dequantize_mxfp4(tmp_path: Path) -> None:
    packed, known = save_mxfp4(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    runner = load(packed, "cpu", **EAGER)
    assert isinstance(runner.params.layers[0].experts.gate_up_EGD, Tensor)
    expected = transformers_logits(packed / "real", known, "cpu")
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.parametrize("is_whole", [False, True], ids=["parts", "whole"])
def test_ranks_with_experts_in_mxfp4(
    is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks cut a block of 32 columns of down."""
    packed = save_mxfp4(tmp_path, num_hidden_layers=1)
    options = test_shards.options
    monkeypatch.setattr(
        "tests.models.test_quantized_checkpoints.options",
        lambda size: options(size, expert_parallel=is_whole),
    )
    check_ranks(packed, 2, VOCAB_SIZE)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_whole_experts(size: int, tmp_path: Path) -> None:
    test_shards.check(save(tmp_path / "m"), size, VOCAB_SIZE, expert_parallel=True)


@pytest.mark.parametrize("is_whole", [False, True], ids=["parts", "whole"])
def test_random_weights_of_ranks_are_those_of_one_model(is_whole: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, num_hidden_layers=1)

    def drawn(rank: int, size: int) -> Any:
        options = test_shards.options(size, expert_parallel=is_whole and size > 1)
        model = resolve_without_weights(EngineConfig.from_options(str(folder), options)).model
        target = loader.Target(torch.device("cpu"), shard=Shard(rank, size))
        return loader.random(model, target, 7, int).layers[0]

    whole, *ranks = drawn(0, 1), drawn(0, 2), drawn(1, 2)
    joined = torch.cat([one.experts.down_EDF for one in ranks], 0 if is_whole else 2)
    assert torch.equal(joined, whole.experts.down_EDF)
    assert torch.equal(torch.cat([one.sinks_N for one in ranks]), whole.sinks_N)


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_experts_are_converted(quantization: str, tmp_path: Path) -> None:
    """Every token goes to all experts, so that rounding changes no routes."""
    folder = save(tmp_path, num_experts_per_tok=4, num_hidden_layers=1, initializer_range=0.12)
    known = sequences(VOCAB_SIZE, LENGTHS[1])
    runner = load(folder, "cpu", quantization=quantization, **EAGER)
    assert not isinstance(runner.params.layers[0].experts.gate_up_EGD, Tensor)
    found = torch.cat(engine_logits(runner, known))
    expected = torch.cat(transformers_logits(folder, known, "cpu"))
    assert 1e-3 < (found - expected).std() / expected.std() < 0.2


@pytest.mark.parametrize("level", [1, 2])
def test_answers_are_the_same_after_sleep(level: int, tmp_path: Path) -> None:
    sizes = {"max_model_len": 64, "max_num_seqs": 2, "num_kvcache_blocks": 33}
    llm = LLM(
        str(save_mxfp4(tmp_path)), device="cpu", dtype="float32", skip_tokenizer_init=True,
        kvcache_block_size=16, enable_sleep_mode=True, **EAGER, **sizes,
    )  # fmt: skip
    prompts = [one.token_ids for one in sequences(VOCAB_SIZE, (5, 5), (40, 40))]
    expected = tokens(llm, prompts, greedy(8))
    llm.sleep(level)
    llm.wake_up()
    assert tokens(llm, prompts, greedy(8)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_offload": 2}, "experts of GptOssForCausalLM have biases, and those are not off"),
        ({"quantization": "int8"}, "'int8' is not supported for a model with experts"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_it_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path), "cpu", **EAGER, **options)


def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    def not_transposed(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if name.endswith("gate_up_proj"):
                weights[name] = weight.mT.contiguous()

    folder = save(tmp_path, num_hidden_layers=1)
    other = edit(shutil.copytree(folder, tmp_path / "other"), not_transposed)
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \[4, 80, 48\]"):
        load(other, "cpu", **EAGER)
