"""The scripts that compress experts: fits, calibration data, files, and what they refuse."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import collect_moe_calib
import compare_compressed
import decompose_experts
import distill_experts_activation_aware as distill_experts
from compress import bases, output, shared_fit
from compress.calibration import MIN_INPUTS, Calibration, Group, Inputs
from compress.calibration import save as save_calibration
from compress.prompts import conversations
from compress.source import Source, open_source
from tiny.corpus import conversation, render
from tiny.tasks import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import SamplingParams
from nanovllm.models.checkpoint import CheckpointError
from tests.conftest import save_tiny
from tests.engines import VOCAB_SIZE, save_tokenizer
from tests.models.harness import Known, engine_logits, load

NUM_EXPERTS, TOP_K, HIDDEN, SIZE, NUM_LAYERS = 5, 2, 48, 40, 3
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Mixtral with a tokenizer."""
    folder = save_tiny(
        tmp_path / "model", "mixtral", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN,
        intermediate_size=SIZE, num_hidden_layers=NUM_LAYERS, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K,
    )  # fmt: skip
    save_tokenizer(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the main function of a script with arguments."""

    def run(main: Callable[[], object], *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        main()
        monkeypatch.setenv("NANOVLLM_DISABLE_SVD", "0")  # a script sets it for its process

    return run


# fits ---------------------------------------------------------------------------------------------


def moments(num: int, size: int) -> Tensor:
    """Second moments of inputs with very different variances, another one for each expert."""
    scales = torch.logspace(0, -2, size).diag()
    return torch.stack([(x := torch.randn(200, size) @ scales).t() @ x / 200 for _ in range(num)])


def test_a_basis_of_all_directions_loses_nothing_and_fewer_lose_the_least_eigenvalues() -> None:
    matrices_EOI = torch.randn(3, 19, 24)
    u_IL = bases.shared_basis(matrices_EOI, 24)
    assert torch.allclose(u_IL @ u_IL.t(), torch.eye(24), atol=1e-5)
    u_IL = bases.shared_basis(matrices_EOI, 9)
    lost = (matrices_EOI - matrices_EOI @ u_IL @ u_IL.t()).square().sum()
    values_I = torch.linalg.svdvals(matrices_EOI.flatten(0, 1)).square()
    assert torch.allclose(lost, values_I[9:].sum(), rtol=1e-4)


def test_the_random_search_finds_what_the_exact_one_finds() -> None:
    directions_II = torch.linalg.qr(torch.randn(199, 199))[0]
    moment_II = (directions_II * torch.logspace(0, -6, 199)) @ directions_II.t()
    assert 9 + 19 < bases.EXACT_SHARE * 199 < 9 + 99
    found, exact = (bases.principal(moment_II, 9, more) for more in (19, 99))
    assert torch.allclose(found @ found.t(), exact @ exact.t(), atol=1e-4)
    assert torch.equal(found, bases.principal(moment_II, 9, 19)), "it is the same every time"


def test_matrices_that_share_a_basis_are_found_again() -> None:
    targets_EIO = torch.randn(24, 9) @ torch.randn(3, 9, 19)
    moments_EII = moments(3, 24) + 1e-3 * torch.eye(24)
    u_IL, v_ELO = shared_fit.fit(moments_EII, targets_EIO, 9, 0)
    for v_LO, target_IO in zip(v_ELO, targets_EIO):
        assert (u_IL @ v_LO - target_IO).norm() < 1e-2 * target_IO.norm()


@pytest.mark.parametrize("rank", [1, 9, 23])
def test_a_fit_is_better_than_principal_components_and_each_turn_makes_it_better(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments_EII, targets_EIO = moments(4, 24), torch.randn(4, 24, 19)

    def error(num_rounds: int) -> float:
        monkeypatch.setattr(shared_fit, "NUM_ROUNDS", num_rounds)
        u_IL, v_ELO = shared_fit.fit(moments_EII, targets_EIO, rank, 0)
        return shared_fit.error(moments_EII, targets_EIO, u_IL, v_ELO)

    u_IL = bases.shared_basis(targets_EIO.transpose(1, 2), rank)
    components = [u_IL.t() @ target_IO for target_IO in targets_EIO]
    assert error(0) < shared_fit.error(moments_EII, targets_EIO, u_IL, components)
    assert error(3) < error(1) < error(0)


def test_a_regression_is_the_best_for_its_basis() -> None:
    moments_EII, targets_EIO = moments(2, 24), torch.randn(2, 24, 19)
    u_IL = torch.linalg.qr(torch.randn(24, 9))[0]
    best = shared_fit.regress(moments_EII, targets_EIO, u_IL)
    least = shared_fit.error(moments_EII, targets_EIO, u_IL, best)
    for _ in range(5):
        others = [v_LO + 0.01 * torch.randn_like(v_LO) for v_LO in best]
        assert shared_fit.error(moments_EII, targets_EIO, u_IL, others) > least


# calibration data ---------------------------------------------------------------------------------

PROMPTS = ["a", "the answer is in the other one", "then and there", "99 times"]


def record(folder: Path, cap: int, **options: Any) -> dict[tuple[int, int], Inputs]:
    """What experts get while the prompts are read and one token is generated."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=1)
    recorder = collect_moe_calib.collect(
        str(folder), conversations, params, cap, device="cpu", dtype="float32",
        enable_prefix_caching=False, max_model_len=128, **options,
    )  # fmt: skip
    return {key: group.inputs() for key, group in recorder.groups.items()}


def sorted_rows(x_ND: Tensor) -> Tensor:
    return x_ND[x_ND[:, 0].argsort()]


def test_the_recorded_inputs_are_those_of_transformers(model: Path) -> None:
    """The last layer goes on with the last token of a prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in range(NUM_LAYERS)]
    for layer, found in zip(theirs.model.layers, seen):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, found=found: found.append(tuple(arg.clone() for arg in args[:3]))
        )
    with torch.no_grad():
        for prompt in PROMPTS:
            theirs(tokenizer(prompt, return_tensors="pt")["input_ids"])
    recorded = record(model, cap=989)
    for layer_idx, calls in enumerate(seen):
        if layer_idx == NUM_LAYERS - 1:
            calls = [tuple(part[-1:] for part in call) for call in calls]
        x_TD, expert_TK, weight_TK = (torch.cat(parts) for parts in zip(*calls))
        for expert in range(NUM_EXPERTS):
            token_N, choice_N = (expert_TK == expert).nonzero(as_tuple=True)
            if not len(token_N):
                assert (layer_idx, expert) not in recorded
                continue
            own = recorded[layer_idx, expert]
            expected_ND = sorted_rows(x_TD[token_N])
            assert torch.allclose(sorted_rows(own.x_ND), expected_ND, atol=1e-4)
            weights = weight_TK[token_N, choice_N][x_TD[token_N][:, 0].argsort()]
            assert torch.allclose(own.weight_N[own.x_ND[:, 0].argsort()], weights, atol=1e-4)


def test_offloaded_experts_are_recorded_as_well(model: Path) -> None:
    whole, offloaded = record(model, 989), record(model, 989, expert_offload=2)
    assert whole.keys() == offloaded.keys()
    for key, inputs in whole.items():
        assert torch.allclose(sorted_rows(inputs.x_ND), sorted_rows(offloaded[key].x_ND), atol=1e-5)


def test_a_group_keeps_a_uniform_sample(model: Path) -> None:
    generator, counts = torch.Generator().manual_seed(1), torch.zeros(99)
    for _ in range(300):
        group = Group(cap=9)
        for value_N in torch.arange(99.0).split(7):
            keys = torch.rand(len(value_N), generator=generator)
            group.add(Inputs(value_N.unsqueeze(1), value_N), keys)
        x_N1, weight_N = group.inputs()
        assert len(weight_N) == 9 and torch.equal(x_N1[:, 0], weight_N) and group.num_seen == 99
        counts[weight_N.long()] += 1
    halves = counts[:49].sum() / counts[50:].sum()
    assert counts.min() > 5 and 0.9 < halves < 1.1


@pytest.fixture
def calibration(model: Path, run: Callable[..., None], tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "calib.safetensors"
    run(
        collect_moe_calib.main, "--model-path", model, "--out", path, "--cap-per-group", 199,
        "--num-prompts", 19, "--max-new-tokens", 5, "--temperature", 0.7, "--device", "cpu",
    )  # fmt: skip
    return path


def test_the_file_has_at_most_the_cap_and_an_expert_with_few_inputs_borrows_some(
    model: Path, calibration: Path
) -> None:
    stored = load_file(calibration)
    lens = {name: len(stored[f"layer_{name}_weight"]) for name in
            {name.removeprefix("layer_").rpartition("_")[0] for name in stored}}  # fmt: skip
    assert max(lens.values()) == 199 and min(lens.values()) < MIN_INPUTS
    inputs = Calibration(calibration, open_source(str(model))).layer_inputs(NUM_LAYERS - 1)
    for expert, own in enumerate(inputs):
        num = lens.get(f"{NUM_LAYERS - 1}_expert_{expert}", 0)
        assert len(own.weight_N) == len(own.x_ND) >= min(num, MIN_INPUTS)
        assert num >= MIN_INPUTS or len(own.weight_N) > num


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no calibration data: scripts/collect"), (b"x", "damaged or not calibration data")],
)
def test_other_files_are_no_calibration_data(
    model: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "calib.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        Calibration(path, open_source(str(model)))


def test_calibration_data_of_another_model_are_refused(
    model: Path, calibration: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", "mixtral", hidden_size=32, num_local_experts=NUM_EXPERTS)
    with pytest.raises(ValueError, match="hidden_size is 48, but the checkpoint has 32"):
        Calibration(calibration, open_source(str(other)))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"weight": None}, "inputs of layer_0_expert_1 cannot be read"),
        ({"x": torch.ones(2, 9)}, r"have the shapes \[2, 9\] and \[2\]: they must be \[N, 48\]"),
        ({"weight": torch.ones(3)}, r"have the shapes \[2, 48\] and \[3\]"),
        ({"x": torch.full((2, HIDDEN), torch.nan)}, "layer_0_expert_1 are NaN or infinite"),
        ({"weight": torch.full((2,), torch.inf)}, "layer_0_expert_1 are NaN or infinite"),
    ],
)
def test_damaged_inputs_are_named(
    model: Path, tmp_path: Path, harm: dict[str, Tensor | None], message: str
) -> None:
    source, path = open_source(str(model)), tmp_path / "calib.safetensors"
    groups = {(0, expert): Group(9) for expert in range(2)}
    for group in groups.values():
        group.add(Inputs(torch.ones(2, HIDDEN), torch.ones(2)), torch.rand(2))
    save_calibration(path, source, groups)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    changed = load_file(path) | {f"layer_0_expert_1_{name}": x for name, x in harm.items()}
    save_file({name: x for name, x in changed.items() if x is not None}, path, header)
    with pytest.raises(ValueError, match=message):
        Calibration(path, source).layer_inputs(0)


def test_calibration_data_replace_nothing_else(model: Path, run: Callable[..., None]) -> None:
    """The script says so before it collects anything."""
    before = (model / "model.safetensors").read_bytes()
    for path, message in (
        (model / "model.safetensors", "not calibration data: .* would be overwritten"),
        (model, "is a folder: name the file to write"),
    ):
        with pytest.raises(ValueError, match=message):
            run(collect_moe_calib.main, "--model-path", model, "--out", path, "--device", "none")
    assert (model / "model.safetensors").read_bytes() == before


def test_a_layer_without_inputs_is_refused(model: Path, tmp_path: Path) -> None:
    source = open_source(str(model))
    group = Group(9)
    group.add(Inputs(torch.ones(2, HIDDEN), torch.ones(2)), torch.rand(2))
    save_calibration(tmp_path / "calib.safetensors", source, {(0, 1): group})
    found = Calibration(tmp_path / "calib.safetensors", source)
    assert len(found.layer_inputs(0)) == NUM_EXPERTS
    with pytest.raises(ValueError, match="has no inputs of layer 2: collect them with more"):
        found.layer_inputs(2)


# the scripts --------------------------------------------------------------------------------------


def distill(run: Callable[..., None], model: Path, calibration: Path, *more: object) -> None:
    run(
        distill_experts.main, "--model-path", model, "--calib-path", calibration, "--device", "cpu",
        *more,
    )  # fmt: skip


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
