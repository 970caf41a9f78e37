"""Given embeddings replace those of the table; equal embeddings change no token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from tests.engines import assert_all_free, drain, greedy, random_prompts

Embeddings = list[tuple[int, Tensor]]


@pytest.fixture(scope="module", params=["eager", "graph"])
def seeing(request: pytest.FixtureRequest, make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    sizes = {"max_num_batched_tokens": 32, "max_num_seqs": 4}
    graph = {"enforce_eager": False, "graph_batch_sizes": (4,)}
    llm = make_llm(**sizes, **(graph if request.param == "graph" else {}))
    yield llm
    llm.close()


def answers(
    llm: LLM, asked: list[tuple[list[int], Embeddings]], params: SamplingParams
) -> list[tuple[list[int], int]]:
    """(tokens, prompt tokens found in the cache) of each, in order."""
    ids = [
        llm.engine.add_request(prompt, params, incremental=False, embeddings=embeddings)
        for prompt, embeddings in asked
    ]
    done = drain(llm)
    assert_all_free(llm)
    assert not llm.engine.runner.embeddings._given, "nothing is kept of finished requests"
    return [(done[i].token_ids, done[i].num_cached_tokens) for i in ids]


def of_tokens(llm: LLM, token_ids: list[int]) -> Tensor:
    return llm.engine.runner.params.embed_VD[token_ids].clone()


def test_the_tables_own_rows_change_nothing(seeing: LLM) -> None:
    """Beside other requests, at any place, also where a chunk of the prompt ends within them."""
    prompts = random_prompts([19, 99, 40, 7], seed=6)
    expected = answers(seeing, [(prompt, []) for prompt in prompts], greedy())
    blank = [prompt[:] for prompt in prompts]
    given: list[Embeddings] = [[], [], [], []]
    for row, start, num in ((1, 20, 50), (1, 80, 3), (2, 0, 40), (3, 6, 1)):
        given[row].append((start, of_tokens(seeing, prompts[row][start : start + num])))
        blank[row][start : start + num] = [0] * num
    found = answers(seeing, list(zip(blank, given)), greedy())
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


def test_other_embeddings_are_used_and_share_blocks_with_the_same_alone(seeing: LLM) -> None:
    prompt = random_prompts([70], seed=7)[0]
    torch.manual_seed(1)
    images = [torch.randn(20, 64) for _ in range(2)]
    plain, *seen = (
        answers(seeing, [(prompt, embeddings)], greedy())[0]
        for embeddings in (
            [], [(20, images[0])], [(20, images[1])], [(20, images[0])], [(24, images[0])],
        )
    )  # fmt: skip
    assert len({tuple(tokens) for tokens, _ in (plain, *seen)}) == 4, "each is another prompt"
    assert seen[0][0] == seen[2][0]
    # blocks of 16 tokens: the first is before the image; the last of 70 tokens always runs
    assert [num_cached for _, num_cached in seen] == [16, 16, 64, 16]


def test_a_seeing_request_may_ask_for_logprobs_and_samples(seeing: LLM) -> None:
    prompt = random_prompts([40], seed=8)[0]
    given: Embeddings = [(5, of_tokens(seeing, prompt[5:30]))]
    params = SamplingParams(
        temperature=0.8, top_k=9, seed=3, logprobs=2, prompt_logprobs=1, max_tokens=8
    )
    done = []
    for embeddings in ([], given):
        seeing.engine.add_request(prompt, params, incremental=False, embeddings=embeddings)
        done += drain(seeing).values()
    assert done[0].token_ids == done[1].token_ids
    for one, other in zip(done[0].prompt_logprobs[1:], done[1].prompt_logprobs[1:]):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("start", "shape", "message"),
    [
        (0, (3, 65), r"shape \[3, 65\]: it must be \[n, 64\]"),
        (0, (64,), r"shape \[64\]"),
        (0, (0, 64), r"shape \[0, 64\]"),
        (9, (2, 64), "2 embeddings from position 9 on do not fit a prompt of 10 tokens"),
        (-1, (2, 64), "from position -1 on"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    seeing: LLM, start: int, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        seeing.engine.add_request([5] * 10, greedy(), embeddings=[(start, torch.zeros(shape))])
    with pytest.raises(ValueError, match=r"overlap: they lie at positions \[\(0, 3\), \(2, 5\)\]"):
        given = [(2, torch.zeros(3, 64)), (0, torch.zeros(3, 64))]
        seeing.engine.add_request([5] * 10, greedy(), embeddings=given)
    assert_all_free(seeing)
