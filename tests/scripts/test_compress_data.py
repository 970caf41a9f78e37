"""Fits of experts, and the calibration data that they are made for."""

from __future__ import annotations

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
from compress import bases, shared_fit
from compress.calibration import MIN_INPUTS, Calibration, Group, Inputs
from compress.calibration import save as save_calibration
from compress.source import open_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import SamplingParams
from tests.conftest import save_tiny
from tests.scripts.compress_cases import HIDDEN, NUM_EXPERTS, NUM_LAYERS, calibration, model, run

__all__ = ["calibration", "model", "run"]  # fixtures


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
