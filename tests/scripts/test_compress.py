"""The scripts that compress experts: results, files, interrupted runs, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import collect_moe_calib
import compare_compressed
import decompose_experts
from compress import output
from compress.calibration import save as save_calibration
from compress.prompts import conversations
from compress.source import Source, open_source
from tiny.corpus import conversation, render
from tiny.tasks import held_out
from transformers import AutoTokenizer

from nanovllm import SamplingParams
from nanovllm.models.checkpoint import CheckpointError
from tests.models.harness import Known, engine_logits, load
from tests.scripts.compress_cases import (
    HIDDEN,
    NUM_EXPERTS,
    NUM_LAYERS,
    SIZE,
    calibration,
    distill,
    model,
    run,
)

__all__ = ["calibration", "model", "run"]  # fixtures


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of tiny-mixtral, and calibration data of it."""
    folder = tmp_path_factory.mktemp("trained")
    source = open_source("tiny-mixtral")
    model, path = compare_compressed.linked(source, folder / "model"), folder / "c.safetensors"
    prompts = conversations("tiny-mixtral", None, 150)
    params = SamplingParams(temperature=0.7, max_tokens=64)
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 512}
    groups = collect_moe_calib.collect(str(model), prompts, params, 989, **options).groups
    save_calibration(path, source, groups)
    return model, path


@pytest.mark.parametrize("rank", [36, 72])
def test_distilled_experts_change_answers_less_than_principal_components(
    trained: tuple[Path, Path], run: Callable[..., None], rank: int
) -> None:
    """The logits of held-out questions and answers, with a trained model."""
    model, calibration = trained
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [render(conversation(task, "tiny-mixtral")) for task in held_out(13, 0)]
    known = [Known(ids, len(ids)) for ids in tokenizer(texts)["input_ids"]]

    def logits() -> Tensor:
        runner = load(model, "cpu", enforce_eager=True, max_model_len=512, max_num_seqs=13,
                      num_kvcache_blocks=200)  # fmt: skip
        return torch.cat(engine_logits(runner, known)).log_softmax(-1)

    shutil.rmtree(model / "svd_experts", ignore_errors=True)
    whole = logits()
    run(decompose_experts.main, "--model-path", model, "--rank", rank, "--device", "cpu")
    components = (logits() - whole).square().mean()
    distill(run, model, calibration, "--rank", rank)
    assert 0 < (logits() - whole).square().mean() < 0.5 * components


def test_all_options_of_distilling_do_something(
    model: Path, calibration: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """Chunks change sums by rounding alone; the others change the result."""

    def weights(*more: object) -> Tensor:
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        distill(run, model, calibration, "--rank", 3, "--output-dir", folder, *more)
        return load_file(folder / "V_experts" / "layer_1_expert_2.safetensors")["w2_V"].abs()

    usual = weights()
    assert not (model / "svd_experts").exists()
    assert torch.allclose(weights("--chunk", 7, "--chunk-w2", 19), usual, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(weights("--ridge", 0.5), usual, rtol=1e-2)
    assert weights("--dtype", "bfloat16").dtype is torch.bfloat16
    assert not torch.equal(weights("--pca-oversample", 2), usual)


def test_the_layout_is_that_of_the_formulas(model: Path, run: Callable[..., None]) -> None:
    run(
        decompose_experts.main, "--model-path", model, "--rank", 19, "--dtype", "float32",
        "--device", "cpu",
    )  # fmt: skip
    folder = model / "svd_experts"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    experts = {
        f"V_experts/layer_{layer_idx}_expert_{expert}.safetensors"
        for layer_idx in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    }
    assert files == {"U_matrices.safetensors", "metadata.json"} | experts
    umask = os.umask(0)
    os.umask(umask)
    assert all((folder / name).stat().st_mode & 0o777 == 0o666 & ~umask for name in files)
    found = load_file(folder / "U_matrices.safetensors")
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        f"layer_{layer_idx}_{kind}_U": (SIZE if kind == "w2" else HIDDEN, 19)
        for layer_idx in range(NUM_LAYERS)
        for kind in ("w1", "w2", "w3")
    }
    prefix = "model.layers.1.block_sparse_moe.experts.3"
    weights = load_file(model / "model.safetensors")
    for name, v_LO in load_file(folder / "V_experts/layer_1_expert_3.safetensors").items():
        kind = name.removesuffix("_V")
        u_IL = found[f"layer_1_{kind}_U"]
        assert torch.allclose(u_IL.t() @ u_IL, torch.eye(19), atol=1e-5)
        assert torch.allclose(v_LO, u_IL.t() @ weights[f"{prefix}.{kind}.weight"].t(), atol=1e-5)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["rank"] == 19 and metadata["dtype"] == "float32"


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, num_layers: int) -> list[int]:
    """The next run ends when it has written so many layers; returns the layers that were read."""
    write, read, seen = output.Output.write_layer, Source.read, []

    def write_layer(self: output.Output, *args: Any) -> None:
        if len(seen) > num_layers:
            raise Interrupted
        write(self, *args)

    def read_layer(self: Source, layer_idx: int, device: torch.device) -> Any:
        seen.append(layer_idx)
        return read(self, layer_idx, device)

    monkeypatch.setattr(output.Output, "write_layer", write_layer)
    monkeypatch.setattr(Source, "read", read_layer)
    return seen


@pytest.mark.parametrize("method", ["pca", "distilled"])
def test_an_interrupted_run_continues_with_the_next_layer(
    method: str,
    model: Path,
    calibration: Path,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def compress(*more: object) -> None:
        if method == "distilled":
            return distill(run, model, calibration, "--rank", 9, *more)
        return run(
            decompose_experts.main, "--model-path", model, "--rank", 9, "--device", "cpu", *more
        )  # fmt: skip

    compress("--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 1)
        compress()
    with pytest.raises(CheckpointError, match=r"metadata.json is missing: .* not complete"):
        load(model, "cpu", enforce_eager=True)
    with monkeypatch.context() as patch:
        seen = interrupt(patch, 99)
        compress()
        assert seen == [1, 2]
        compress()
        assert seen == [1, 2], "nothing is left to do"
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        ours = load_file(model / "svd_experts" / path.relative_to(tmp_path / "whole"))
        for name, tensor in load_file(path).items():
            assert torch.equal(ours[name], tensor), name
    load(model, "cpu", enforce_eager=True)


@pytest.mark.parametrize("finished", [True, False])
def test_files_of_other_settings_are_replaced(
    finished: bool, model: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model-path", model, "--device", "cpu", "--rank")
    with monkeypatch.context() as patch:
        interrupt(patch, 99 if finished else 2)
        try:
            run(decompose_experts.main, *arguments, 9)
        except Interrupted:
            assert not finished
    run(decompose_experts.main, *arguments, 7)
    stored = [load_file(path) for path in (model / "svd_experts").rglob("*.safetensors")]
    assert {tensor.shape[0 if "V" in name else 1] for one in stored for name, tensor in
            one.items()} == {7}  # fmt: skip


def test_a_folder_whose_files_are_missing_is_made_again(
    model: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def compress() -> None:
        run(decompose_experts.main, "--model-path", model, "--rank", 9, "--device", "cpu")

    compress()
    for name in ("V_experts/layer_1_expert_3.safetensors", "U_matrices.safetensors"):
        (model / "svd_experts" / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing: .* make it again"):
            load(model, "cpu", enforce_eager=True)
        compress()
        assert "complete already" not in capsys.readouterr().out
        load(model, "cpu", enforce_eager=True)
    compress()
    assert "complete already" in capsys.readouterr().out


def test_files_of_others_are_not_deleted(model: Path, run: Callable[..., None]) -> None:
    (model / "metadata.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"config\.json, which is not a file of compressed experts"
    ):
        run(
            decompose_experts.main, "--model-path", model, "--rank", 9, "--device", "cpu",
            "--output-dir", model,
        )  # fmt: skip
    assert (model / "metadata.json").is_file() and not (model / "V_experts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 72, 9999], "rank is 9999: it must be from 1 to"),
        (["--shares", "nan"], "a share is nan: it must be above 0, and at most 1"),
        (["--shares", 0.5, "inf"], "a share is inf: it must be above 0"),
    ],
)
def test_a_comparison_refuses_ranks_before_it_measures(
    arguments: list[object], message: str, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_compressed, "accuracy", lambda *_: pytest.fail("it measures"))
    with pytest.raises(ValueError, match=message):
        run(compare_compressed.main, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 41], "rank is 41: it must be from 1 to 40"),
        (["--rank", 0], "rank is 0: it must be from 1 to 40"),
        (["--rank", 3, "--device", "nonsense"], "device 'nonsense' is not available"),
        (["--rank", 3, "--device", "meta"], "device 'meta' is not available"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    arguments: list[object], message: str, model: Path, run: Callable[..., None]
) -> None:
    with pytest.raises(ValueError, match=message):
        run(decompose_experts.main, "--model-path", model, "--device", "cpu", *arguments)
    assert not (model / "svd_experts").exists()


def test_a_model_without_experts_is_refused(run: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="tiny-qwen3: Qwen3ForCausalLM has no experts"):
        run(decompose_experts.main, "--model-path", "tiny-qwen3", "--rank", 3, "--device", "cpu")


def test_a_number_beyond_the_range_of_float16_is_refused(
    model: Path, run: Callable[..., None]
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"] *= 1e6
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match="a matrix has values beyond the range of float16"):
        run(
            decompose_experts.main, "--model-path", model, "--rank", 3, "--dtype", "float16",
            "--device", "cpu",
        )  # fmt: skip


def test_weights_that_are_not_finite_are_refused(model: Path, run: Callable[..., None]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match="experts of layer 1 have weights that are NaN"):
        run(decompose_experts.main, "--model-path", model, "--rank", 3, "--device", "cpu")


def test_a_dtype_that_files_cannot_have_is_refused(model: Path, run: Callable[..., None]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    with pytest.raises(ValueError, match=r"dtype is float64: choose float32, .* with --dtype"):
        run(decompose_experts.main, "--model-path", model, "--rank", 3, "--device", "cpu")


def test_ranks_follow_from_shares_of_bytes() -> None:
    source = open_source("tiny-mixtral")
    for share, rank in zip((0.75, 0.5), compare_compressed.ranks(source, [0.75, 0.5])):
        sizes = [compare_compressed.num_weights(source, one) for one in (rank, rank + 1, None)]
        assert sizes[0] <= share * sizes[2] < sizes[1]
