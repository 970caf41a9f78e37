"""The official client against the server: every endpoint, sync, async and streamed; errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import MODEL, PLAIN_TEMPLATE, MockServer, served, tokenizer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
KEY = "a-key"


@pytest.fixture(scope="module")
def server() -> Iterator[MockServer]:
    with served(api_key=["another", KEY]) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: MockServer) -> Iterator[openai.OpenAI]:
    with server.client(api_key=KEY) as one:
        yield one


def made_up(seed: int, num: int) -> str:
    """The text that the engine makes for a seed."""
    return "".join(tokenizer().decode([one]) for one in range(seed, seed + num))


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_completion_has_the_text_of_its_tokens_and_counts_them(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="hello", seed=3, max_tokens=19)
    assert done.choices[0].text == made_up(3, 19)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    num_prompt = len(tokenizer().encode("hello"))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (num_prompt, 19)


def test_openai_s_default_of_16_tokens_holds_for_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="hello")
    assert done.usage is not None and done.usage.completion_tokens == 16


def test_a_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "prompt": "hello", "seed": 9, "max_tokens": 19, "n": 2}
    whole = client.completions.create(**asked)
    texts, usages = ["", ""], []
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usages.append(chunk.usage)
    assert texts == [choice.text for choice in whole.choices]
    assert usages[-1] == whole.usage and not any(usages[:-1])


def test_a_chat_stream_has_the_text_and_the_usage_of_the_whole_answer(
    client: openai.OpenAI,
) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "seed": 70, "max_tokens": 19, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, roles, reasons, usage = ["", ""], [], [], None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append(choice.delta.role)
            reasons.append(choice.finish_reason)
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles.count("assistant") == 2 and reasons.count("length") == 2
    assert usage == whole.usage


def test_continuous_usage_counts_up_in_every_part(client: openai.OpenAI) -> None:
    options: Any = {"continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == [1, 2, 3, 4, 5, 5]


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model=MODEL, prompt=["one", "two words", "three"], echo=True, max_tokens=3, n=2
    )
    starts = ["one", "one", "two words", "two words", "three", "three"]
    assert [choice.index for choice in done.choices] == list(range(6))
    assert all(one.text.startswith(text) for one, text in zip(done.choices, starts))
    texts = [""] * 6
    for chunk in client.completions.create(
        model=MODEL, prompt=["one", "two words", "three"], echo=True, max_tokens=3, n=2, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(text.startswith(start) and len(text) > len(start)
               for text, start in zip(texts, starts))  # fmt: skip


def test_a_prompt_of_token_ids_is_that_of_its_text(client: openai.OpenAI) -> None:
    ids = tokenizer().encode("hello there")
    done = client.completions.create(
        model=MODEL, prompt=ids, echo=True, max_tokens=1, seed=5,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert done.choices[0].text == "hello there" + made_up(5, 1)
    extra = done.choices[0].model_extra
    assert extra is not None
    assert extra["prompt_token_ids"] == ids and extra["token_ids"] == [5]


def test_an_echoed_token_id_that_no_tokenizer_can_read_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        client.completions.create(model=MODEL, prompt=[10**11], echo=True, max_tokens=1)


def test_echo_with_no_tokens_gives_the_prompt_and_its_logprobs(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model=MODEL, prompt="hello there", echo=True, max_tokens=0, logprobs=2
    )
    choice = done.choices[0]
    assert choice.text == "hello there" and choice.logprobs is not None
    assert choice.logprobs.tokens is not None and choice.logprobs.token_logprobs is not None
    assert "".join(choice.logprobs.tokens) == "hello there"
    assert choice.logprobs.token_logprobs[0] is None
    assert done.usage is not None and done.usage.completion_tokens == 0


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize(("num_words", "most"), [(9, 2), (1, 99), (5000, -1)])
def test_echo_gives_what_is_left_of_a_truncated_prompt(
    client: openai.OpenAI, is_text: bool, num_words: int, most: int
) -> None:
    prompt = "hello " * num_words
    token_ids = tokenizer().encode(prompt)
    kept = token_ids[-most if most > 0 else -4095 :]
    done = client.completions.create(
        model=MODEL, prompt=prompt if is_text else token_ids, max_tokens=1, seed=65, echo=True,
        logprobs=0, extra_body={"truncate_prompt_tokens": most},
    )  # fmt: skip
    (choice,) = done.choices
    assert choice.text == tokenizer().decode(kept) + made_up(65, 1)
    assert choice.logprobs is not None and "".join(choice.logprobs.tokens or []) == choice.text
    assert done.usage is not None and done.usage.prompt_tokens == len(kept)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_the_tokens_and_the_likeliest(
    client: openai.OpenAI, stream: bool
) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "seed": 70, "max_tokens": 5}
    asked |= {"logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        content = [one for c in chunks for one in c.choices[0].logprobs.content or []]  # type: ignore[union-attr]
    else:
        found = client.chat.completions.create(**asked).choices[0].logprobs
        assert found is not None
        content = list(found.content or [])
    assert "".join(one.token for one in content) == made_up(70, 5)
    assert all(bytes(one.bytes or []).decode() == one.token for one in content)
    assert all(len(one.top_logprobs) == 3 for one in content)
    assert all(one.top_logprobs[0].token == one.token for one in content)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_tell_where_tokens_are(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": MODEL, "prompt": "a", "seed": 70, "max_tokens": 5, "logprobs": 1}
    if stream:
        choices = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
    else:
        choices = client.completions.create(**asked).choices
    text = made_up(70, 5)
    offsets = [one for c in choices for one in c.logprobs.text_offset or []]  # type: ignore[union-attr]
    tokens = [one for c in choices for one in c.logprobs.tokens or []]  # type: ignore[union-attr]
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens)] == tokens
    assert "".join(tokens) == text


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    stop = made_up(73, 2)
    done = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=70, stop=[stop, "x"])
    choice = done.choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == made_up(70, 3)
    assert (choice.model_extra or {})["stop_reason"] == stop


def test_prompt_logprobs_have_one_entry_for_each_token(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    assert done.usage is not None
    found = (done.model_extra or {})["prompt_logprobs"]
    assert len(found) == done.usage.prompt_tokens and found[0] is None


@pytest.mark.parametrize("echo", [False, True])
def test_each_answer_repeats_the_log_probabilities_of_its_prompt(
    client: openai.OpenAI, echo: bool
) -> None:
    asked: Any = {"echo": True, "logprobs": 1} if echo else {"extra_body": {"prompt_logprobs": 1}}
    done = client.completions.create(
        model=MODEL, prompt=["one", "two words"], max_tokens=1, n=3, **asked
    )
    if echo:
        found = [one.logprobs.tokens for one in done.choices]  # type: ignore[union-attr]
        texts = ["".join(one or []) for one in found]
        assert [text == one.text for text, one in zip(texts, done.choices)] == [True] * 6
    else:
        positions = [(one.model_extra or {})["prompt_logprobs"] for one in done.choices]
        for group, text in ((positions[:3], "one"), (positions[3:], "two words")):
            assert group[0] == group[1] == group[2] and group[0][0] is None
            assert len(group[0]) == len(tokenizer().encode(text))


def test_a_response_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="Hi", max_output_tokens=7)
    assert whole.status == "incomplete" and whole.usage is not None
    assert whole.usage.output_tokens == 7 and whole.output_text
    asked: Any = {"model": MODEL, "input": "Hi", "max_output_tokens": 7, "stream": True}
    events = list(client.responses.create(**asked))
    last = events[-1]
    assert last.type == "response.incomplete"
    deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
    assert "".join(deltas) == last.response.output_text
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert last.response.usage == whole.usage


def test_a_response_reads_instructions_and_messages(client: openai.OpenAI) -> None:
    given: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    found = client.responses.create(
        model=MODEL, instructions="Be brief.", input=given, max_output_tokens=1
    )
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert found.usage is not None and chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens


def test_tokens_of_texts_and_conversations_come_back_as_text(server: MockServer) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        found = http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
        assert found["tokens"] == tokenizer().encode("hello") and found["count"] == 1
        assert found["token_strs"] == ["hello"]
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert "Be brief." in text and text.count("Hi") == 1


def test_the_small_endpoints_answer(server: MockServer) -> None:
    from nanovllm import __version__

    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        assert (
            http.get("/health", timeout=60).status_code
            == http.get("/ready", timeout=60).status_code
            == 200
        )
        assert http.get("/version").json() == {"version": __version__}
        assert "vllm:num_requests_running" in http.get("/metrics").text
        assert http.get("/").headers["content-type"].startswith("text/html")
        assert http.head("/health", timeout=60).status_code == 200


def test_async_requests_run_at_the_same_time(server: MockServer) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, seed=seed, max_tokens=5, stream=True
        )
        return "".join([one.choices[0].delta.content or "" async for one in stream])

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            return await asyncio.gather(*[ask(client, seed) for seed in range(60, 79)])

    assert asyncio.run(work()) == [made_up(seed, 5) for seed in range(60, 79)]


ERRORS: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "gpt-5"}, openai.NotFoundError, "model"),
    ({"top_p": 3.0}, openai.BadRequestError, "top_p"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"n": 10**6}, openai.BadRequestError, "n"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, openai.BadRequestError, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages[0].content"),
    ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
    ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "tempreature"),
    ({"extra_body": {"prompt_logprobs": -1}}, openai.BadRequestError, "prompt_logprobs"),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), ERRORS, ids=[str(one[0]) for one in ERRORS])
def test_a_refused_field_is_named(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, **fields}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == param and type(caught.value) is kind


def test_a_wrong_key_is_an_authentication_error(server: MockServer) -> None:
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_body_that_is_too_long_gets_413(server: MockServer) -> None:
    with served(max_body_bytes=1000) as small, small.client() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="x" * 1000)
        assert caught.value.status_code == 413
        client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=1)


def test_embeddings_say_that_the_model_has_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="generates text, not embeddings"):
        client.embeddings.create(model=MODEL, input="hello")


def test_a_full_queue_is_a_rate_limit_error() -> None:
    slow = MockOptions(tokens_per_s=20, max_num_seqs=1, max_queue_len=1)
    with served(slow) as server, server.client() as client:
        streams = [
            client.completions.create(model=MODEL, prompt="a", max_tokens=500, stream=True)
            for _ in range(2)
        ]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.response.headers["retry-after"]
        for stream in streams:
            stream.close()


def test_while_draining_new_requests_get_503_and_running_ones_finish() -> None:
    options = MockOptions(tokens_per_s=10)
    with served(options) as server, server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=999, stream=True)
        parts = [next(iter(stream))]
        server.stop()
        status = 200
        while status == 200:
            status = httpx.get(f"{server.url}/ready", timeout=60).status_code
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == status == 503
        assert caught.value.response.headers["retry-after"]
        object.__setattr__(options, "tokens_per_s", 1e6)  # what is to be seen meanwhile was seen
        parts += list(stream)
        assert parts[-1].choices[0].finish_reason == "length"
        assert server.join() == 0


def test_an_engine_that_fails_is_told_to_clients_and_ends_the_server() -> None:
    server = MockServer(MockOptions(tokens_per_s=100))
    server.start()
    with server.client() as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=999, stream=True)
        next(iter(stream))
        server.engine.fail("the device is gone: /secret/path")
        with pytest.raises(openai.APIError, match="the engine has failed") as caught:
            list(stream)
        assert "secret" not in str(caught.value)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 503
    assert server.join() == 1


def test_an_error_in_the_stream_of_a_response_is_an_event_of_its_api() -> None:
    server = MockServer(MockOptions(tokens_per_s=100))
    server.start()
    with server.client() as client:
        stream = client.responses.create(model=MODEL, input="a", stream=True)
        events = [next(iter(stream))]
        server.engine.fail("the device is gone")
        events += list(stream)
    error = events[-1]
    assert error.type == "error"
    assert (error.code, error.message) == ("engine_dead", "the engine has failed")
    assert error.param is None and error.sequence_number == len(events) - 1
    assert server.join() == 1


def test_tools_with_a_parser_that_is_not_there_are_refused() -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with (
        served(template=PLAIN_TEMPLATE) as plain,
        plain.client() as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=tools)
    assert caught.value.param == "tools"


def test_openapi_describes_every_field(server: MockServer) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    document = httpx.get(f"{server.url}/openapi.json", headers=headers, timeout=60).json()
    chat = document["components"]["schemas"]["ChatBody"]
    assert {"messages", "temperature", "tools", "min_p"} <= chat["properties"].keys()
    assert json.dumps(document).count("#/components/schemas/ChatBody") == 1
