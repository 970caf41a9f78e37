"""int8 weights: their error, their size, and the accuracy of a model with them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.compile.trace import tensors
from nanovllm.models import loader as weights
from nanovllm.models.formats import int8, rows
from nanovllm.models.formats.format import Extent
from nanovllm.models.formats.int8 import Int8, Int8Weight
from nanovllm.models.schemes import OPTIONS as SCHEMES
from nanovllm.platforms import cpu
from tests.conftest import save_tiny
from tests.models import harness
from tests.models.test_loader import described

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from tiny.tasks import held_out, is_correct  # noqa: E402

NUM_TASKS, MARGIN = (
    104,
    0.02,
)  # int8 may answer this share of the questions less correctly than fp32
OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_model_len": 64, "max_num_seqs": 4, "num_kvcache_blocks": 20,
    "max_num_batched_tokens": 64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (19, 99), (99, 19)], ids=str)
def test_no_value_is_off_by_more_than_half_a_step_of_its_row(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "ROWS_AT_ONCE", 7)
    weight_OD = (torch.randn(shape) * torch.logspace(-9, 9, shape[0]).unsqueeze(1)).to(dtype)
    values_OD, scale_O = store("w", weight_OD)
    assert torch.equal(
        rows(Int8Weight(values_OD, scale_O), 1), (values_OD.float() * scale_O.unsqueeze(1))[1:]
    )
    assert values_OD.dtype is torch.int8 and scale_O.dtype is torch.float32
    assert torch.equal(values_OD.abs().amax(1), torch.full((shape[0],), 127, dtype=torch.int8))
    off_OD = (values_OD.float() * scale_O.unsqueeze(1) - weight_OD.float()).abs()
    assert (off_OD <= 0.5001 * scale_O.unsqueeze(1)).all()


def test_rows_of_zeros_stay_zero_and_what_is_not_finite_is_refused() -> None:
    weight_OD = torch.randn(5, 9)
    weight_OD[2] = 0
    values_OD, scale_O = store("w", weight_OD)
    assert not values_OD[2].any() and scale_O[2] == 0 and values_OD[3].any()
    for value in (float("nan"), float("inf"), float("-inf")):
        weight_OD[4, 7] = value
        with pytest.raises(ValueError, match=r"model\.w holds NaN or infinity"):
            store("model.w", weight_OD)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_linear_weights_take_a_quarter_and_all_else_stays(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny(tmp_path, tie_word_embeddings=tied)
    model = described(folder)
    converted, target = model.with_scheme(SCHEMES["int8"]), weights.Target(torch.device("cpu"))
    plain, stored = (weights.load(one, folder, target, int) for one in (model, converted))
    as_random = weights.random(converted, target, 0, int)
    declared = model.declared[1]
    linear = [name for name, param in declared.items() if param.kind == "linear"]
    assert sorted(linear) == ["down_DF", "gate_up_GD", "out_DQ", "qkv_ED"]
    assert torch.equal(stored.embed_VD, plain.embed_VD) and torch.equal(
        stored.final_norm_D, plain.final_norm_D
    )
    pairs = [(plain.head_VD, stored.head_VD)]
    for plain_layer, layer, random_layer in zip(
        plain.layers, stored.layers, as_random.layers, strict=True
    ):
        for name, one, other in zip(layer._fields, plain_layer, layer, strict=True):
            assert type(getattr(random_layer, name)) is type(other)
            if name in linear:
                pairs.append((one, other))
            else:
                assert (one is None and other is None) or torch.equal(one, other)
    assert len(pairs) == 1 + 4 * model.config.num_layers
    for one, other in pairs:
        assert isinstance(other, Int8Weight)
        expected = store("w", one)
        assert torch.equal(other.values_OD, expected.values_OD) and torch.equal(
            other.scale_O, expected.scale_O
        )
    plain_bytes, int8_bytes = (num_bytes([pair[i] for pair in pairs]) for i in (0, 1))
    assert (
        0.25 < int8_bytes / plain_bytes < 0.27
    )  # the factors are 1 / (4 · depth) of it, and depth is 64 here


def store(name: str, weight_OD: Tensor) -> Int8Weight:
    return Int8().quantized(name, weight_OD, Extent(tuple(weight_OD.shape), weight_OD.dtype))


def num_bytes(weights: list[Any]) -> int:
    return sum(tensor.nbytes for weight in weights for tensor in tensors(weight))


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_graphs_and_eager_steps_agree_and_are_near_the_plain_weights(
    tmp_path: Path, architecture: str
) -> None:
    differences = {"attention_bias": True, "mlp_bias": True} if architecture == "llama" else {}
    folder = save_tiny(tmp_path, architecture, tie_word_embeddings=False, **differences)
    known = harness.sequences(512, (1, 9), (19, 30), (70, 75))

    def logits(**options: Any) -> Tensor:
        return torch.cat(harness.engine_logits(harness.load(folder, "cpu", **options), known))

    plain = logits(enforce_eager=True)
    eager = logits(enforce_eager=True, quantization="int8")
    graph = logits(graph_batch_sizes=[1, 4], quantization="int8")
    assert plain.shape == (9 + 30 + 75, 512)
    torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-3)
    # the error of a weight is up to 1/254 of its row's largest; that of logits is a few per cent of
    # their spread, and not zero
    assert 1e-4 < (eager - plain).std() / plain.std() < 0.05


@pytest.mark.usefixtures("one_thread")
def test_the_embedded_model_answers_as_well_with_int8() -> None:
    tasks = held_out(NUM_TASKS, seed=1)
    right: dict[str | None, int] = {}
    for quantization in (None, "int8"):
        llm = LLM("tiny-qwen3", device="cpu", enforce_eager=True, quantization=quantization)
        params = SamplingParams(temperature=0, max_tokens=64)
        outputs = llm.chat([task.messages for task in tasks], params, use_tqdm=False)
        right[quantization] = sum(
            is_correct(task, output["text"]) for task, output in zip(tasks, outputs, strict=True)
        )
    assert right[None] >= 0.95 * NUM_TASKS
    assert right["int8"] >= right[None] - MARGIN * NUM_TASKS


def test_other_devices_and_other_words_are_refused(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="quantization is 'int2': it must be one of int8, fp8"):
        EngineConfig("tiny-qwen3", quantization="int2")
    for name in SCHEMES:
        assert EngineConfig("tiny-qwen3", quantization=name).quantization == name
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, quantizations=()))
    with pytest.raises(
        ValueError, match=r"'int8' is not supported on a cpu device .*: none.* use device='cpu'"
    ):
        LLM(str(tiny_qwen3), **OPTIONS, quantization="int8")
