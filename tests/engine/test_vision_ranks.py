"""Prompts with images on several ranks, each a process: the tokens of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.runner import encoding_ranks
from tests.models.test_vision_text import MODELS, NAMES, Given, answers, engine, saved

# more patches than a socket takes at once, images beside each other, text alone
PARTS: list[list[Any]] = [[0, (64, 60), 0], [(4, 4), (6, 2), 0], [0, (2, 14)], [0]]
SIZES = {
    "max_model_len": 1100, "max_num_batched_tokens": 256, "enforce_eager": True,
    "hf_overrides": {"text_config": {"max_position_embeddings": 2048}},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return saved(request.param, folder), folder


def check(hf: Any, folder: Path, size: int, **options: Any) -> None:
    """So many ranks give the tokens and log-probabilities of one in eager mode."""
    prompts = [Given(hf, parts, seed) for seed, parts in enumerate(PARTS)]
    found = []
    for own in ({}, {**options, "tensor_parallel_size": size}):
        llm = engine(folder, **{**SIZES, **own})
        try:
            found.append(answers(llm, prompts, encodes=True))
        finally:
            llm.close()
    for one, other in zip(*found):
        assert one.token_ids == other.token_ids
        for ours, theirs in zip(one.logprobs, other.logprobs):
            assert all(abs(ours[i].logprob - theirs[i].logprob) < 1e-4 for i in theirs)


@pytest.mark.shows("ranks", architectures=NAMES)
def test_two_ranks_give_the_tokens_of_one(both: Any) -> None:
    check(*both, 2)


def test_four_ranks_get_each_image_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have each of the two key-value heads twice."""
    sent: list[str] = []
    send = WorkerGroup.send

    def watched(self: WorkerGroup, name: str, payload: bytes = b"") -> None:
        sent.append(name)
        send(self, name, payload)

    monkeypatch.setattr(WorkerGroup, "send", watched)
    monkeypatch.setattr(encoding_ranks, "GROUP_BYTES", 1)
    check(saved("qwen3", tmp_path), tmp_path, 4)
    assert sent.count("encode") == 4


def test_graphs_of_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    hf = saved("qwen3", tmp_path)
    # every image fits this budget, or is larger than any
    options = {"max_num_batched_tokens": 64, "vision_patch_budgets": [64]}
    check(hf, tmp_path, 2, enforce_eager=False, **options)
