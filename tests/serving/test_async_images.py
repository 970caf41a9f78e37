"""Prompts with images through a client of the engine: prepared in its process, encoded once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.chat import ChatOptions, render
from nanovllm.engine.engine import Engine
from nanovllm.hub import SEEING
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.serving.async_engine import Draining, EngineDead, QueueFull
from nanovllm.serving.client import Client
from tests.engines import greedy
from tests.serving.pictures import SECRET, Held, about, corrupt, data_url
from tests.serving.served import serve

CONVERSATIONS: list[Any] = [
    about(data_url(1)),
    [{"role": "user", "content": "what is 3 + 4 ?"}],
    about(data_url(2, 96), data_url(3, 80)),
    about(data_url(4), text="what colour is it ?"),
    about(text="hello"),
]
PARAMS = greedy(8)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(
        SEEING, device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=4,
        max_num_batched_tokens=256, max_model_len=256, num_kvcache_blocks=65,
        limit_mm_per_prompt={"image": 3}, vision_patch_budgets=[256],
        media_limits={"num_media_workers": 1},
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def engine(llm: LLM) -> Engine:
    assert isinstance(llm.engine, Engine)
    llm.engine.forget_prefixes()
    return llm.engine


def prompt_of(client: Client, conversation: Any) -> Prompt:
    assert client.tokenizer is not None
    return render(client.tokenizer, conversation, ChatOptions(), client.check_media)[0]


async def asked(client: Client, prompt: Any, **options: Any) -> RequestOutput:
    found = [one async for one in client.generate(prompt, PARAMS.clone(), **options)]
    return found[-1]


async def together(client: Client, conversations: list[Any]) -> list[Any]:
    """The answers, or errors, of all conversations at once."""
    await client.ready()
    prompts = [prompt_of(client, one) for one in conversations]
    return await asyncio.gather(*(asked(client, one) for one in prompts), return_exceptions=True)


def encodings(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """Grows by the number of images that each call of the tower encodes."""
    found: list[int] = []
    encode = engine.runner.encode

    def counted(images: Any) -> Any:
        found.append(len(images))
        return encode(images)

    monkeypatch.setattr(engine.runner, "encode", counted)
    return found


def test_answers_about_several_pictures_are_those_of_llm(llm: LLM, engine: Engine) -> None:
    expected = llm.chat(CONVERSATIONS, PARAMS, use_tqdm=False)

    async def work(client: Client) -> list[RequestOutput]:
        return await together(client, CONVERSATIONS)

    found = serve(engine, work)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.prompt_token_ids for one in found] == [one.prompt_token_ids for one in expected]
    assert len({tuple(one.token_ids) for one in found}) > 2


def test_a_prompt_may_have_multi_modal_data(llm: LLM, engine: Engine) -> None:
    prompt = {"prompt": PICTURE + "what is this ?", "multi_modal_data": {"image": data_url(5)}}
    (expected,) = llm.generate([prompt], PARAMS, use_tqdm=False)  # type: ignore[list-item]

    async def work(client: Client) -> RequestOutput:
        return await asked(client, prompt)

    assert serve(engine, work).token_ids == expected.token_ids


def test_one_picture_can_be_twice_in_a_prompt(llm: LLM, engine: Engine) -> None:
    """The second prompt has both from the cache."""
    conversation = about(data_url(51), data_url(51))
    (expected,) = llm.chat([conversation], PARAMS, use_tqdm=False)

    async def work(client: Client) -> list[RequestOutput]:
        await client.ready()
        return [await asked(client, prompt_of(client, conversation)) for _ in range(2)]

    for found in serve(engine, work):
        assert found.token_ids == expected.token_ids


BAD: dict[str, tuple[Any, str]] = {
    "corrupt": (about(data_url(1), corrupt()), r"^image 2: .*"),
    "forbidden": (
        about(SECRET),
        "^image 1: remote URLs are refused: allowed_media_domains is empty$",
    ),
    "local": (about("/etc/passwd"), "^image 1: .*allowed_local_media_path"),
    "too long": (about(data_url(1), text="a " * 300), "the prompt has .* at most 255 fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_ends_its_own_request_alone(name: str, llm: LLM, engine: Engine) -> None:
    bad, words = BAD[name]
    (expected,) = llm.chat(CONVERSATIONS[:1], PARAMS, use_tqdm=False)

    async def work(client: Client) -> list[Any]:
        found = await together(client, [bad, CONVERSATIONS[0], bad])
        assert client._quota.num_all == 0
        return found

    first, good, second = serve(engine, work)
    assert good.token_ids == expected.token_ids
    for error in (first, second):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=words):
            raise error
        assert "secret" not in str(error) and "passwd" not in str(error)


def test_too_many_images_and_missing_placeholders_are_refused(engine: Engine) -> None:
    async def work(client: Client) -> None:
        await client.ready()
        with pytest.raises(ValueError, match="has 4 images: at most 3 are allowed"):
            prompt_of(client, about(*map(data_url, range(4))))
        prompt = {"prompt": "a", "multi_modal_data": {"image": data_url(1)}}
        with pytest.raises(ValueError, match="has 0 placeholders for images, but 1 images"):
            await asked(client, prompt)
        with pytest.raises(ValueError, match="cannot be truncated"):
            await client.open(prompt, greedy(1, truncate_prompt_tokens=4))
        with pytest.raises(ValueError, match="has no audio encoder"):
            await asked(client, {"prompt": "a", "multi_modal_data": {"audio": "data:,a"}})
        assert client._quota.num_all == 0

    serve(engine, work)


def test_the_event_loop_goes_on_while_images_are_prepared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def work(client: Client) -> RequestOutput:
        await client.ready()
        task = asyncio.ensure_future(asked(client, prompt_of(client, CONVERSATIONS[0])))
        await asyncio.to_thread(held.has_begun.wait, 30)
        assert (await asked(client, "hello")).finished, "text does not wait for images"
        assert not task.done()
        held.may_go_on.set()
        return await task

    assert serve(engine, work).finished


def test_cancelling_ends_the_preparation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    encoded = encodings(monkeypatch, engine)

    async def work(client: Client) -> None:
        await client.ready()
        prompt = prompt_of(client, about(data_url(11), data_url(12), data_url(13)))
        task = asyncio.ensure_future(asked(client, prompt))
        await asyncio.to_thread(held.has_begun.wait, 30)
        assert client._quota.num_all == 1, "an image in preparation counts"
        task.cancel()
        await asyncio.wait([task])
        held.may_go_on.set()
        assert task.cancelled() and client._quota.num_all == 0
        assert (await asked(client, "hello")).finished
        assert held.num_begun == 1, "there is one thread: the other images never begin"

    serve(engine, work)
    assert encoded == []


def test_images_that_wait_count_towards_the_queue(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)

    async def work(client: Client) -> list[RequestOutput]:
        await client.ready()
        prompt = prompt_of(client, CONVERSATIONS[0])
        tasks = [asyncio.ensure_future(asked(client, prompt)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(held.has_begun.wait, 30)
        with pytest.raises(QueueFull, match="at most 5 may"):
            await client.open("hello", greedy(1))
        held.may_go_on.set()
        return await asyncio.gather(*tasks)

    assert len({tuple(one.token_ids) for one in serve(engine, work, max_queued=1)}) == 1


def test_images_that_wait_are_bounded_in_bytes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    goes_on, advance = threading.Event(), engine.advance
    goes_on.set()

    def advance_later() -> Any:
        assert goes_on.wait(60)
        return advance()

    monkeypatch.setattr(engine, "advance", advance_later)

    async def work(client: Client) -> None:
        await client.ready()
        seeing = client._encoder._seeing
        assert seeing is not None
        seeing.gate.max_held = len(data_url(21))  # fewer than the bytes of its patches
        prompts = [prompt_of(client, about(data_url(i))) for i in (21, 22)]
        first = asyncio.ensure_future(asked(client, prompts[0]))
        await asyncio.to_thread(held.has_begun.wait, 30)
        with pytest.raises(QueueFull, match=r"waiting images have .* the limit is"):
            await client.open(prompts[1], greedy(1))
        held.may_go_on.set()
        await first
        goes_on.clear()  # so that the answer does not end
        stream = await client.open(prompts[0], greedy(200))
        held.has_begun.clear()
        second = asyncio.ensure_future(asked(client, prompts[1]))
        await asyncio.sleep(0.05)
        assert not held.has_begun.is_set(), "the patches of the first one are still held"
        goes_on.set()
        stream.abort()
        assert (await second).finished and seeing.gate.num_held == seeing.num_given == 0

    serve(engine, work)


@pytest.mark.parametrize("how", ["close", "drain"])
def test_the_end_of_a_client_ends_preparations(
    how: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are running, and the third waits for them."""
    held = Held(monkeypatch)

    async def work(client: Client) -> list[type]:
        await client.ready()
        prompts = [prompt_of(client, about(data_url(i))) for i in (51, 52, 53)]
        tasks = [asyncio.ensure_future(asked(client, prompt)) for prompt in prompts]
        await asyncio.to_thread(held.has_begun.wait, 30)
        ending = asyncio.ensure_future(client.close() if how == "close" else client.drain())
        await asyncio.sleep(0.01)
        held.may_go_on.set()
        await ending
        await asyncio.wait(tasks)
        return [type(task.exception()) for task in tasks]

    assert serve(engine, work) == [EngineDead if how == "close" else Draining] * 3


def test_an_image_is_encoded_once_for_several_answers_and_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encodings(monkeypatch, engine)

    async def work(client: Client) -> list[Any]:
        await client.ready()
        prompt = prompt_of(client, about(data_url(31)))
        stream = await client.open(prompt, greedy(4, n=3))
        parts = [part async for part in stream]
        assert {part.output_index for part in parts} == {0, 1, 2}
        return await together(client, [about(data_url(31), text="how many ?")] * 2)

    assert all(one.finished for one in serve(engine, work))
    assert sum(encoded) == 1


def test_prompts_with_images_and_other_salts_share_no_cache(engine: Engine) -> None:
    text = PICTURE + "what is this ?" * 4

    async def work(client: Client) -> list[int]:
        data = {"prompt": text, "multi_modal_data": {"image": data_url(41)}}
        salted = [{**data, "cache_salt": salt} for salt in ("a", "a", "b")]
        return [(await asked(client, one)).num_cached_tokens or 0 for one in salted]

    first, second, other = serve(engine, work)
    assert (first, other) == (0, 0) and second > 0
