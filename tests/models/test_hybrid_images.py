"""Hybrid decoders of checkpoints with vision towers: images, and texts without any.

The layers that propose tokens are not read: they are NaN.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.harness import load
from tests.models.hybrid_cases import with_tower
from tests.models.test_vision_text import PROMPTS, TOKENS, Given, answers, engine

NAMES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


@pytest.mark.shows("eager", "images", "GPU", architectures=NAMES)
@pytest.mark.parametrize(
    ("name", "enforce_eager"), [("qwen3_5", False), ("qwen3_5_moe", True)], ids=str
)
def test_answers_about_images_are_those_of_transformers(
    name: str, enforce_eager: bool, device: str, tmp_path: Path
) -> None:
    """In chunks of 16 tokens, with images encoded by the engine."""
    hf = with_tower(name, tmp_path, **TOKENS)
    prompts = [Given(hf, parts, seed) for seed, parts in enumerate(PROMPTS.values())]
    options = {"device": device, "max_num_batched_tokens": 16}
    llm = engine(tmp_path, enforce_eager=enforce_eager, **options)
    try:
        for prompt, done in zip(prompts, answers(llm, prompts, encodes=True)):
            tokens, logprobs = prompt.expected(hf)
            assert done.token_ids == tokens
            for wanted, got in zip(logprobs, done.logprobs):
                actual = torch.tensor([got[i].logprob for i in range(99)])
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
    finally:
        llm.close()


def test_another_order_of_positions_is_refused(tmp_path: Path) -> None:
    with_tower("qwen3_5", tmp_path, **TOKENS)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for change, message in (
        ({"mrope_interleaved": False}, "mrope_interleaved False is not supported by Qwen3.5"),
        ({"mrope_section": [4, 2, 1]}, "mrope_section has 7 frequencies, but a head has 8"),
    ):
        rope = fields["text_config"]["rope_parameters"]
        text = {**fields["text_config"], "rope_parameters": rope | change}
        path.write_text(json.dumps({**fields, "text_config": text}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "cpu", enforce_eager=True)
