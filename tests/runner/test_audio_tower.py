"""Audio towers give transformers' tokens for clips of all lengths, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.store import Store
from nanovllm.models.audio import layout as layouts
from nanovllm.models.audio.qwen2_5_omni import tower
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.loader import Target
from nanovllm.models.vision import weights
from nanovllm.platforms import cpu
from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner.audio_tower import AudioSteps, Inputs
from nanovllm.runner.step_regions import FROZEN
from tests.models import omni_cases

TOLERANCE = 1e-4
BUDGETS = (2, 5)
# frames of each clip; a chunk has 12
CASES: dict[str, list[int]] = {
    "one token": [3],
    "one chunk": [12],
    "one chunk and one frame": [13],
    "odd": [19],
    "exactly a budget": [24],
    "one frame more than a budget": [25],
    "several calls": [12 * 11 + 7],
    "several clips": [5, 24, 3, 31],
    "several clips and calls": [37, 4, 60, 11, 12],
}


@pytest.fixture(scope="module")
def platform() -> Platform:
    made = cpu.create(0, {})
    made.prepare()
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint's folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("omni")
    return folder, omni_cases.save(folder)


@pytest.fixture(scope="module")
def eager(saved: Any, platform: Platform) -> AudioSteps:
    return steps(*saved, platform, Compiler(lowering=None))


@pytest.fixture(scope="module")
def compiled(
    saved: Any, platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> AudioSteps:
    """Programs for one budget; a later compile is an error."""
    lowering, why = platform.lowering()
    assert lowering is not None, why
    compiler = Compiler(
        lowering, platform.passes(fuse=True), strict=True, frozen=FROZEN,
        store=Store(tmp_path_factory.mktemp("store")),
    )  # fmt: skip
    made = replace(steps(*saved, platform, compiler), budgets=(3,))
    made.run_budget(3)
    compiler.seal()
    return made


def steps(
    folder: Path,
    model: Any,
    platform: Platform,
    compiler: Compiler,
    dtype: torch.dtype = torch.float32,
) -> AudioSteps:
    made = tower(model.config.audio_config, dtype)
    loaded = weights.load(made, folder, Target(platform.device))
    return AudioSteps(made, loaded, platform, compiler, BUDGETS)


def features(made: AudioSteps, mels: Tensor, clips: list[int]) -> Tensor:
    return made.features(mels, [(num,) for num in clips])[0]


def difference(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; infinite if there is a NaN."""
    assert left.shape == right.shape
    return (left.float() - right.float()).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case: str, saved: Any, eager: AudioSteps) -> None:
    clips = CASES[case]
    mels = omni_cases.mels(clips)
    found = features(eager, mels, clips)
    assert difference(found, omni_cases.expected(saved[1], mels, clips)) <= TOLERANCE
    assert len(found) == sum(eager.num_tokens((num,)) for num in clips)


def test_the_programs_of_a_budget_serve_all_lengths(saved: Any, compiled: AudioSteps) -> None:
    for clips in CASES.values():
        mels = omni_cases.mels(clips)
        expected = omni_cases.expected(saved[1], mels, clips)
        assert difference(features(compiled, mels, clips), expected) <= TOLERANCE


def test_captured_calls_give_the_tokens_of_calls_that_are_launched(
    saved: Any, platform: Platform
) -> None:
    made = steps(*saved, platform, Compiler(lowering=None))
    mels = {case: omni_cases.mels(clips) for case, clips in CASES.items()}
    expected = {case: features(made, mels[case], clips) for case, clips in CASES.items()}
    replays: list[Callable[[], None]] = []

    def capture(step: Callable[[], None]) -> Replay:
        def replay() -> None:
            replays.append(step)
            step()

        return replay

    made.capture(capture)
    for case, clips in CASES.items():
        assert torch.equal(features(made, mels[case], clips), expected[case])
    assert len(replays) >= len(CASES) and set(made._captured) == set(BUDGETS)


def test_bfloat16_is_close_to_transformers(saved: Any, platform: Platform) -> None:
    folder, model = saved
    made = steps(folder, model, platform, Compiler(lowering=None), torch.bfloat16)
    mels = omni_cases.mels([41])
    expected = omni_cases.expected(model, mels, [41])
    assert difference(features(made, mels, [41]), expected) <= 0.05 * expected.abs().max().item()


def test_frames_that_no_clip_has_are_never_read(eager: AudioSteps) -> None:
    chunks = layouts.chunks([12, 7], 12)
    inputs = eager.inputs(omni_cases.mels([12, 7]), chunks, 5)
    mel_KFM = inputs.mel_KFM.clone()
    mel_KFM[1, 7:] = torch.nan
    mel_KFM[2:] = torch.nan
    spoilt: Inputs = inputs._replace(mel_KFM=mel_KFM)
    token_g = torch.from_numpy(layouts.tokens(chunks.frames, 6))
    kept, found = (
        eager.run(one, eager.compiler)[0].index_select(0, token_g) for one in (inputs, spoilt)
    )
    assert torch.equal(kept, found)


def test_a_clip_has_the_same_tokens_beside_others(eager: AudioSteps) -> None:
    clips = [31, 17, 50]
    mels = omni_cases.mels(clips)
    together = features(eager, mels, clips)
    alone = [features(eager, one, [len(one)]) for one in mels.split(clips)]
    assert difference(together, torch.cat(alone)) <= 1e-5


def test_the_number_of_tokens_is_that_of_transformers() -> None:
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import (
        _get_feat_extract_output_lengths,
    )

    lengths = list(range(1, 1000))
    expected = _get_feat_extract_output_lengths(torch.tensor(lengths)).tolist()
    assert [layouts.num_tokens(num) for num in lengths] == expected


def test_features_that_do_not_fit_the_clips_are_refused(eager: AudioSteps) -> None:
    with pytest.raises(ValueError, match=r"shape \[20, 10\], but their lengths require \[24, 10\]"):
        eager.features(torch.zeros(20, 10), [(24,)])
    with pytest.raises(ValueError, match="a clip has 2 frames of features: at least 3"):
        eager.features(torch.zeros(14, 10), [(12,), (2,)])


@pytest.mark.parametrize("budgets", [(), (0, 4), (4, 2), (4, 4)])
def test_budgets_that_no_tower_can_have_are_refused(
    budgets: tuple[int, ...], eager: AudioSteps
) -> None:
    with pytest.raises(ValueError, match="must ascend and be at least 1"):
        AudioSteps(eager.tower, eager.weights, eager.platform, eager.compiler, budgets)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation_function": "relu"}, "activation_function 'relu' .* only 'gelu' is"),
        ({"n_window": 5}, "n_window of the audio tower is 5: it must be even"),
        ({"n_window": 22}, "max_source_positions .* is 20: a chunk has 22 positions"),
        ({"encoder_attention_heads": 3}, "d_model 32 must be its 3 heads"),
        ({"encoder_layers": 0}, "encoder_layers of the audio tower is 0: it must be at least 1"),
    ],
)
def test_settings_that_no_region_computes_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    audio = omni_cases.config().audio_config
    for field, value in changes.items():
        setattr(audio, field, value)
    with pytest.raises(ValueError, match=message):
        tower(audio, torch.float32)


def test_a_tower_with_more_blocks_than_its_config_says_is_refused(
    saved: Any, platform: Platform
) -> None:
    fewer = tower(omni_cases.config(encoder_layers=1).audio_config, torch.float32)
    with pytest.raises(CheckpointError, match=r"does not have, e\.g\. audio_tower\.layers\.1\."):
        weights.load(fewer, saved[0], Target(platform.device))


def test_random_weights_have_the_shapes_of_a_checkpoints(saved: Any) -> None:
    made = tower(saved[1].config.audio_config, torch.bfloat16)
    drawn = weights.random(made, Target(torch.device("cpu")), seed=1)
    leaves = [leaf for group in (drawn.outer, *drawn.blocks, drawn.merger) for leaf in group]
    names = dict(saved[1].model.audio_tower.named_parameters())
    unused = names.pop("audio_bos_eos_token.weight")
    assert unused.numel() > 0
    assert sum(leaf.numel() for leaf in leaves) == sum(one.numel() for one in names.values())
