"""Prompts with images and videos: answers are those of transformers' processors and models."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanovllm import LLM
from tests.engine.seeing import FILM, GREEDY, MODELS, NUM_TOKENS, PICTURE, Seeing, make
from tests.media.vision_cases import picture, without_torchvision

__all__ = ["without_torchvision"]

# prompts with the sizes of their images, as (width, height)
PROMPTS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "first": (f"{PICTURE}what is it?", [(60, 85)]),
    "middle": (f"the {PICTURE} in", [(131, 77)]),
    "last": (f"the end{PICTURE}", [(1, 1)]),
    "adjacent": (f"a{PICTURE}{PICTURE}b", [(60, 85), (200, 33)]),
    "three": (f"{PICTURE} and {PICTURE} and {PICTURE}", [(90, 40), (3, 500), (64, 64)]),
    "large": (f"the {PICTURE}", [(900, 700)]),
    "none": ("only text", []),
}


@pytest.fixture(scope="module", params=MODELS)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["eager", "graph"])
def chunked(request: pytest.FixtureRequest, seeing: Seeing) -> Iterator[LLM]:
    """Steps of 32 prompt tokens, so that chunks end inside of images."""
    llm = seeing.llm(enforce_eager=request.param == "eager", max_num_batched_tokens=32)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def llm(seeing: Seeing) -> Iterator[LLM]:
    llm = seeing.llm(enforce_eager=True)
    yield llm
    llm.close()


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [picture(*size, seed=i) for i, size in enumerate(sizes)]


def asked(text: str, **data: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": data} if data else {"prompt": text}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ids(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_answers_to_images_are_those_of_transformers(seeing: Seeing, chunked: LLM) -> None:
    """All prompts in one batch, whose chunks end inside of images."""
    media = {name: pictures(sizes) for name, (_, sizes) in PROMPTS.items()}
    prompts = [asked(text, **_images(media[name])) for name, (text, _) in PROMPTS.items()]
    outputs = chunked.generate(prompts, GREEDY, use_tqdm=False)
    for (name, (text, _)), output in zip(PROMPTS.items(), outputs):
        prompt_ids, expected = seeing.expected(text, **_theirs(media[name]))
        assert output.prompt_token_ids == prompt_ids, name
        assert ids(output) == expected, name


def _images(images: list[Image.Image]) -> dict[str, Any]:
    return {"image": images} if images else {}


def _theirs(images: list[Image.Image]) -> dict[str, Any]:
    return {"images": images} if images else {}


@pytest.mark.parametrize("num_frames", [2, 5, 16])
def test_answers_to_videos_are_those_of_transformers(
    seeing: Seeing, llm: LLM, without_torchvision: None, num_frames: int
) -> None:
    if num_frames > 5 and seeing.truncates_seconds:
        pytest.skip("this version of transformers truncates the seconds between frames")
    frames = [picture(70, 50, seed=i) for i in range(num_frames)]
    image = picture(60, 80)
    text = f"see {FILM} and {PICTURE}?"
    (output,) = llm.generate([asked(text, video=[frames], image=image)], GREEDY, use_tqdm=False)
    prompt_ids, expected = seeing.expected(text, videos=[frames], images=[image])
    assert output.prompt_token_ids == prompt_ids
    assert ids(output) == expected


def test_a_batch_with_and_without_images_answers_as_each_prompt_alone(llm: LLM) -> None:
    prompts = [
        asked(f"{i} {PICTURE * (i % 3)}?", **_images(pictures([(50 + 9 * i, 70)] * (i % 3))))
        for i in range(16)
    ]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.reset_prefix_cache()
    alone = [llm.generate([one], GREEDY, use_tqdm=False)[0] for one in prompts]
    assert [ids(one) for one in together] == [ids(one) for one in alone]


def test_prompts_share_blocks_only_if_their_images_are_equal(llm: LLM) -> None:
    text = f"a long beginning of the prompt {PICTURE} and its end"
    image, other = picture(131, 77), picture(131, 77, seed=1)
    llm.reset_prefix_cache()
    first, again, changed = (
        llm.generate([asked(text, image=one)], GREEDY, use_tqdm=False)[0]
        for one in (image, image.copy(), other)
    )
    num_before = first.prompt_token_ids.index(max(first.prompt_token_ids))
    assert ids(again) == ids(first)
    assert again.num_cached_tokens == len(first.prompt_token_ids) // 16 * 16
    assert changed.num_cached_tokens == num_before // 16 * 16
    assert changed.prompt_token_ids == first.prompt_token_ids


def test_an_image_is_encoded_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several prompts and places, and as long as the cache keeps its embeddings."""
    runner: Any = llm.engine.runner  # type: ignore[attr-defined]
    encoded: list[int] = []
    encode = runner.encode
    monkeypatch.setattr(runner, "encode", lambda new: encoded.append(len(new)) or encode(new))
    image = picture(77, 130, seed=9)
    prompts = [asked(f"{i} {PICTURE}?", image=image) for i in range(3)]
    llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.generate([asked(f"now {PICTURE} and {PICTURE}", image=[image] * 2)], GREEDY, use_tqdm=False)
    assert sum(encoded) == 1
    monkeypatch.setattr(runner.embeddings, "max_bytes", 0)
    for expected in (1, 2):  # the first step still finds them, and drops them
        llm.reset_prefix_cache()
        llm.generate([prompts[0]], GREEDY, use_tqdm=False)
        assert sum(encoded) == expected
    assert not runner.embeddings._computed


def test_preempted_prompts_with_images_go_on_as_before(seeing: Seeing, llm: LLM) -> None:
    prompts = [asked(f"{i}{PICTURE}", image=picture(131, 77, seed=i)) for i in range(4)]
    params = GREEDY.clone()
    params.max_tokens = 40
    expected = llm.generate(prompts, params, use_tqdm=False)
    small = seeing.llm(
        enforce_eager=True, num_kvcache_blocks=12, max_model_len=160,
        media_limits={"embedding_cache_bytes": 0},
    )  # fmt: skip
    try:
        found = small.generate(prompts, params, use_tqdm=False)
        preempted = next(one.value for one in small.get_metrics() if "preempt" in one.name)
    finally:
        small.close()
    assert preempted > 0
    assert [ids(one) for one in found] == [ids(one) for one in expected]


def test_chats_take_parts_of_all_forms(seeing: Seeing, llm: LLM) -> None:
    image, text = picture(60, 85), f"user: what is {PICTURE}?; assistant: "
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": image},
        {"type": "image_pil", "image_pil": image},
        {"type": "image_url", "image_url": {"url": data_url(image), "detail": "auto"}},
        {"type": "image_url", "image_url": data_url(image)},
    ]
    _, expected = seeing.expected(text, images=[image])
    for part in parts:
        content = [{"type": "text", "text": "what is "}, part, {"type": "text", "text": "?"}]
        (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert output.prompt == text
        assert ids(output) == expected


def test_chats_take_videos(seeing: Seeing, llm: LLM, without_torchvision: None) -> None:
    frames = [picture(70, 50, seed=i) for i in range(4)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "what?"}]
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
    text = f"user: {FILM}what?; assistant: "
    assert ids(output) == seeing.expected(text, videos=[frames])[1]


def test_local_files_are_read_below_the_allowed_folder(seeing: Seeing, tmp_path: Path) -> None:
    image = picture(60, 85)
    image.save(tmp_path / "a.png")
    text = f"see {PICTURE}"
    llm = seeing.llm(enforce_eager=True, allowed_local_media_path=str(tmp_path))
    try:
        paths = [str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()]
        prompts = [asked(text, image=one) for one in [image, *paths, "/etc/passwd"]]
        *found, refused = llm.generate(prompts, GREEDY, use_tqdm=False)
    finally:
        llm.close()
    assert ids(found[0]) == ids(found[1]) == ids(found[2])
    assert refused.outputs[0].finish_reason == "error"
    assert refused.error == "image 1: the path is not below allowed_local_media_path"


def test_token_ids_and_several_answers(seeing: Seeing, llm: LLM) -> None:
    """A prompt of token ids has one placeholder for each image. Its n answers share the image."""
    image, text = picture(60, 85), f"see {PICTURE}"
    prompt_ids, expected = seeing.expected(text, images=[image])
    short = seeing.case.theirs.tokenizer(text)["input_ids"]
    params = GREEDY.clone()
    params.n = 3
    prompt = {"prompt_token_ids": short, "multi_modal_data": {"image": image}}
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_token_ids == prompt_ids
    assert [one.token_ids for one in output.outputs] == [expected] * 3
    assert all(len(one.token_ids) == NUM_TOKENS for one in output.outputs)


def test_streams_and_engines_stepped_by_hand_take_images(seeing: Seeing, llm: LLM) -> None:
    image, text = picture(60, 85), f"see {PICTURE}"
    prompt_ids, expected = seeing.expected(text, images=[image])
    pieces = list(llm.stream([asked(text, image=image)], GREEDY))
    assert [i for piece in pieces for i in piece.token_ids] == expected
    llm.llm_engine.add_request("a", asked(text, image=image), GREEDY)
    outputs: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert outputs[-1].prompt_token_ids == prompt_ids
    assert ids(outputs[-1]) == expected


def test_verified_proposals_do_not_change_answers_to_images(seeing: Seeing) -> None:
    image, text = picture(60, 85), f"see {PICTURE}"
    _, expected = seeing.expected(text, images=[image])
    llm = seeing.llm(enforce_eager=True, draft_lengths=[2])
    proposed: list[list[int]] = []

    def propose(request: Any) -> list[int]:
        proposed.append(expected[len(request.output_ids) :][:1])
        return proposed[-1]

    llm.engine.propose = propose  # type: ignore[attr-defined]
    try:
        (output,) = llm.generate([asked(text, image=image)], GREEDY, use_tqdm=False)
    finally:
        llm.close()
    assert any(proposed)
    assert ids(output) == expected
