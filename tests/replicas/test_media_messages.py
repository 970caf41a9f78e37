"""Images, embeddings and positions of requests reach the replicas, as bytes without pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.batch.rows import Line
from nanovllm.batch.worker import EngineWorker, WorkerSettings
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.request import EngineRequest, MediaPrompt
from nanovllm.hub import SEEING
from nanovllm.replicas import messages, router
from nanovllm.runner.encoders import MMItem
from nanovllm.schedule.request import MMSpan
from tests.engines import greedy
from tests.models.test_vision_text import Given, answers, engine, saved
from tests.replicas.local_replicas import counts
from tests.serving.pictures import about, corrupt, data_url

PARTS: list[list[Any]] = [[0, (8, 12), 0], [(4, 4), (6, 2), 0], [0, (2, 14)], [0]]


def crossed(asked: EngineRequest) -> EngineRequest:
    return messages.with_media(EngineRequest([], SamplingParams()), messages.dump_media(asked))


def request(given: list[tuple[int, Tensor]], **others: Any) -> EngineRequest:
    """A request with these embeddings, as `InputProcessor` makes it."""
    intake = InputProcessor("model", None, 512, 5, 999)
    prompt = [1] * 200
    made = intake.request(prompt, SamplingParams(), embeddings=given)
    return replace(made, **others)


def test_what_a_prompt_has_beside_its_tokens_comes_back() -> None:
    images = [(MMSpan(i, 7, bytes([i, 0, 255])), MMItem(torch.randn(8, i), (2, 2, 2)))
              for i in (1, 3)]  # fmt: skip
    asked = request([(3, torch.randn(2, 5).bfloat16()), (9, torch.randn(5, 9).t()[:1])])
    asked = replace(
        asked,
        contents=asked.contents + tuple(content for content, _ in images),
        media={content.key: image for content, image in images},
        positions=np.arange(12).reshape(4, 3).T,
    )
    found = crossed(asked)
    assert found.contents == asked.contents and len(found.contents) == 4
    for key, expected in asked.embeddings.items():
        assert torch.equal(found.embeddings[key], expected)
        assert found.embeddings[key].dtype is expected.dtype
    assert found.positions is not None and asked.positions is not None
    assert np.array_equal(found.positions, asked.positions)
    for key, image in asked.media.items():
        for value, other in zip(found.media[key], image, strict=True):
            assert type(value) is type(other)
            is_tensor = isinstance(value, Tensor)
            assert torch.equal(value, other) if is_tensor else value == other


@pytest.mark.parametrize("shares", [True, False])
def test_one_image_twice_is_sent_once(shares: bool) -> None:
    """From a cache both are one tensor; prepared at once they are two."""
    values = torch.randn(64, 99)
    others = values if shares else values.clone()
    digest = bytes(range(32))
    images = [(MMSpan(3, 16, digest), MMItem(values, (1, 8, 8))),
              (MMSpan(40, 16, digest), MMItem(others, (1, 8, 8)))]  # fmt: skip
    intake = InputProcessor("model", None, 512, 5, 999)
    once, twice = (
        intake.request(MediaPrompt([1] * 99, None, some), SamplingParams())
        for some in (images[:1], images)
    )
    assert len(messages.dump_media(twice)) < len(messages.dump_media(once)) + 200
    found = crossed(twice)
    assert list(found.contents) == [content for content, _ in images]
    assert all(torch.equal(found.media[one.key].values, values) for one in found.contents)


def test_embeddings_may_share_memory() -> None:
    whole = torch.randn(99, 5)
    given = [(0, whole[:7]), (20, whole[:7]), (40, whole[3:19]), (70, torch.randn(5, 9).t())]
    asked = request(given)
    found = crossed(asked)
    assert found.contents == asked.contents
    for one, (start, expected) in zip(found.contents, given, strict=True):
        assert one.start == start and torch.equal(found.embeddings[one.key], expected)


def test_a_prompt_of_tokens_alone_has_no_second_message() -> None:
    assert messages.dump_media(request([])) == b""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    return saved("qwen3", folder), folder


@pytest.fixture(scope="module")
def two(hf: tuple[Any, Path]) -> Iterator[LLM]:
    llm = engine(hf[1], enforce_eager=True, data_parallel_size=2)
    yield llm
    llm.close()


@pytest.mark.parametrize("encodes", [False, True])
def test_images_give_the_answers_of_one_engine(
    encodes: bool, hf: tuple[Any, Path], two: LLM
) -> None:
    prompts = [Given(hf[0], parts, seed) for seed, parts in enumerate(PARTS)]
    alone = engine(hf[1], enforce_eager=True)
    try:
        expected = answers(alone, prompts, encodes=encodes)
    finally:
        alone.close()
    found = answers(two, prompts, encodes=encodes)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_a_prompt_goes_to_the_replica_that_has_its_images(hf: tuple[Any, Path], two: LLM) -> None:
    """Two prompts with the same text and other images have no blocks in common."""
    prompts = [Given(hf[0], [0, (8, 12), 0], seed) for seed in (11, 12)]
    prompts[1].ids = prompts[0].ids
    before = counts(two, "prompt_tokens")
    answers(two, prompts, encodes=True)
    num = len(prompts[0].ids)
    assert [after - old for after, old in zip(counts(two, "prompt_tokens"), before)] == [num, num]
    for prompt in reversed(prompts):
        (again,) = answers(two, [prompt], encodes=True)
        assert again.num_cached_tokens == num // 16 * 16


def test_too_many_bytes_and_wrong_shapes_are_refused(
    hf: tuple[Any, Path], two: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, add = Given(hf[0], [0, (4, 4)], 0), two.engine.add_request
    with pytest.raises(ValueError, match="embeddings have shape"):
        add(prompt.ids, greedy(2), embeddings=[(0, torch.ones(1, 63))])
    with pytest.raises(ValueError, match=r"positions have shape \[3, 1\]"):
        add(prompt.ids, greedy(2), positions=np.zeros((3, 1), np.int64))
    monkeypatch.setattr(router, "MAX_MEDIA_BYTES", 100)
    with pytest.raises(ValueError, match=r"with data_parallel_size=2 at most 100 are supported"):
        add(MediaPrompt(prompt.ids, prompt.positions, prompt.images), greedy(2))
    with pytest.raises(ValueError, match=r"image 1, but .* no preprocessor_config\.json"):
        two.generate({"prompt": "a", "multi_modal_data": {"image": Image.new("RGB", (9, 9))}})
    engine_of: Any = two.engine
    assert not engine_of._pending


def test_replicas_of_llm_and_of_a_batch_job_take_pictures() -> None:
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4,
        "max_num_batched_tokens": 256, "max_model_len": 256, "num_kvcache_blocks": 65,
        "limit_mm_per_prompt": {"image": 2}, "vision_patch_budgets": [256],
    }  # fmt: skip
    conversations = [
        about(data_url(1)), about(data_url(2, 96), data_url(3, 80)), about(text="hello"),
        about(corrupt()),
    ]  # fmt: skip
    with (
        closing(LLM(SEEING, **options)) as alone,
        closing(LLM(SEEING, data_parallel_size=2, **options)) as two,
    ):
        expected, found = (
            [one.outputs[0] for one in llm.chat(conversations, greedy(8), use_tqdm=False)]
            for llm in (alone, two)
        )
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert found[3].finish_reason == "error" and found[3].error == expected[3].error
        with pytest.raises(ValueError, match=r"at most 2 image|image.* 2"):
            two.chat(about(*map(data_url, range(3))), greedy(2), use_tqdm=False)
        params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
        worker = EngineWorker(two.shared, WorkerSettings(params))
        texts = [json.dumps({"messages": one}).encode() for one in conversations]
        for row, text in enumerate(texts):
            worker.submit(Line(row, text, len(text)))
        rows: dict[int, Any] = {}
        while len(rows) < len(texts):
            rows |= {one.row: json.loads(one.line) for one in worker.wait()}
        assert [rows[i]["text"] for i in range(3)] == [one.text for one in expected[:3]]
        assert "image 1" in rows[3]["error"]
        assert not two.engine._preparing and not two.engine._pending  # type: ignore[attr-defined]
