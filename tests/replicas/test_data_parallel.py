"""Several engines behind one `LLM`, each a process: answers, placing, options."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.request import MediaPrompt
from nanovllm.parallel.channel import Channel, channel_pair
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Add
from nanovllm.runner.encoders import MMItem
from nanovllm.schedule.request import MMSpan
from tests.engines import greedy, random_prompts, tokens
from tests.replicas.local_replicas import (
    PROMPTS,
    SIZES,
    alone,
    count,
    counts,
    folder,
    make,
    run,
    two,
)

__all__ = ["alone", "folder", "two"]  # fixtures
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 5, "n": 2},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "edits": {"logit_bias": {7: 4.0}, "bad_words": ["the"], "allowed_token_ids": range(5, 90)},
    "stops": {"stop": ["<filler"], "include_stop_str_in_output": True, "ignore_eos": False},
    "truncated": {"truncate_prompt_tokens": 5},
    "no text": {"detokenize": False, "min_tokens": 3, "stop_token_ids": [7, 9]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_one_engine(name: str, alone: LLM, two: LLM) -> None:
    params = greedy(12, **VARIANTS[name])
    found, expected = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert {**one, "num_cached_tokens": 0} == {**other, "num_cached_tokens": 0}


def test_drawn_seeds_do_not_depend_on_the_replica(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    found = []
    for size in (1, 2):
        llm = make(folder, size, seed=3)
        found.append(tokens(llm, PROMPTS, params))
        llm.close()
    assert found[0] == found[1]


def test_log_probabilities_are_those_of_one_engine(alone: LLM, two: LLM) -> None:
    params = greedy(4, logprobs=3, prompt_logprobs=2)
    found, expected = (llm.generate(PROMPTS[:3], params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected, strict=True):
        positions = [*ours.prompt_logprobs[1:], *ours.outputs[0].logprobs]
        others = [*theirs.prompt_logprobs[1:], *theirs.outputs[0].logprobs]
        assert ours.prompt_logprobs[0] is None
        for one, other in zip(positions, others, strict=True):
            assert list(one) == list(other)
            for token in one:
                assert abs(one[token].logprob - other[token].logprob) < 1e-4
                assert one[token].rank == other[token].rank
                assert one[token].decoded_token == other[token].decoded_token


def test_requests_are_spread_by_load(two: LLM) -> None:
    before = counts(two, "prompt_tokens")
    prompts = random_prompts([40] * 8, seed=1)
    tokens(two, prompts, greedy(6))
    added = [now - then for now, then in zip(counts(two, "prompt_tokens"), before)]
    assert added == [160, 160]


def test_prompts_with_a_common_beginning_go_to_the_same_replica(two: LLM) -> None:
    beginnings = random_prompts([64] * 6, seed=2)
    tokens(two, beginnings, greedy(2))
    hits = count(two, "prefix_cache_hit_tokens")
    for tail in ([5, 6, 7], [8, 9]):  # in another order than before
        found = two.generate([one + tail for one in beginnings[::-1]], greedy(2), use_tqdm=False)
        assert [output.num_cached_tokens for output in found] == [64] * 6
    assert count(two, "prefix_cache_hit_tokens") - hits == 2 * 6 * 64


def test_reset_prefix_cache_reaches_every_replica(two: LLM) -> None:
    prompts = random_prompts([64] * 4, seed=3)
    tokens(two, prompts, greedy(2))
    two.reset_prefix_cache()
    found = two.generate(prompts, greedy(2), use_tqdm=False)
    assert [output.num_cached_tokens for output in found] == [0] * 4


def test_salted_prompts_share_no_blocks(two: LLM) -> None:
    (prompt,) = random_prompts([64], seed=4)
    for salt, cached in (("a", 0), ("b", 0), ("a", 48)):
        given = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = two.generate(given, greedy(2), use_tqdm=False)
        assert output.num_cached_tokens == cached


def test_stream_gives_the_pieces_of_all_answers(alone: LLM, two: LLM) -> None:
    expected = [output.text for output in alone.generate(PROMPTS, greedy(), use_tqdm=False)]
    texts, num_pieces = [""] * len(PROMPTS), 0
    for piece in two.stream(PROMPTS, greedy()):
        texts[piece.index] += piece.text
        num_pieces += 1
    assert texts == expected
    assert num_pieces > 2 * len(PROMPTS)


def test_a_stream_that_is_left_aborts_its_requests(two: LLM) -> None:
    params = greedy(400)
    steps = count(two, "num_steps")
    for _ in two.stream(PROMPTS, params):
        break
    tokens(two, PROMPTS[:2], greedy(2))
    assert count(two, "num_requests_running") == 0
    assert count(two, "num_steps") - steps < 200
    assert not two.engine._pending  # type: ignore[attr-defined]


def test_an_aborted_request_ends_with_what_it_has(two: LLM) -> None:
    engine = two.engine
    request_id = engine.add_request(PROMPTS[1], greedy(400))
    while not engine.has_outputs([request_id]):
        engine.advance()
    before = [token for one in engine.take([request_id]) for token in one.token_ids]
    engine.abort(request_id)
    (last,) = engine.take([request_id])
    assert last.completion is not None and last.completion.finish_reason == "abort"
    assert last.completion.token_ids == before


def test_engine_stepped_by_hand(alone: LLM, two: LLM) -> None:
    found = []
    for llm in (alone, two):
        engine, texts = llm.llm_engine, {}
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(5))
        while engine.has_unfinished_requests():
            for output in engine.step():
                texts[output.request_id] = output.outputs[0].text
        found.append(texts)
    assert found[0] == found[1] and len(found[0]) == len(PROMPTS)


def test_threads_share_the_replicas(alone: LLM, two: LLM) -> None:
    expected = tokens(alone, PROMPTS, greedy())
    found: dict[int, list[list[int]]] = {}

    def call(number: int) -> None:
        found[number] = tokens(two, PROMPTS, greedy())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), expected)


def test_chat_and_beam_search(alone: LLM, two: LLM) -> None:
    from nanovllm import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=4)
    found, expected = (llm.beam_search(PROMPTS[:2], params) for llm in (two, alone))
    assert [[s.tokens for s in one.sequences] for one in found] == [
        [s.tokens for s in one.sequences] for one in expected
    ]


def test_bad_requests_are_refused_and_queue_nothing(two: LLM) -> None:
    before = count(two, "prompt_tokens")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([[5], []], {}, "the prompt is empty"),
        ([[5], [512]], {}, "token id 512 is outside the vocabulary"),
        ([[5], [5] * 512], {}, "the prompt has 512 tokens"),
        ([[5]], {"logit_bias": {600: 1.0}}, "logit_bias holds token id 600"),
    ]
    for prompts, changes, match in cases:
        with pytest.raises(ValueError, match=match):
            two.generate(prompts, greedy(2, **changes), use_tqdm=False)
    with pytest.raises(ValueError, match=r"embeddings have shape \[1, 63\]"):
        two.engine.add_request([5, 6], greedy(2), embeddings=[(0, torch.ones(1, 63))])
    image = MMSpan(0, 1, b"digest"), MMItem(torch.ones(4, 8), (1, 2, 2))
    with pytest.raises(ValueError, match=r"the prompt has images, but .* accepts text only"):
        two.engine.add_request(MediaPrompt([5, 6], None, [image]), greedy(2))
    with pytest.raises(ValueError, match="sleep is not supported with data_parallel_size=2"):
        two.sleep()
    with pytest.raises(ValueError, match="cannot be replaced with data_parallel_size=2"):
        two.set_tokenizer(two.get_tokenizer())
    assert count(two, "num_requests_running") + count(two, "num_requests_waiting") == 0
    assert count(two, "prompt_tokens") - before == 3  # valid ones before them, which were dropped


def test_the_first_replica_compiles_and_the_others_load(
    folder: Path, alone: LLM, bare_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(bare_store)}
    expected = tokens(alone, PROMPTS, greedy(5))
    for is_cold in (True, False):
        capfd.readouterr()
        llm = make(folder, 2, **options)
        try:
            assert tokens(llm, PROMPTS, greedy(5)) == expected
        finally:
            llm.close()
        found = re.findall(r"replica (\d): .* programs \((\d+) compiled\)", capfd.readouterr().err)
        compiled = {int(index): int(num) for index, num in found}
        assert (compiled[0] > 0) == is_cold and compiled[1] == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size is 0: it must be a whole number"),
        ({"enable_sleep_mode": True}, "data_parallel_size=2 does not go with enable_sleep_mode"),
        ({"draft_lengths": (2,)}, r"data_parallel_size=2 does not go with draft_lengths=\[2\]"),
        ({"device": "cuda:1"}, "data_parallel_size=2 does not go with device='cuda:1'"),
    ],
)
def test_options_that_do_not_go_with_replicas(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM("tiny-qwen3", **{"data_parallel_size": 2, **options})


def test_a_request_that_an_engine_refuses_ends_alone(alone: LLM) -> None:
    engine: Any = alone.engine
    ours, theirs = channel_pair()
    loop = threading.Thread(target=run, args=(engine, Channel(theirs)))
    loop.start()
    assert ours.receive()[0] == messages.READY
    for request_id, prompt in enumerate(([5, 6], [5], [7])):
        bias = {"logit_bias": {600: 1.0}} if request_id == 1 else {}
        fields = messages.packed_params(SamplingParams(max_tokens=2, **bias), detokenizes=False)
        add = Add([request_id], [0], prompt, fields, False, 0, None)
        ours.send(messages.ADD, messages.dump(add))
    done: dict[int, Any] = {}
    while len(done) < 3:
        rows = messages.load_outputs(ours.receive()[1]).rows
        done.update({row.request_id: row.done for row in rows})
    ours.close()
    loop.join()
    assert (done[1].finish_reason, done[1].error_field) == ("error", "logit_bias")
    assert done[1].error.startswith("logit_bias holds token id 600")
    assert done[0].finish_reason == done[2].finish_reason == "length"


def test_the_program_of_a_replica_sets_its_environment_before_torch_reads_it() -> None:
    code = "import sys, nanovllm.replicas.engine_program; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_alone_refuses_replicas(folder: Path) -> None:
    from nanovllm.engine.engine import Engine

    with pytest.raises(ValueError, match="data_parallel_size=2 is for LLM"):
        Engine.from_options(str(folder), data_parallel_size=2, **SIZES)
