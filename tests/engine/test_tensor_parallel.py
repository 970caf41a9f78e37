"""Engines on several ranks, each a process: answers, failures, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.parallel.errors import RankFailed
from nanovllm.startup import ranks
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts, tokens

ROOT = Path(__file__).parents[2]
PROMPTS = random_prompts([1, 19, 70, 33])
SIZES = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 33,
    "skip_tokenizer_init": True,
}


def make(folder: Path, size: int, **options: Any) -> LLM:
    return LLM(
        str(folder), tensor_parallel_size=size, **{"enforce_eager": True, **SIZES, **options}
    )


def pids(llm: LLM) -> list[int]:
    runner: Any = llm.engine.runner
    found: list[int] = runner.ranks.pids
    return found


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key-value heads for up to four ranks, and a vocabulary that cannot be shared evenly."""
    return save_tiny(tmp_path_factory.mktemp("model"), vocab_size=499)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 2, draft_lengths=(2,))
    yield llm
    llm.close()


def prompts(limit: int = 499) -> list[list[int]]:
    return [[token % limit for token in prompt] for prompt in PROMPTS]


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "edits": {"logit_bias": {7: 4.0}, "bad_words": None, "allowed_token_ids": list(range(5, 90))},
    "min tokens": {"min_tokens": 5, "stop_token_ids": [7, 9]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_one_rank(name: str, alone: LLM, two: LLM) -> None:
    params = greedy(12, **VARIANTS[name])
    assert tokens(two, prompts(), params) == tokens(alone, prompts(), params)


def test_log_probabilities_are_those_of_one_rank(alone: LLM, two: LLM) -> None:
    params = greedy(6, logprobs=3, prompt_logprobs=2)
    found, expected = (llm.generate(prompts(), params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected):
        for one, other in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:]):
            assert one.keys() == other.keys()
            assert all(abs(one[i].logprob - other[i].logprob) < 1e-4 for i in one)
        assert [list(step) for step in ours.outputs[0].logprobs] == [
            list(step) for step in theirs.outputs[0].logprobs
        ]


def test_given_embeddings_reach_every_rank(alone: LLM, two: LLM) -> None:
    embeds = torch.randn(4, 64)
    found = []
    for llm in (alone, two):
        engine = llm.engine
        request_id = engine.add_request(prompts()[1], greedy(8), embeddings=[(3, embeds)])
        ids: list[int] = []
        while engine.has_unfinished:
            ids += [
                i for one in engine.step() if one.request_id == request_id for i in one.token_ids
            ]
        found.append(ids)
    assert found[0] == found[1] and len(found[0]) == 8


def test_proposals_are_verified_on_every_rank(alone: LLM, two: LLM) -> None:
    expected = tokens(alone, prompts()[:1], greedy(12))
    known = prompts()[0] + expected[0]

    def propose(request: Any) -> list[int]:
        start = len(request.prompt_ids) + len(request.output_ids)
        return known[start : start + 2]

    steps = two.engine.metrics.num_steps
    two.engine.propose = propose
    try:
        assert tokens(two, prompts()[:1], greedy(12)) == expected
    finally:
        two.engine.propose = None
    assert two.engine.metrics.num_steps - steps < 9


def test_two_engines_at_once(folder: Path, two: LLM, alone: LLM) -> None:
    other = make(folder, 2)
    try:
        expected = tokens(alone, prompts(), greedy(5))
        assert tokens(other, prompts(), greedy(5)) == expected
        assert tokens(two, prompts(), greedy(5)) == expected
        left = pids(other)
    finally:
        other.close()
    assert not any(map(is_alive, left))
    assert tokens(two, prompts(), greedy(5)) == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "size"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
        ("mistral", {"sliding_window": 16}, 2),
        ("qwen2", {}, 4),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 2),
        (
            "qwen2_moe",
            {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
            4,
        ),
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, 2),
    ],
)
def test_every_architecture(
    architecture: str, changes: dict[str, Any], size: int, tmp_path: Path
) -> None:
    """Of every expert, each rank has a part: `test_expert_parallel.py` has whole ones.

    Four ranks have each key-value head twice: with biases of heads, and with shared experts. The
    logits of all dense ones are compared in `models/test_shards.py`, without processes.
    """
    folder = save_tiny(tmp_path / "model", architecture, vocab_size=101, **changes)
    found = []
    for num_ranks in (1, size):
        llm = make(folder, num_ranks, expert_parallel="auto" if num_ranks == 1 else False)
        found.append(tokens(llm, prompts(101), greedy(8)))
        llm.close()
    assert found[0] == found[1]


def test_graphs_of_a_cold_and_a_warm_start(folder: Path, alone: LLM, bare_store: Path) -> None:
    options = {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(bare_store)}
    expected = tokens(alone, prompts(), greedy(8))
    for is_cold in (True, False):
        llm = make(folder, 2, **options)
        try:
            assert (llm.engine.runner.compiler.num_compiled > 0) == is_cold
            assert tokens(llm, prompts(), greedy(8)) == expected
        finally:
            llm.close()


def test_random_weights_are_those_of_one_rank(folder: Path) -> None:
    found = []
    for size in (1, 2):
        llm = make(folder, size, random_weights=True)
        found.append(tokens(llm, prompts(), greedy(4)))
        llm.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_at_load_ends_the_engine_with_an_error(
    kind: signal.Signals, folder: Path
) -> None:
    llm = make(folder, 2)
    (pid,) = pids(llm)
    pieces = llm.stream(prompts(), greedy(50))
    next(pieces)
    os.kill(pid, kind)
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1"):
        list(pieces)
    assert time.monotonic() - started < 60, "it does not wait for the rank"
    with pytest.raises(RankFailed, match="rank 1"):
        llm.generate(prompts(), greedy(1), use_tqdm=False)
    llm.close()
    assert not is_alive(pid)


def test_too_many_ranks_for_the_heads(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="tensor_parallel_size is 3: it must divide the 4 attention"
    ):
        make(folder, 3)


def test_ctrl_c_ends_a_call_and_leaves_no_rank(folder: Path) -> None:
    """In a process of its own: one interrupt in the middle of an answer, then the end."""
    program = f"""
import signal, sys, threading, os
from pathlib import Path
from tests.engine.test_tensor_parallel import make, pids, prompts, tokens
from tests.engines import greedy

def main():
    llm = make(Path({str(folder)!r}), 2)
    expected = tokens(llm, prompts(), greedy(4))
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            tokens(llm, prompts(), greedy(50))
    except KeyboardInterrupt:
        print("interrupted", tokens(llm, prompts(), greedy(4)) == expected, *pids(llm), flush=True)

main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.stdout.startswith("interrupted True "), done.stdout + done.stderr
    assert not any(is_alive(int(pid)) for pid in done.stdout.split()[2:])


def test_a_rank_that_sees_another_checkpoint_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "checkpoint_digest", lambda folder: "of another checkpoint")
    with pytest.raises(RankFailed, match=r"rank 1 has another checkpoint than rank 0 in .*model"):
        make(folder, 2)
