"""Images through the HTTP server: OpenAI's forms and the page's, errors, limits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanovllm import LLM
from nanovllm.hub import SEEING
from nanovllm.media import decoders
from tests.api.engine_server import ASKED, CHAT, MAX_BODY_BYTES, RESPONSES, Served, through_http
from tests.engines import greedy
from tests.serving.pictures import SECRET, Held, about, corrupt, data_url


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(
        SEEING, device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=4,
        max_num_batched_tokens=256, max_model_len=256, num_kvcache_blocks=65,
        limit_mm_per_prompt={"image": 3}, vision_patch_budgets=[256],
    )  # fmt: skip
    yield made
    made.close()


def test_answers_about_pictures_are_those_of_llm(llm: LLM) -> None:
    """Several at once, mixed with text; streamed, and as responses."""
    conversations: list[Any] = [
        about(data_url(1)),
        about(data_url(2, 96), data_url(3), text="what is left ?"),
        [{"role": "user", "content": "hello"}],
    ]
    expected = [one.text for one in llm.chat(conversations, greedy(8), use_tqdm=False)]

    async def work(served: Served) -> None:
        assert await asyncio.gather(*map(served.text, conversations)) == expected
        streamed = await served.openai.chat.completions.create(
            messages=conversations[0], stream=True, max_tokens=8,
            extra_body={"ignore_eos": True}, **ASKED,
        )  # fmt: skip
        parts = [chunk.choices[0].delta.content or "" async for chunk in streamed if chunk.choices]
        assert "".join(parts) == expected[0]
        content = [
            {"type": "input_image", "image_url": data_url(1), "detail": "auto"},
            {"type": "input_text", "text": "what is this ?"},
        ]
        given: Any = [{"role": "user", "content": content}]
        response = await served.openai.responses.create(input=given, max_output_tokens=64, **ASKED)
        assert response.usage is not None
        done = await served.openai.chat.completions.create(
            messages=conversations[0], max_tokens=64, **ASKED
        )
        assert response.output_text == done.choices[0].message.content
        assert done.usage is not None
        assert response.usage.input_tokens == done.usage.prompt_tokens > 16

    through_http(llm, work)


BAD: dict[str, tuple[Any, str]] = {
    "corrupt": (data_url(1)[:90], "image 1: "),
    "no picture": ("data:image/png;base64,aGVsbG8=", "image 1: "),
    "no base64": ("data:image/png;base64,%%", "image 1: "),
    "cut": (corrupt(), "image 1: "),
    "forbidden": (SECRET, "image 1: remote URLs are refused: allowed_media_domains is empty"),
    "local": ("file:///etc/passwd", "image 1: "),
}


def test_pictures_of_anthropic_s_messages_are_those_of_chat(llm: LLM) -> None:
    """Also those that a tool gives."""
    url = data_url(1)
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    picture = {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [picture]}

    async def work(served: Served) -> None:
        async def answer(content: list[Any]) -> Any:
            asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 64}
            return (await served.http.post("/v1/messages", json={**ASKED, **asked})).json()

        def num_read(done: Any) -> int:
            return int(done["usage"]["input_tokens"] + done["usage"]["cache_read_input_tokens"])

        done = await answer([picture, {"type": "text", "text": "what is this ?"}])
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what is this ?"},
        ]
        chat = await served.openai.chat.completions.create(
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=64, **ASKED,
        )  # fmt: skip
        assert "".join(one["text"] for one in done["content"]) == chat.choices[0].message.content
        assert chat.usage is not None and num_read(done) == chat.usage.prompt_tokens > 16
        assert num_read(await answer([result])) > 16

    through_http(llm, work)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_bad_images_are_400_and_leave_others_unharmed(path: str, llm: LLM) -> None:
    good = about(data_url(1))
    (expected,) = llm.chat(good, greedy(8), use_tqdm=False)

    def body(url: str) -> dict[str, Any]:
        if path == CHAT:
            return {"messages": about(url), "stream": True}
        content = [{"type": "input_image", "image_url": url}]
        return {"input": [{"role": "user", "content": content}], "stream": True}

    async def work(served: Served) -> None:
        asked = [served.refusal(path, body(url)) for url, _ in BAD.values()]
        text, *errors = await asyncio.gather(served.text(good), *asked)
        assert text == expected.text
        for (_, words), (status, error) in zip(BAD.values(), errors, strict=True):
            assert status == 400 and error["message"].startswith(words), error
            assert error["param"] == ("messages" if path == CHAT else "input")
            assert not any(one in error["message"] for one in ("secret", "example", "passwd"))

    through_http(llm, work)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_decoder_that_is_killed_while_it_starts_is_503(
    path: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault of the request, which succeeds later."""
    dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    pipe, started = subprocess.PIPE, []

    def start(shared: int) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(dies, stdin=pipe, stdout=pipe, bufsize=0))
        return started[-1]

    content = [{"type": "input_image", "image_url": data_url(1)}]
    body: dict[str, Any] = {"messages": about(data_url(1)), "stream": True}
    if path == RESPONSES:
        body = {"input": [{"role": "user", "content": content}]}

    async def work(served: Served) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(decoders, "start", start)
            status, error = await served.refusal(path, body)
        assert (status, error["code"], error["param"]) == (503, "unavailable", None)
        assert error["message"] == "image 1: the process that decodes it does not start"
        assert len(started) == 2
        assert (await served.http.post(path, json={**ASKED, **body})).status_code == 200

    through_http(llm, work)


def test_too_many_pictures_and_other_media_are_400(llm: LLM) -> None:
    async def work(served: Served) -> None:
        four = {"messages": about(*[data_url(1, 16)] * 4)}
        status, error = await served.refusal(CHAT, four)
        assert (status, error["param"]) == (400, "messages")
        assert error["message"] == "the prompt has 4 images: at most 3 are allowed"
        sound = {"type": "input_audio", "input_audio": {"data": "aaaa", "format": "wav"}}
        messages = [{"role": "user", "content": [sound]}]
        status, error = await served.refusal(CHAT, {"messages": messages})
        assert (status, error["param"]) == (400, "messages")
        assert "has no audio encoder" in error["message"] and "/" not in error["message"]

    through_http(llm, work)


def test_a_body_above_the_limit_is_413(llm: LLM) -> None:
    async def work(served: Served) -> None:
        long = "data:image/png;base64," + "a" * MAX_BODY_BYTES
        with pytest.raises(openai.APIStatusError) as found:
            await served.text(about(long))
        assert found.value.status_code == 413
        assert f"longer than {MAX_BODY_BYTES} bytes" in found.value.message

    through_http(llm, work)


def test_the_page_learns_that_the_model_sees(llm: LLM) -> None:
    """What the page's `model` reads; and a message as its `content` writes it, images first."""

    async def work(served: Served) -> None:
        card, _ = (await served.http.get("/v1/models")).json()["data"]
        assert card["input_modalities"] == ["text", "image", "video"]
        body = {"messages": about(data_url(1)), "stream": True, "max_tokens": 4}
        answer = await served.http.post(
            CHAT, json={**body, "stream_options": {"include_usage": True}}
        )
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")

    through_http(llm, work)


def test_a_client_that_leaves_ends_the_preparation(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def work(served: Served) -> None:
        body = {"messages": about(data_url(7), data_url(8), data_url(9))}
        asking = asyncio.create_task(served.http.post(CHAT, json={**ASKED, **body}))
        await asyncio.to_thread(held.has_begun.wait, 30)
        quota = served.engine._quota
        assert quota.num_all == 1
        asking.cancel()
        while quota.num_all:
            await asyncio.sleep(0.01)
        held.may_go_on.set()
        assert await served.text([{"role": "user", "content": "hello"}])

    through_http(llm, work)
