"""Videos and sound through the HTTP server, in OpenAI's and vLLM's forms: tokens, errors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM
from nanovllm.serving.async_llm import AsyncLLM
from tests.api.engine_server import (
    ASKED,
    CHAT,
    RESPONSES,
    Served,
    Work,
    serve_and_work,
    through_http,
)
from tests.engine import seeing
from tests.engines import greedy
from tests.media.sound_cases import sound_file
from tests.media.test_media_clips import video_file
from tests.models import omni_cases
from tests.models.omni_cases import clip, wav
from tests.serving.pictures import data_url
from tests.serving.served import run

NUM_TOKENS = 6
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4,
    "max_num_batched_tokens": 256, "kvcache_block_size": 16,
}  # fmt: skip
TEXT = {"type": "text", "text": "what is it?"}


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def film(num_frames: int = 5, kind: str = "mp4") -> dict[str, Any]:
    """vLLM's form of a video."""
    return film_url(f"data:video/{kind};base64,{base64_of(video_file(kind, num_frames))}")


def film_url(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def sound(num_samples: int = 3210, rate: int = omni_cases.RATE, **changes: str) -> dict[str, Any]:
    """OpenAI's form of sound."""
    data = {"data": base64_of(wav(clip(num_samples), rate)), "format": "wav"}
    return {"type": "input_audio", "input_audio": {**data, **changes}}


def mp3(num_samples: int = 9876, rate: int = 44_100) -> dict[str, Any]:
    data = sound_file("mp3", "libmp3lame", np.stack([clip(num_samples)] * 2), rate)
    return sound(data=base64_of(data), format="mp3")


def clip_url(num_samples: int = 3210) -> dict[str, Any]:
    """vLLM's form of sound."""
    return sound_url(f"data:audio/wav;base64,{base64_of(wav(clip(num_samples)))}")


def sound_url(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def user(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": [*parts, TEXT]}]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The thinker of Qwen2.5-Omni."""
    folder = tmp_path_factory.mktemp("omni")
    omni_cases.save(folder)
    omni_cases.save_processor(folder)
    made = LLM(str(folder), max_model_len=600, **OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module", params=seeing.MODELS)
def watching(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """Qwen2.5-VL and Qwen3-VL."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    seeing.make(request.param, folder)
    made = LLM(str(folder), max_model_len=512, vision_patch_budgets=[64, 1024], **OPTIONS)
    yield made
    made.close()


def same_tokens(llm: LLM, conversations: list[Any]) -> Work[None]:
    """Asks a server: whole answers at once, and streamed ones, have the tokens that LLM gives."""
    expected = llm.chat(conversations, greedy(NUM_TOKENS), use_tqdm=False)
    assert len({tuple(one.outputs[0].token_ids) for one in expected}) > 1

    async def work(served: Served) -> None:
        asked = [served.token_ids(one, NUM_TOKENS) for one in conversations]
        found = await asyncio.gather(*asked)
        for output, (prompt_ids, token_ids) in zip(expected, found, strict=True):
            assert prompt_ids == output.prompt_token_ids
            assert token_ids == list(output.outputs[0].token_ids)
        for one, output in zip(conversations, expected):
            extra = {"ignore_eos": True}
            stream = await served.openai.chat.completions.create(
                messages=one, max_tokens=NUM_TOKENS, stream=True, extra_body=extra, **ASKED
            )
            parts = [part.choices[0].delta.content or "" async for part in stream if part.choices]
            assert "".join(parts) == output.outputs[0].text

    return work


def test_sound_in_all_forms_gives_the_tokens_of_llm(hearing: LLM) -> None:
    conversations = [
        user(sound()),
        user(clip_url()),
        user(sound(5003), clip_url(400)),
        user(sound(rate=8000), mp3()),
        [{"role": "user", "content": "hello"}],
    ]
    through_http(hearing, same_tokens(hearing, conversations))


def test_sound_beside_pictures_and_videos_gives_the_tokens_of_llm(hearing: LLM) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(1)}}
    conversations = [user(film(), sound()), user(sound(), picture, film(2, "webm"))]
    through_http(hearing, same_tokens(hearing, conversations))


def test_replicas_hear_and_see_what_the_server_has_prepared(hearing: LLM) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(1)}}
    work = same_tokens(hearing, [user(film(), sound()), user(picture), user(sound(5003))])

    async def serve_replicas() -> None:
        folder = hearing.engine.config.model
        async with AsyncLLM(folder, max_model_len=600, data_parallel_size=2, **OPTIONS) as replicas:
            await serve_and_work(work, replicas)

    run(serve_replicas())


def test_videos_give_the_tokens_of_llm(watching: LLM) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(1)}}
    conversations = [user(film()), user(film(2, "webm"), picture), user(film(3), film(4))]
    through_http(watching, same_tokens(watching, conversations))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another format": (sound(format="midi"), "audio 1 has the format 'midi': use one of wav, mp3"),
    "no format": ({"type": "input_audio", "input_audio": {"data": ""}}, "audio 1 must have the"),
    "no base64": (sound(data="%%"), "audio 1: "),
    "no sound": (sound(data=base64_of(b"ID3" + bytes(99))), "audio 1: "),
    "cut": (sound(data=base64_of(wav(clip(999))[:500])), "audio 1: "),
    "a strange rate": (sound(rate=500), "audio 1: its sampling rate is 500 Hz: it must be"),
    "too short": (sound(99), "audio 1: "),
    "remote sound": (sound_url("https://sound.example.com/x.wav"), "audio 1: remote URLs are"),
    "local sound": (sound_url("file:///etc/passwd"), "audio 1: "),
    "empty": ({"type": "audio_url"}, "audio 1 is empty: its part has no 'audio_url'"),
    "no video": (film_url("data:video/mp4;base64,aGVsbG8="), "video 1: "),
    "remote video": (film_url("https://films.example.com/x.mp4"), "video 1: remote URLs are"),
    "an unknown type": ({"type": "input_video", "input_video": "x"}, "messages[0].content[0].type"),
    "sound of a video": (
        {**film(2), "use_audio_in_video": True}, "video 1 has the option 'use_audio_in_video'",
    ),
}  # fmt: skip


def test_what_cannot_be_read_is_400_with_the_name_of_the_part(hearing: LLM) -> None:
    (expected,) = hearing.chat(user(sound()), greedy(8), use_tqdm=False)

    async def work(served: Served) -> None:
        asked = [
            served.refusal(CHAT, {"messages": user(part), "stream": True})
            for part, _ in BAD.values()
        ]
        text, *errors = await asyncio.gather(served.text(user(sound())), *asked)
        assert text == expected.outputs[0].text, "others are not harmed"
        for (name, (_, words)), (status, error) in zip(BAD.items(), errors, strict=True):
            assert status == 400 and error["message"].startswith(words), (name, error)
            place = words if name == "an unknown type" else "messages"
            assert error["param"] == place, name
            assert not any(one in error["message"] for one in ("example", "passwd")), name

    through_http(hearing, work)


def test_more_than_the_limits_allow_is_400(hearing: LLM) -> None:
    for num, part, words in (
        (9, sound(400), "the prompt has 9 audios: at most 8 are allowed"),
        (3, film(2), "the prompt has 3 videos: at most 2 are allowed"),
    ):
        messages = user(*[part] * num)

        async def work(served: Served, messages: Any = messages, words: str = words) -> None:
            status, error = await served.refusal(CHAT, {"messages": messages})
            assert (status, error["param"], error["message"]) == (400, "messages", words)

        through_http(hearing, work)


@pytest.mark.parametrize("kind", ["input_audio", "input_video", "input_file", "audio_url"])
def test_responses_refuse_parts_that_are_no_pictures_by_their_place(
    hearing: LLM, kind: str
) -> None:
    async def work(served: Served) -> None:
        content = [{"type": "input_text", "text": "hi"}, {"type": kind, kind: "x"}]
        status, error = await served.refusal(
            RESPONSES, {"input": [{"role": "user", "content": content}]}
        )
        assert status == 400 and error["param"] == "input[0].content[1]", error
        assert "must be of the type input_text, output_text or input_image" in error["message"]

    through_http(hearing, work)


def test_the_card_of_the_model_says_that_it_hears(hearing: LLM) -> None:
    async def work(served: Served) -> None:
        card, _ = (await served.http.get("/v1/models")).json()["data"]
        assert card["input_modalities"] == ["text", "image", "video", "audio"]

    through_http(hearing, work)
