"""Deterministic engines: a request has the same bits whatever else runs.

The tests try to break it: one request among random companions that arrive at random times, in
chunks, with prefixes from the cache, after preemptions and restarts, by graphs and eagerly. All
log-probabilities of all its tokens are compared bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.platforms import cpu
from nanovllm.platforms.base import Platform
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.schedule.outputs import FinishedOutput
from nanovllm.structured_params import StructuredOutputsParams
from tests.conftest import save_tiny
from tests.engines import VOCAB_SIZE, assert_all_free, random_prompts
from tests.models import lora_cases

PROMPT = random_prompts([99], seed=3)[0]
DRAWN = SamplingParams(temperature=0.8, seed=5, max_tokens=12, ignore_eos=True, logprobs=-1)
OTHERS = (
    {"temperature": 0}, {"temperature": 1.3}, {"top_k": 4}, {"presence_penalty": 1.0},
    {"logprobs": 2}, {"prompt_logprobs": 1},
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {},
    "graph, in chunks": {
        "enforce_eager": False, "max_num_batched_tokens": 48, "graph_batch_sizes": (1, 5, 16),
    },
    "few blocks": {
        "num_kvcache_blocks": 13, "max_model_len": 192, "max_num_batched_tokens": 64,
    },
}  # fmt: skip
Bits = tuple[tuple[int, ...], tuple[str, ...]]


def bits(tokens: Sequence[int], logprobs: Sequence[dict[int, float]] | None) -> Bits:
    """Tokens and all bits of their log-probabilities."""
    found = [float(value).hex() for one in logprobs or () for _, value in sorted(one.items())]
    return tuple(tokens), tuple(found)


def alone(llm: LLM, params: SamplingParams = DRAWN) -> Bits:
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    return bits(output["token_ids"], output["logprobs"])


def among_others(llm: LLM, rng: random.Random, params: SamplingParams = DRAWN) -> Bits:
    """The same request in a random schedule."""
    engine, number = llm.engine, None
    if rng.random() < 0.3:
        engine.scheduler.cache.evict()
    waiting: list[tuple[list[int], SamplingParams] | None] = []
    for _ in range(rng.choice((0, 1, 3, 8, 20))):
        shared = PROMPT[: rng.choice((0, 0, 16, 50, 99))]
        prompt = shared + [rng.randrange(5, VOCAB_SIZE) for _ in range(rng.choice((1, 2, 17, 60)))]
        changes = rng.choice(OTHERS)
        more = {"max_tokens": rng.randrange(1, 33), "ignore_eos": True, **changes}
        waiting.append((prompt, SamplingParams(**more)))
    waiting.insert(rng.randrange(len(waiting) + 1), None)
    done: FinishedOutput | None = None
    while waiting or engine.has_unfinished:
        for one in [waiting.pop() for _ in range(min(len(waiting), rng.choice((0, 1, 4))))]:
            added = engine.add_request(*(one or (PROMPT, params)))
            number = added if one is None else number
        for output in engine.step():
            if output.completion is not None and output.request_id == number:
                done = output.completion
    assert done is not None
    return bits(done.token_ids, done.logprobs)


@pytest.fixture(scope="module")
def make(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    def make(**options: Any) -> LLM:
        defaults = {"deterministic": True, "max_num_seqs": 24, "device": "cpu"}
        return make_llm(**{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def expected(make: Callable[..., LLM]) -> Bits:
    llm = make()
    found = alone(llm)
    llm.close()
    return found


@pytest.fixture(scope="module", params=OPTIONS)
def llm(request: pytest.FixtureRequest, make: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make(**OPTIONS[request.param])
    yield llm
    assert_all_free(llm)
    llm.close()


def test_one_request_in_random_schedules(llm: LLM, expected: Bits) -> None:
    assert alone(llm) == expected
    rng = random.Random(7)
    for number in range(7):
        assert among_others(llm, rng) == expected, f"schedule {number}"
    scheduler = llm.engine.scheduler
    assert (scheduler.num_preemptions > 0) == (scheduler.cache.pool.num_blocks == 13)


def test_answers_have_the_logprobs_of_prompts(llm: LLM, expected: Bits) -> None:
    """Log-probabilities of an answer equal those of the same tokens as a part of a prompt."""
    answer = list(expected[0])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    (output,) = llm.generate([PROMPT + answer], params, use_tqdm=False)
    assert bits(answer, output["prompt_logprobs"][len(PROMPT) :]) == expected


def test_bf16(make: Callable[..., LLM]) -> None:
    llm = make(dtype="bfloat16", max_num_batched_tokens=64)
    first, rng = alone(llm), random.Random(8)
    assert [among_others(llm, rng) for _ in range(3)] == [first] * 3
    llm.close()


def test_verified_proposals(make: Callable[..., LLM], expected: Bits) -> None:
    """Rows that verify proposals have the tokens of others, and leave the same keys and values."""
    spec = {"method": "ngram", "num_speculative_tokens": 3}
    plain = SamplingParams(temperature=0.8, seed=5, max_tokens=12, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    found: list[object] = []
    for options in (
        {"speculative_config": spec, "tuning": {"adapt_draft_length": False}},
        {"enable_prefix_caching": False},
    ):
        llm, rng = make(**options), random.Random(9)
        assert [among_others(llm, rng, plain) for _ in range(4)] == [(expected[0], ())] * 4
        (output,) = llm.generate([[5, 6, 7, 8] * 20], greedy, use_tqdm=False)
        steps = llm.engine.scheduler.counts.steps
        # the second turn finds the blocks of the first one in the cache
        turn = [5, 6, 7, 8] * 20 + output["token_ids"] + [9]
        (again,) = llm.generate([turn], DRAWN, use_tqdm=False)
        if "speculative_config" in options:
            assert any(num for length, num in steps.items() if length)
            assert again["num_cached_tokens"] == 112
        found.append((output["token_ids"], bits(again["token_ids"], again["logprobs"])))
        llm.close()
    assert found[0] == found[1]


def test_proposals_of_a_draft_model(
    make: Callable[..., LLM], checkpoint: Path, expected: Bits
) -> None:
    spec = {"method": "draft_model", "model": str(checkpoint), "num_speculative_tokens": 3}
    llm = make(speculative_config=spec, tuning={"adapt_draft_length": False})
    plain, rng = replace(DRAWN, logprobs=None), random.Random(15)
    assert [among_others(llm, rng, plain) for _ in range(2)] == [(expected[0], ())] * 2
    assert any(num for length, num in llm.engine.scheduler.counts.steps.items() if length)
    llm.close()


def test_rows_with_a_grammar(make: Callable[..., LLM]) -> None:
    llm, rng = make(), random.Random(10)
    grammar = StructuredOutputsParams(regex="(ab|cd){3,9}")
    params = SamplingParams(
        temperature=0.8, seed=5, max_tokens=8, logprobs=-1, structured_outputs=grammar
    )
    first = alone(llm, params)
    assert [among_others(llm, rng, params) for _ in range(3)] == [first] * 3
    llm.close()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("qwen3_moe", {}), ("mistral", {"sliding_window": 20})],
    ids=["experts", "window"],
)
def test_other_layers(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path / "model", architecture, vocab_size=VOCAB_SIZE, **changes)
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "deterministic": True, "max_num_seqs": 24,
        "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 200,
        "skip_tokenizer_init": True, "enforce_eager": True,
    }  # fmt: skip
    rng, found = random.Random(11), set()
    for num_tokens in (256, 48):
        llm = LLM(str(folder), max_num_batched_tokens=num_tokens, **options)
        found |= {alone(llm), *(among_others(llm, rng) for _ in range(3))}
        llm.close()
    assert len(found) == 1


@pytest.mark.parametrize(
    "options", [{"quantization": "int8", "kv_cache_dtype": "fp8"}, {"quantization": "fp8"}], ids=str
)
def test_other_formats(make: Callable[..., LLM], options: dict[str, Any]) -> None:
    """Weights and caches of other formats, whose plain products depend on the number of rows."""
    llm = make(
        max_num_batched_tokens=64, enforce_eager=False, graph_batch_sizes=(1, 5, 16), **options
    )
    rng = random.Random(13)
    first = alone(llm)
    assert [among_others(llm, rng) for _ in range(2)] == [first] * 2
    answer = list(first[0])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    (output,) = llm.generate([PROMPT + answer], params, use_tqdm=False)
    assert bits(answer, output["prompt_logprobs"][len(PROMPT) :]) == first
    llm.close()


def test_adapters(make: Callable[..., LLM], checkpoint: Path, tmp_path: Path) -> None:
    """An adapter's slot and those of other rows change no sum."""
    adapters = [
        LoRARequest(f"adapter {seed}", seed, str(lora_cases.save_adapter(tmp_path / str(seed),
                    checkpoint, seed=seed)))
        for seed in (1, 2, 3)
    ]  # fmt: skip
    options = {"enforce_eager": False, "graph_batch_sizes": (1, 4), "max_num_seqs": 4}
    llm = make(enable_lora=True, max_loras=2, max_lora_rank=8, **options)
    rng, found = random.Random(14), []
    others = SamplingParams(max_tokens=20, ignore_eos=True)
    for names in ([], [2], [3, 2, 0], [2, 2, 1, 0, 1], [3]):
        prompts = [PROMPT[: rng.choice((3, 50))] + [7] * rng.randrange(40) for _ in names]
        llm.engine.scheduler.cache.evict()
        outputs = llm.generate(
            [*prompts, PROMPT], [*[others] * len(names), DRAWN], use_tqdm=False,
            lora_request=[*(adapters[i - 1] if i else None for i in names), adapters[0]],
        )  # fmt: skip
        found.append(bits(outputs[-1]["token_ids"], outputs[-1]["logprobs"]))
    assert found == [found[0]] * len(found)
    assert found[0] != alone(llm)
    llm.close()


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "sdpa"},
        {"expert_offload": 2},
        {"tensor_parallel_size": 2},
        {"task": "embed"},
        {"tuning": {"fuse": False}},
        {"tuning": {"pad_batches": False}, "enforce_eager": True},
    ],
    ids=str,
)
def test_refused_options(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"deterministic=True does not go with {name}"):
        EngineConfig("some/model", deterministic=True, **options)


def test_across_ranks_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="deterministic"):
        EngineConfig("some/model", deterministic="across_ranks")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"enable_lora": True}, {"kv_cache_dtype": "fp8"}, {"quantization": "int8"}], ids=str
)
def test_refused_on_other_devices(
    make: Callable[..., LLM], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, ordered=frozenset()))
    message = f"deterministic=True does not go with {next(iter(options))}=.* on a cpu device yet"
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refused_devices(make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuPlatform, "ordered_passes", Platform.ordered_passes)
    with pytest.raises(ValueError, match="deterministic=True is not supported on this cpu device"):
        make()


def test_refused_sums(tmp_path: Path) -> None:
    """A model with an op whose order of sums is not known is refused, with the op's name."""
    folder = save_tiny(tmp_path / "model", "starcoder2", vocab_size=100)
    with pytest.raises(ValueError, match=r"deterministic=True .* aten\.mean"):
        LLM(
            str(folder), device="cpu", dtype="float32", deterministic=True, enforce_eager=True,
            skip_tokenizer_init=True, max_model_len=64, num_kvcache_blocks=20, max_num_seqs=2,
        )  # fmt: skip
