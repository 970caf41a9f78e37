"""Qwen3-VL with experts: the tensors of its release, experts on the host, experts of several ranks.

Logits and tokens are compared with transformers' in test_vision_text.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.compile.trace import tensors
from nanovllm.config import EngineConfig
from nanovllm.models import loader, transposed
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.model import Params
from nanovllm.models.shards import Shard
from nanovllm.startup.resolve import resolve_without_weights
from tests.models import test_vision_text
from tests.models.routes import edit
from tests.models.test_shards import check, options
from tests.models.test_vision_text import Given, answers, engine, qwen3_moe, saved

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def turned(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The checkpoint with these tensors of experts transposed, as the release has them."""
    return lambda found: {
        name: weight.mT.contiguous() if name.endswith(names) else weight
        for name, weight in found.items()
    }


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    folder = tmp_path_factory.mktemp("model")
    return saved("qwen3_moe", folder), folder


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with four experts, which ranks can share."""

    def made() -> object:
        config = qwen3_moe().config
        config.text_config.num_experts = 4
        return type(qwen3_moe())(config)

    monkeypatch.setitem(test_vision_text.MODELS, "four", made)
    saved("four", tmp_path / "m")
    return tmp_path / "m"


def loaded(folder: Path, rank: int = 0, size: int = 1, *, expert_parallel: bool = False) -> Params:
    config = EngineConfig.from_options(
        str(folder), options(size, **({"expert_parallel": expert_parallel} if size > 1 else {}))
    )
    model = resolve_without_weights(config).model
    target = loader.Target(torch.device("cpu"), shard=Shard(rank, size))
    return loader.load(model, folder, target, int)


@pytest.mark.parametrize(("size", "expert_parallel"), [(1, False), (2, False), (4, True)])
@pytest.mark.parametrize("staged_bytes", [1, transposed.STAGED_BYTES])
def test_the_layout_of_the_release_gives_the_same_weights(
    size: int, expert_parallel: bool, staged_bytes: int, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transposed, "STAGED_BYTES", staged_bytes)
    ranks = range(size)
    usual = [loaded(four, rank, size, expert_parallel=expert_parallel) for rank in ranks]
    edit(four, turned(GATE_UP, DOWN))
    for rank, expected in zip(ranks, usual):
        found = loaded(four, rank, size, expert_parallel=expert_parallel)
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_matrices_of_two_orientations_are_refused(name: str, four: Path) -> None:
    edit(four, turned(name))
    with pytest.raises(CheckpointError, match=rf"matrices of .*{name} are transposed, and those"):
        loaded(four)


def test_square_matrices_beside_transposed_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their shape does not say whether they are transposed."""

    def made() -> object:
        config = qwen3_moe().config
        config.text_config.moe_intermediate_size = 32  # gate and up are 64 x 64
        return type(qwen3_moe())(config)

    monkeypatch.setitem(test_vision_text.MODELS, "square", made)
    saved("square", tmp_path)
    loaded(tmp_path)
    edit(tmp_path, turned(GATE_UP, DOWN))
    with pytest.raises(CheckpointError, match=f"{DOWN} are transposed, and those of .*{GATE_UP}"):
        loaded(tmp_path)


@pytest.mark.parametrize("is_whole", [False, True])
def test_ranks_give_the_logits_of_one(is_whole: bool, four: Path) -> None:
    check(edit(four, turned(GATE_UP, DOWN)), 2, 99, expert_parallel=is_whole)


def test_experts_on_the_host_give_the_same_tokens(hf: tuple[object, Path]) -> None:
    whole, folder = hf
    prompts = [Given(whole, parts, seed=2) for parts in ([0, (8, 12), 0], [(4, 4), 0])]
    found = []
    for offloaded in ({}, {"expert_offload": 3}):
        llm = engine(folder, enforce_eager=True, max_num_batched_tokens=16, **offloaded)
        try:
            found.append([one.token_ids for one in answers(llm, prompts, encodes=True)])
        finally:
            llm.close()
    assert found[0] == found[1]
