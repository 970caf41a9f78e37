"""Qwen2.5-Omni's thinker: prompts with sound, images and videos answered as by transformers."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.compile.program import Compiler
from nanovllm.models.loader import Target
from nanovllm.models.vision import weights
from nanovllm.models.vision.registry import tower
from nanovllm.platforms import cpu
from nanovllm.runner.tower import TowerSteps
from tests.media.vision_cases import picture, without_torchvision
from tests.models import omni_cases
from tests.models.omni_cases import FILM, PICTURE, RATE, SOUND, as_16_bits, clip, wav
from tests.models.tower_cases import BUDGETS

__all__ = ["without_torchvision"]

NUM_TOKENS = 5
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
VOCAB = omni_cases.TEXT["vocab_size"]
THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"
WHOLE = ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration")
# samples of each clip, and sizes of each picture, in the order of the text
PROMPTS: dict[str, tuple[str, list[int], list[tuple[int, int]]]] = {
    "clip": (f"what is {SOUND}?", [5003], []),
    "one token": (f"{SOUND} is a tone", [321], []),
    "clips": (f"{SOUND}{SOUND} or{SOUND}", [1999, 160 * 24, 7777], []),
    "clip and image": (f"a {SOUND} with {PICTURE} is", [4100], [(90, 70)]),
    "image and clips": (
        f"{PICTURE}{SOUND}then {SOUND}{PICTURE}",
        [640, 3301],
        [(200, 40), (60, 130)],
    ),
    "image": (f"the {PICTURE} of", [], [(99, 101)]),
    "text": ("the end", [], []),
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, transformers' model and its processor."""
    folder = tmp_path_factory.mktemp("omni")
    return folder, omni_cases.save(folder), omni_cases.save_processor(folder)


@pytest.fixture(scope="module")
def eager(thinker: Any) -> Any:
    made = engine(thinker[0], enforce_eager=True)
    yield made
    made.close()


@pytest.fixture(scope="module", params=["eager", "graph"])
def llm(request: pytest.FixtureRequest, thinker: Any, device: str) -> Any:
    """Chunks of 16 tokens, so that some end inside a clip or an image."""
    made = engine(thinker[0], device=device, enforce_eager=request.param == "eager")
    yield made
    made.close()


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(
        str(folder), dtype="float32", max_num_seqs=4, graph_batch_sizes=[4],
        max_num_batched_tokens=16, kvcache_block_size=16, vision_patch_budgets=BUDGETS,
        **{"device": "cpu", "max_model_len": 600, **options},
    )  # fmt: skip


def media(name: str) -> tuple[str, list[np.ndarray], list[Any]]:
    text, lengths, sizes = PROMPTS[name]
    sounds = [clip(num, seed=i) for i, num in enumerate(lengths)]
    return text, sounds, [picture(*size, seed=i) for i, size in enumerate(sizes)]


def prompt(name: str) -> dict[str, Any]:
    text, sounds, pictures = media(name)
    data = {"audio": [(one, RATE) for one in sounds], "image": pictures}
    return {"prompt": text, "multi_modal_data": data}


def inputs(thinker: Any, name: str) -> dict[str, Any]:
    text, sounds, pictures = media(name)
    given = {"audio": sounds or None, "images": pictures or None}
    return dict(thinker[2](text=[text], return_tensors="pt", **given))


@pytest.mark.shows("eager", "graph", "images", "sound", "GPU", architectures=[THINKER])
def test_logits_and_tokens_are_those_of_transformers(thinker: Any, llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1
    )  # fmt: skip
    found = llm.generate([prompt(name) for name in PROMPTS], params, use_tqdm=False)
    for name, output in zip(PROMPTS, found):
        given = inputs(thinker, name)
        tokens, logprobs = omni_cases.answer(thinker[1], given, NUM_TOKENS)
        assert output.prompt_token_ids == given["input_ids"][0].tolist(), name
        (done,) = output.outputs
        assert list(done.token_ids) == tokens, name
        for wanted, got in zip(logprobs, done.logprobs):
            actual = torch.tensor([got[i].logprob for i in range(VOCAB)])
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("num_frames", [2, 5])
def test_videos_beside_sound_are_answered_as_by_transformers(
    thinker: Any, llm: LLM, without_torchvision: None, num_frames: int
) -> None:
    frames = [picture(240, 170, seed=i) for i in range(num_frames)]
    text, sound = f"{FILM}and {SOUND}:", clip(2345)
    given = dict(thinker[2](text=[text], videos=[frames], audio=[sound], return_tensors="pt"))
    tokens, _ = omni_cases.answer(thinker[1], given, NUM_TOKENS)
    data = {"video": [frames], "audio": (sound, RATE)}
    (output,) = llm.generate({"prompt": text, "multi_modal_data": data}, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == given["input_ids"][0].tolist()
    assert list(output.outputs[0].token_ids) == tokens


def test_chats_take_parts_of_sound_in_all_forms(thinker: Any, eager: LLM) -> None:
    sound = clip(3210)
    encoded = base64.b64encode(wav(sound)).decode()
    forms: list[dict[str, Any]] = [
        {"type": "audio", "audio": (as_16_bits(sound), RATE)},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}},
    ]
    question = {"type": "text", "text": "what is it?"}
    found = [
        eager.chat([{"role": "user", "content": [form, question]}], GREEDY, use_tqdm=False)[0]
        for form in forms
    ]
    text = f"user: {SOUND}what is it?; assistant: "
    given = dict(thinker[2](text=[text], audio=[as_16_bits(sound) / 32768], return_tensors="pt"))
    tokens, _ = omni_cases.answer(thinker[1], given, NUM_TOKENS)
    for output in found:
        assert output.prompt_token_ids == given["input_ids"][0].tolist()
        assert list(output.outputs[0].token_ids) == tokens


def test_bad_sound_ends_its_own_request_only(thinker: Any, eager: LLM) -> None:
    good = prompt("clip")
    bad = {"prompt": SOUND, "multi_modal_data": {"audio": (clip(5003), 500)}}
    expected = [list(one.outputs[0].token_ids) for one in eager.generate([good], GREEDY)]
    first, failed, last = eager.generate([good, bad, good], GREEDY, use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in (first, last)] == expected * 2
    assert failed.outputs[0].finish_reason == "error"
    assert "audio 1: its sampling rate is 500 Hz: it must be" in str(failed.outputs[0].error)


@pytest.mark.parametrize(
    "text, sounds, message",
    [
        (f"{SOUND}{SOUND}", 1, "2 placeholders for audios, but 1 audios were given"),
        ("none", 1, "0 placeholders for audios, but 1 audios were given"),
        (SOUND * 9, 9, "the prompt has 9 audios: at most 8 are allowed"),
    ],
)
def test_sound_that_does_not_fit_the_prompt_is_refused(
    eager: LLM, text: str, sounds: int, message: str
) -> None:
    data = {"audio": [(clip(400), RATE)] * sounds}
    with pytest.raises(ValueError, match=message):
        eager.generate({"prompt": text, "multi_modal_data": data}, GREEDY, use_tqdm=False)


def test_the_same_sound_shares_blocks_and_other_sound_does_not(eager: LLM) -> None:
    eager.engine.forget_prefixes()
    text = f"listen: {SOUND} what is it?"
    given = [{"prompt": text, "multi_modal_data": {"audio": (clip(9000, seed=i), RATE)}}
             for i in (1, 1, 2)]  # fmt: skip
    found = [eager.generate(one, GREEDY, use_tqdm=False)[0] for one in given]
    num_prompt = len(found[0].prompt_token_ids)
    counts = [one.num_cached_tokens for one in found]
    assert counts == [0, (num_prompt - 1) // 16 * 16, 0]
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids


@pytest.mark.shows("eager", "images", "sound", architectures=WHOLE)
@pytest.mark.parametrize("architecture", WHOLE)
def test_the_names_of_the_release_are_read_and_speech_is_left_out(
    thinker: Any, eager: LLM, tmp_path: Path, architecture: str
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(thinker[0], folder)
    stored = load_file(folder / "model.safetensors")
    renamed = {f"thinker.{name}": tensor for name, tensor in stored.items()}
    speech = {"talker.codec_head.weight": torch.ones(3), "token2wav.dit.x": torch.ones(2)}
    save_file(renamed | speech, folder / "model.safetensors")
    part = json.loads((folder / "config.json").read_text())
    assert part["architectures"] == [THINKER]
    whole = {
        "architectures": [architecture], "model_type": "qwen2_5_omni",
        "dtype": "float32",
        "thinker_config": {**part, "architectures": ["Qwen2OmniNaViTThinker"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    release = engine(folder, enforce_eager=True)
    try:
        asked = prompt("clip and image")
        found, expected = (
            one.generate(asked, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            for one in (release, eager)
        )
    finally:
        release.close()
    assert found == expected


@pytest.mark.shows("ranks", architectures=[THINKER])
def test_both_of_two_ranks_hear_and_see(thinker: Any, eager: LLM) -> None:
    two = engine(thinker[0], enforce_eager=True, tensor_parallel_size=2)
    try:
        asked = [prompt("image and clips"), prompt("text")]
        found, expected = (
            [list(one.outputs[0].token_ids) for one in each.generate(asked, GREEDY)]
            for each in (two, eager)
        )
    finally:
        two.close()
    assert found == expected


def test_a_preempted_prompt_with_sound_goes_on_as_before(thinker: Any, eager: LLM) -> None:
    small = engine(thinker[0], enforce_eager=True, num_kvcache_blocks=12, max_model_len=99)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    asked = [{"prompt": f"{SOUND}what", "multi_modal_data": {"audio": (clip(9000, seed=i), RATE)}}
             for i in range(4)]  # fmt: skip
    try:
        found, expected = (
            [list(one.outputs[0].token_ids) for one in each.generate(asked, params)]
            for each in (small, eager)
        )
        preempted = [one for one in small.get_metrics() if "preempt" in one.name]
    finally:
        small.close()
    assert found == expected
    assert preempted[0].value > 0


@pytest.mark.parametrize("grids", [[(1, 2, 2)], [(1, 6, 10), (3, 4, 2), (1, 10, 4)]])
def test_the_features_of_the_vision_tower_are_those_of_transformers(
    thinker: Any, grids: list[tuple[int, int, int]]
) -> None:
    folder, hf, _ = thinker
    device = cpu.create(0, {})
    made = tower(hf.config.vision_config, torch.float32)
    loaded = weights.load(made, folder, Target(device.device))
    steps = TowerSteps(made, loaded, device, Compiler(lowering=None), (256, 1024))
    pixels = torch.randn(sum(int(np.prod(one)) for one in grids), 3 * 2 * 14 * 14)
    with torch.no_grad():
        wanted = hf.model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
    torch.testing.assert_close(steps.features(pixels, grids)[0], wanted, rtol=0, atol=1e-4)
