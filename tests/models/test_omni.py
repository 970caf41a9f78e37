"""Qwen2.5-Omni's thinker: prompts with sound, images and videos answered as by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.media.vision_cases import picture, without_torchvision
from tests.models import omni_cases
from tests.models.omni_cases import FILM, PICTURE, RATE, SOUND, clip

__all__ = ["without_torchvision"]

NUM_TOKENS = 5
VOCAB = omni_cases.TEXT["vocab_size"]
# samples of each clip, and sizes of each picture, in the order of the text
PROMPTS: dict[str, tuple[str, list[int], list[tuple[int, int]]]] = {
    "clip": (f"what is {SOUND}?", [5003], []),
    "one token": (f"{SOUND} is a tone", [321], []),
    "clips": (f"{SOUND}{SOUND} or{SOUND}", [1999, 160 * 24, 7777], []),
    "clip and image": (f"a {SOUND} with {PICTURE} is", [4100], [(19, 27)]),
    "image and clips": (f"{PICTURE}{SOUND}then {SOUND}{PICTURE}", [640, 3301], [(40, 8), (9, 30)]),
    "image": (f"the {PICTURE} of", [], [(33, 21)]),
    "text": ("the end", [], []),
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, transformers' model and its processor."""
    folder = tmp_path_factory.mktemp("omni")
    return folder, omni_cases.save(folder), omni_cases.save_processor(folder)


@pytest.fixture(scope="module", params=["eager", "graph"])
def llm(request: pytest.FixtureRequest, thinker: Any) -> Any:
    """Chunks of 16 tokens, so that some end inside a clip or an image."""
    made = engine(thinker[0], enforce_eager=request.param == "eager")
    yield made
    made.close()


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(
        str(folder), device="cpu", dtype="float32", max_num_seqs=4, graph_batch_sizes=[4],
        max_num_batched_tokens=16, max_model_len=256, kvcache_block_size=16,
        **options,
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
