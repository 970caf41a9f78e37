"""Clients of an engine: the answers of `LLM`, many tasks at once, aborts, limits, draining."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.engine.request import EngineRequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling import RequestOutputKind
from nanovllm.serving import answer as answer_of
from nanovllm.serving import stream as stream_of
from nanovllm.serving.async_engine import Delta, Draining, QueueFull
from nanovllm.serving.client import Client
from nanovllm.tokenizer import LONG_TEXT
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts, save_tokenizer
from tests.serving.served import LOOPS, serve

Kind = RequestOutputKind
PROMPTS: list[Any] = [*random_prompts([1, 19, 70, 33]), "the theory of ink", "an answer"]
ENDLESS = greedy(400)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    made = LLM(
        str(folder), device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=4,
        max_num_batched_tokens=64, max_model_len=512, kvcache_block_size=16,
        num_kvcache_blocks=129,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def engine(llm: LLM) -> Engine:
    assert isinstance(llm.engine, Engine)
    return llm.engine


async def answers(
    client: Client, prompts: list[Any], params: SamplingParams, priority: int = 0
) -> list[list[RequestOutput]]:
    """All outputs of each prompt. The prompts are queued in their order and run together."""

    async def one(prompt: Any, name: str) -> list[RequestOutput]:
        found = client.generate(prompt, params, name, priority=priority)
        return [output async for output in found]

    return await asyncio.gather(*(one(prompt, f"r{i}") for i, prompt in enumerate(prompts)))


async def running(client: Client) -> float:
    """The requests that run or wait in the engine."""
    names = ("nanovllm:num_requests_running", "nanovllm:num_requests_waiting")
    return sum(one.value for one in await client.metrics() if one.name in names)


async def until_idle(client: Client) -> None:
    while await running(client):
        await asyncio.sleep(0.01)


def ends(engine: Engine) -> dict[str, float]:
    """How many requests have ended, by their reasons."""
    found = (one for one in engine.metrics.read() if one.name == "nanovllm:request_success")
    return {one.labels["finished_reason"]: one.value for one in found}


async def collected(stream: Any) -> list[Delta]:
    return [part async for part in stream]


def comparable(output: RequestOutput) -> dict[str, Any]:
    """All but what depends on the order of requests."""
    left_out = ("num_cached_tokens", "logprobs", "prompt_logprobs", "cumulative_logprob")
    found = {**output, "request_id": "", **dict.fromkeys(left_out)}
    found["outputs"] = [{**answer, **dict.fromkeys(left_out)} for answer in output.outputs]
    return found


def joined(lists: Iterable[Any]) -> list[Any]:
    return list(chain.from_iterable(lists))


def assert_close(positions: Any, others: Any) -> None:
    """The same log-probabilities, but for the rounding of sums in batches of other sizes."""
    assert (positions is None) == (others is None)
    for one, other in zip(positions or [], others or [], strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, abs=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 5, "n": 3},
    "edits": {"logit_bias": {7: 4.0}, "bad_words": ["the"], "allowed_token_ids": range(5, 90)},
    "stops": {"stop": ["<filler"], "include_stop_str_in_output": True, "ignore_eos": False},
    "late stops": {"stop": ["r1", "er2"], "min_tokens": 4, "n": 2, "prompt_logprobs": 1},
    "log-probabilities": {"logprobs": 3, "prompt_logprobs": 2, "stop": ["er3"]},
    "truncated": {"truncate_prompt_tokens": 5},
    "no text": {"detokenize": False, "min_tokens": 3, "stop_token_ids": [7, 9]},
}


CASES = [(name, Kind.DELTA) for name in VARIANTS]
CASES += [(name, kind) for name in ("greedy", "late stops") for kind in Kind if kind != Kind.DELTA]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_answers_are_those_of_llm(name: str, kind: Kind, llm: LLM, engine: Engine) -> None:
    params = greedy(12, **VARIANTS[name], output_kind=kind)
    expected = llm.generate(PROMPTS, params, use_tqdm=False)

    async def work(client: Client) -> list[list[RequestOutput]]:
        return await answers(client, PROMPTS, params)

    for ours, theirs in zip(serve(engine, work), expected, strict=True):
        assert [output.finished for output in ours] == [False] * (len(ours) - 1) + [True]
        if kind is not Kind.DELTA:
            assert comparable(ours[-1]) == comparable(theirs)
            for one, other in zip(ours[-1].outputs, theirs.outputs, strict=True):
                assert_close(one.logprobs, other.logprobs)
                assert (one.cumulative_logprob is None) == (one.logprobs is None)
            assert_close(ours[-1].prompt_logprobs, theirs.prompt_logprobs)
            assert kind is Kind.CUMULATIVE or len(ours) == 1
            continue
        for index, answer in enumerate(theirs.outputs):
            parts = [part for one in ours for part in one.outputs if part.index == index]
            assert "".join(part.text for part in parts) == answer.text
            assert joined(part.token_ids for part in parts) == answer.token_ids
            if answer.logprobs is not None:
                assert_close(joined(part.logprobs for part in parts), answer.logprobs)
            assert parts[-1].finish_reason == answer.finish_reason
            assert parts[-1].stop_reason == answer.stop_reason
        assert_close(ours[-1].prompt_logprobs, theirs.prompt_logprobs)


def test_log_probabilities_come_as_they_are_made(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a whole answer: one message with all of them may be huge."""
    plain, sizes = answer_of.Answer.add, []

    def add(self: Any, row: Any) -> bool:
        sizes.append(len(row.logprobs or ()))
        return plain(self, row)

    monkeypatch.setattr(answer_of.Answer, "add", add)
    params = greedy(40, n=2, logprobs=2, output_kind=Kind.FINAL_ONLY)

    async def work(client: Client) -> list[list[RequestOutput]]:
        return await answers(client, PROMPTS[:2], params)

    expected = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    for (output,), theirs in zip(serve(engine, work), expected, strict=True):
        assert comparable(output) == comparable(theirs)
        for one, other in zip(output.outputs, theirs.outputs, strict=True):
            assert_close(one.logprobs, other.logprobs)
    assert sum(sizes) == 160 and max(sizes) < 40


@pytest.mark.parametrize("inline_bytes", [0, 1 << 30])
def test_log_probabilities_of_a_prompt_are_computed_once_and_unpacked_beside_the_event_loop(
    llm: LLM, engine: Engine, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    asked: list[int | None] = []
    threads: list[threading.Thread] = []
    plain_add, plain_unpack = engine.add, answer_of.prompt_logprobs

    def add(request: EngineRequest, *others: Any) -> int:
        asked.append(request.params.prompt_logprobs)
        return plain_add(request, *others)

    def unpack(*args: Any) -> Any:
        if args[0].prompt_logprobs is not None:
            threads.append(threading.current_thread())
        return plain_unpack(*args)

    monkeypatch.setattr(engine, "add", add)
    monkeypatch.setattr(answer_of, "prompt_logprobs", unpack)
    monkeypatch.setattr(stream_of, "INLINE_BYTES", inline_bytes)
    params = greedy(2, n=3, prompt_logprobs=2)

    async def work(client: Client) -> tuple[list[Delta], list[list[RequestOutput]]]:
        parts = await collected(await client.open(PROMPTS[1], params))
        return parts, await answers(client, PROMPTS[1:2], params)

    parts, ((*_, output),) = serve(engine, work)
    assert asked == [2, None, None] * 2
    assert [one is threading.current_thread() for one in threads] == [inline_bytes > 0] * 2
    found = {one.output_index for one in parts if one.prompt_logprobs is not None}
    assert found == {0}
    (expected,) = llm.generate(PROMPTS[1:2], params, use_tqdm=False)
    assert_close(output.prompt_logprobs, expected.prompt_logprobs)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens_end_answers_as_in_llm(
    include: bool, llm: LLM, engine: Engine
) -> None:
    (whole,) = llm.generate(PROMPTS[3:4], greedy(12), use_tqdm=False)
    first = whole.outputs[0].token_ids[:6]
    assert engine.tokenizer is not None
    border = len(engine.tokenizer.decode(first))
    stop = whole.text[border - 3 : border + 3]
    params = greedy(12, stop=[stop], include_stop_str_in_output=include)
    (expected,) = llm.generate(PROMPTS[3:4], params, use_tqdm=False)
    assert expected.outputs[0].stop_reason == stop

    async def work(client: Client) -> list[list[RequestOutput]]:
        found = await answers(client, PROMPTS[3:4], params)
        await until_idle(client)
        return found

    ((*_, last),) = serve(engine, work)
    assert comparable(last) == comparable(expected)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", [None, ["never there"]])
@pytest.mark.parametrize("kind", [Kind.DELTA, Kind.FINAL_ONLY])
def test_stop_tokens_are_in_the_text_on_request_only(
    include: bool, stop: list[str] | None, kind: Kind, llm: LLM, engine: Engine
) -> None:
    (whole,) = llm.generate(PROMPTS[3:4], greedy(12), use_tqdm=False)
    token_id = whole.outputs[0].token_ids[5]
    token_ids = whole.outputs[0].token_ids[: whole.outputs[0].token_ids.index(token_id) + 1]
    params = greedy(
        12, stop=stop, stop_token_ids=[token_id], include_stop_str_in_output=include,
        output_kind=kind,
    )  # fmt: skip
    assert engine.tokenizer is not None

    async def work(client: Client) -> list[list[RequestOutput]]:
        return await answers(client, PROMPTS[3:4], params)

    (outputs,) = serve(engine, work)
    text = engine.tokenizer.decode(token_ids if include else token_ids[:-1])
    assert "".join(output.outputs[0].text for output in outputs) == text
    assert joined(output.outputs[0].token_ids for output in outputs) == token_ids


def test_a_stop_string_counts_as_a_stop(engine: Engine) -> None:
    async def work(client: Client) -> None:
        await answers(client, PROMPTS[:1], greedy(400, stop=["<filler"]))

    before = ends(engine)
    serve(engine, work)
    assert ends(engine) == {**before, "stop": before["stop"] + 1}


def test_drawn_seeds_are_those_of_llm_and_differ_between_clients(llm: LLM, engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, n=2)
    start = engine._num_added
    expected = llm.generate(PROMPTS, params, use_tqdm=False)

    async def alone(client: Client) -> list[list[RequestOutput]]:
        client._next_id = start
        return await answers(client, PROMPTS, params)

    found = serve(engine, alone)
    for ours, theirs in zip(found, expected, strict=True):
        assert comparable(ours[-1]) == comparable(theirs)

    async def two(one: Client, other: Client) -> list[Any]:
        return await asyncio.gather(*(answers(each, PROMPTS[1:2], params) for each in (one, other)))

    texts = [answer.text for ((*_, last),) in serve(engine, two, 2) for answer in last.outputs]
    assert len(set(texts)) == 4


@pytest.mark.parametrize("loop", LOOPS)
def test_two_clients_get_their_own_answers(loop: str, llm: LLM, engine: Engine) -> None:
    expected = [one.token_ids for one in llm.generate(PROMPTS, greedy(12), use_tqdm=False)]

    async def work(*clients: Client) -> list[list[list[RequestOutput]]]:
        return await asyncio.gather(*(answers(client, PROMPTS, greedy(12)) for client in clients))

    for found in serve(engine, work, 2, loop=loop):
        assert [ours[-1].token_ids for ours in found] == expected


@pytest.mark.parametrize("how", ["cancel", "break", "abort", "forget", "close"])
def test_who_no_longer_reads_aborts_the_request(how: str, engine: Engine) -> None:
    async def read(client: Client) -> None:
        async for _ in client.generate(PROMPTS[1], ENDLESS, "name"):
            if how == "break":
                break

    async def work(client: Client, other: Client) -> None:
        await other.ready()
        if how == "forget":
            await client.open(PROMPTS[1], ENDLESS)
            gc.collect()
        else:
            task = asyncio.ensure_future(read(client))
            while how != "break" and not await running(other):
                await asyncio.sleep(0.01)
            if how == "cancel":
                task.cancel()
            if how == "abort":
                client.abort("name")
                client.abort("another name")
            if how == "close":
                await client.close()
            await asyncio.wait([task])
        await until_idle(other)

    before = ends(engine)
    serve(engine, work, 2, in_step=True)
    assert ends(engine) == {**before, "abort": before["abort"] + 1}


def test_an_aborted_request_has_an_end(engine: Engine) -> None:
    async def work(client: Client) -> list[Delta]:
        stream = await client.open(PROMPTS[1], greedy(400, n=2))
        parts = []
        async for part in stream:
            parts.append(part)
            stream.abort()
        stream.abort()
        return parts

    parts = serve(engine, work, in_step=True)
    assert {part.output_index for part in parts if part.finish_reason == "abort"} == {0, 1}


def test_a_full_queue_refuses_requests_until_one_ends(engine: Engine) -> None:
    async def work(one: Client, other: Client) -> None:
        await asyncio.gather(one.ready(), other.ready())
        streams = [await one.open(PROMPTS[1], ENDLESS) for _ in range(4)]
        streams += [await other.open(PROMPTS[1], greedy(400, n=2))]
        for client in (one, other):
            with pytest.raises(QueueFull, match=r"6 answers are unfinished .* at most 6 may"):
                await client.open(PROMPTS[1], ENDLESS)
        streams[0].abort()
        await (await other.open(PROMPTS[1], greedy(1))).take()

    serve(engine, work, 2, in_step=True, max_queued=2)


def test_a_refused_request_takes_no_place_in_the_queue(engine: Engine) -> None:
    """Also if its tokens alone show what is wrong with it."""

    async def work(client: Client) -> None:
        for _ in range(4):
            with pytest.raises(ValueError, match="the prompt has 9999 tokens"):
                await client.open([1] * 9999, greedy(1, n=2, seed=2**63 - 1))
        for stream in [await client.open(PROMPTS[1], ENDLESS) for _ in range(6)]:
            stream.abort()

    serve(engine, work, in_step=True, max_queued=2)


def test_a_slow_reader_gets_fewer_and_larger_parts(llm: LLM, engine: Engine) -> None:
    (expected,) = llm.generate(PROMPTS[4:5], greedy(40, logprobs=1), use_tqdm=False)

    async def work(client: Client) -> list[Delta]:
        stream = await client.open(PROMPTS[4], greedy(40, logprobs=1))
        parts = []
        async for part in stream:
            parts.append(part)
            await until_idle(client)
        return parts

    parts = serve(engine, work)
    assert len(parts) <= 3
    assert "".join(part.text for part in parts) == expected.text
    assert joined(part.token_ids for part in parts) == expected.token_ids
    assert_close(joined(part.logprobs for part in parts), expected.outputs[0].logprobs)


@pytest.mark.parametrize("timeout", [None, 0.05])
def test_draining_refuses_requests_and_finishes_what_runs(
    timeout: float | None, engine: Engine
) -> None:
    async def work(client: Client) -> list[Delta]:
        stream = await client.open(PROMPTS[1], greedy(400 if timeout else 30))
        draining = asyncio.ensure_future(client.drain(timeout))
        await asyncio.sleep(0)
        assert client.is_draining
        with pytest.raises(Draining):
            await client.open(PROMPTS[0], greedy(1))
        assert await draining is (timeout is None)
        return await collected(stream)

    found = serve(engine, work, in_step=True)
    assert found[-1].finish_reason == ("abort" if timeout else "length")


INVALID: list[tuple[Any, Any, str]] = [
    ([], greedy(1), "the prompt is empty"),
    ([9999], greedy(1), "token id 9999 is outside the vocabulary"),
    ([5] * 512, greedy(1), "at most 511 fit"),
    ("é\ud800", greedy(1), "half of a surrogate pair"),
    ("a", {"temperature": 0}, "they must be SamplingParams"),
    ("a", greedy(1, logit_bias={512: 1.0}), "logit_bias holds token id 512"),
    ("a", greedy(1, structured_outputs={"choice": ["a" * 10**7]}), "choice has 1000"),
    ({"prompt": "a", "multi_modal_data": {"image": "x"}}, greedy(1), "image 1"),
]


def test_errors_of_one_request_leave_others_unharmed(llm: LLM, engine: Engine) -> None:
    (expected,) = llm.generate(PROMPTS[1:2], greedy(30), use_tqdm=False)

    async def work(client: Client) -> list[Delta]:
        stream = await client.open(PROMPTS[1], greedy(30), request_id="name")
        for prompt, params, message in INVALID:
            with pytest.raises(ValueError, match=message):
                await client.open(prompt, params)
        with pytest.raises(ValueError, match="request_id is 'name'"):
            await client.open(PROMPTS[1], ENDLESS, request_id="name")
        with pytest.raises(ValueError, match="priority is 'x'"):
            await client.open(PROMPTS[1], ENDLESS, priority="x")  # type: ignore[arg-type]
        return await collected(stream)

    parts = serve(engine, work)
    assert joined(part.token_ids for part in parts) == expected.token_ids


def test_what_only_the_engine_refuses_ends_one_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.add

    def refuse(asked: EngineRequest) -> int:
        if len(asked.prompt_ids) == 19:
            raise MemoryError("no memory")
        return add(asked)

    async def work(client: Client) -> list[list[RequestOutput]]:
        return await answers(client, PROMPTS[:3], greedy(3, n=2))

    monkeypatch.setattr(engine, "add", refuse)
    found = serve(engine, work)
    assert [[one.finish_reason for one in ours[-1].outputs] for ours in found] == [
        ["length"] * 2, ["error"] * 2, ["length"] * 2,
    ]  # fmt: skip
    assert found[1][-1].error == "MemoryError: no memory"


def test_long_texts_are_encoded_as_in_llm(engine: Engine) -> None:
    text = "the theory " * (LONG_TEXT // 8)
    params = greedy(2, truncate_prompt_tokens=9)

    async def work(client: Client) -> list[int]:
        return (await client.open(text, params)).prompt_token_ids

    assert engine.tokenizer is not None
    assert serve(engine, work) == engine.tokenizer.encode(text)[-9:]


def test_structured_outputs_cross_processes(llm: LLM, engine: Engine) -> None:
    params = greedy(20, structured_outputs={"choice": ["an apple", "the theory"]}, ignore_eos=False)
    (expected,) = llm.generate(["the"], params, use_tqdm=False)

    async def work(client: Client) -> list[list[RequestOutput]]:
        return await answers(client, ["the"], params)

    ((*_, last),) = serve(engine, work)
    assert last.text == expected.text and last.text in ("an apple", "the theory")


def test_requests_without_parameters_get_the_checkpoints(engine: Engine) -> None:
    async def work(client: Client) -> list[Delta]:
        with pytest.raises(AttributeError, match="default_params is not available before"):
            assert client.default_params
        stream = await client.open(PROMPTS[0])
        assert client.default_params == engine.default_params
        assert client.eos_ids == engine.eos_ids
        assert (client.max_model_len, client.max_num_seqs) == (512, 4)
        return await collected(stream)

    assert serve(engine, work)[-1].finish_reason in ("stop", "length")
