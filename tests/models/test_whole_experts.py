"""Ranks with whole experts (expert parallelism) give the logits of one, and read only their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nanovllm
from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.config import MoeConfig
from nanovllm.models.experts.expert_parallel import ExpertParallel
from nanovllm.models.experts.stacked import Stacked
from nanovllm.models.moe import SparseLayer
from nanovllm.models.shards import Shard
from nanovllm.startup.expert_parallel import QUANTIZED_STEP, places_whole_experts
from nanovllm.startup.resolve import resolve_without_weights
from tests.conftest import save_tiny
from tests.models import harness
from tests.models.harness import engine_logits, max_difference, sequences
from tests.models.moe_cases import CASES
from tests.models.routes import edit
from tests.models.test_shards import LENGTHS, TOLERANCE, check, load_rank, options
from tests.models.thread_ranks import ThreadGroup, on_ranks

TINY_MIXTRAL = Path(nanovllm.__file__).parent / "assets" / "tiny-mixtral"
# mixtral, qwen2_moe with a shared expert and a dense layer, qwen3_moe with stacked tensors
SHARED = [CASES[i] for i in (1, 5, 9)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_logits_are_those_of_one_rank(case: Any, size: int, tmp_path: Path) -> None:
    check(case.save(tmp_path / "m"), size, 96, expert_parallel=True)


@pytest.mark.parametrize("size", [2, 4])
def test_the_embedded_model_gives_the_logits_of_one_rank(size: int) -> None:
    check(TINY_MIXTRAL, size, 640, expert_parallel=True)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_rank_reads_its_own_experts_alone(is_stacked: bool, tmp_path: Path) -> None:
    case = CASES[9 if is_stacked else 5]
    folder = case.save(tmp_path / "m")
    whole, *ranks = (loaded(folder, rank, size) for rank, size in ((0, 1), (0, 4), (1, 4), (3, 4)))
    assert len(whole) > 0
    for layer, *parts in zip(whole, *ranks):
        for rank, part in zip((0, 1, 3), parts):
            own = slice(4 * rank, 4 * rank + 4)
            assert torch.equal(part.experts.gate_up_EGD, layer.experts.gate_up_EGD[own])
            assert torch.equal(part.experts.down_EDF, layer.experts.down_EDF[own])
            assert torch.equal(part.router_ED, layer.router_ED)
            places = [-1] * 16
            places[own] = range(4)
            assert part.experts.local_X.tolist() == places


def loaded(folder: Path, rank: int, size: int, **changes: Any) -> list[SparseLayer]:
    """The sparse layers of a rank as the loader reads them."""
    whole = {"expert_parallel": size > 1, **changes}
    model = resolve_without_weights(
        EngineConfig.from_options(str(folder), options(size, **whole))
    ).model
    target = loader.Target(torch.device("cpu"), shard=Shard(rank, size))
    if whole.get("random_weights"):
        layers = loader.random(model, target, 7, int).layers
    else:
        layers = loader.load(model, folder, target, int).layers
    return [layer for layer in layers if isinstance(layer, SparseLayer)]


def test_random_weights_of_ranks_are_those_of_one_model(tmp_path: Path) -> None:
    folder = CASES[5].save(tmp_path / "m")
    whole, *ranks = (
        loaded(folder, rank, size, random_weights=True) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert len(whole) > 0
    for layer, *parts in zip(whole, *ranks):
        for name in Stacked._fields:
            joined = torch.cat([getattr(part.experts, name) for part in parts])
            assert torch.equal(joined, getattr(layer.experts, name))


def test_nan_in_an_expert_of_one_rank_reaches_only_tokens_that_choose_it(tmp_path: Path) -> None:
    """With one layer, a token that does not choose the expert has the logits of before."""
    folder = save_tiny(
        tmp_path / "m", "mixtral", vocab_size=96, num_hidden_layers=1, num_local_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    known = sequences(96, (19, 22))
    before = whole_experts_logits(folder, known)
    edit(folder, _spoil(6))
    after = whole_experts_logits(folder, known)
    is_bad = after[0].isnan().any(-1)
    assert 0 < is_bad.sum() < len(is_bad)
    assert max_difference([after[0][~is_bad]], [before[0][~is_bad]]) == 0.0


def whole_experts_logits(folder: Path, known: Any) -> list[Tensor]:
    config = EngineConfig.from_options(str(folder), options(2, expert_parallel=True))
    return on_ranks(2, lambda group: engine_logits(load_rank(config, group), known))[1]


def _spoil(expert: int) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if f".experts.{expert}." in name:
                weight.fill_(torch.nan)

    return change


def test_graphs_that_one_rank_compiles_serve_all(tmp_path: Path) -> None:
    folder, known = CASES[5].save(tmp_path / "m"), sequences(96, *LENGTHS)
    alone = engine_logits(harness.load(folder, "cpu", enforce_eager=True), known)
    graphs = {"enforce_eager": False, "graph_batch_sizes": [4], "expert_parallel": True}
    store = {"compile_cache": str(tmp_path / "c")}
    config = EngineConfig.from_options(str(folder), options(2, **graphs, **store))

    def work(group: ThreadGroup) -> tuple[int, int, list[Tensor]]:
        runner = load_rank(config, group)
        assert isinstance(runner.params.layers[0].experts, ExpertParallel)
        counts = runner.compiler.num_compiled, runner.compiler.num_loaded
        return *counts, engine_logits(runner, known)

    (num_first, _, logits), (num_other, num_loaded, others) = on_ranks(2, work)
    assert num_first > 0 and num_other == 0 and num_loaded >= num_first
    assert max_difference(logits, alone) < TOLERANCE
    assert all(map(torch.equal, logits, others))


@pytest.mark.parametrize(
    ("num_experts", "width", "num_ranks", "is_whole"),
    [
        (128, 768, 2, False),  # Qwen3-30B-A3B
        (128, 768, 4, False),
        (128, 768, 8, True),  # 96 of the width
        (8, 14336, 8, False),  # Mixtral 8x7B
        (60, 1408, 4, False),  # Qwen1.5-MoE
        (64, 1400, 2, True),  # 700 is no multiple of 8
        (60, 256, 8, False),  # 60 experts cannot be shared: 32 of the width
        (8, 257, 2, True),
    ],
)
def test_auto_places_whole_experts_where_parts_would_be_narrow(
    num_experts: int, width: int, num_ranks: int, is_whole: bool
) -> None:
    moe = MoeConfig(num_experts, 4, width, normalize=True)
    assert places_whole_experts(moe, num_ranks) == is_whole


@pytest.mark.parametrize(("num_ranks", "is_whole"), [(2, False), (4, True), (8, True)])
def test_auto_cuts_no_blocks_of_quantized_experts(num_ranks: int, is_whole: bool) -> None:
    """gpt-oss: 720 columns of 2,880 are no multiple of 32."""
    moe = MoeConfig(32, 4, 2880, normalize=True)
    assert places_whole_experts(moe, num_ranks, QUANTIZED_STEP) == is_whole
    assert places_whole_experts(moe, 4) is False


@pytest.mark.parametrize(("width", "form"), [(256, Stacked), (128, ExpertParallel)])
def test_auto_is_applied_to_the_model(width: int, form: type, tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width}
    folder = save_tiny(tmp_path / "m", "mixtral", **sizes)
    layers = loaded(folder, 1, 2, expert_parallel="auto")
    assert all(isinstance(layer.experts, form) for layer in layers)


@pytest.mark.parametrize(
    ("architecture", "changes", "size", "message"),
    [
        (
            "mixtral",
            {"num_local_experts": 6, "num_experts_per_tok": 2},
            4,
            "expert_parallel is True and tensor_parallel_size 4, which must divide the 6 experts",
        ),
        ("qwen3", {}, 2, "expert_parallel is True, but Qwen3ForCausalLM has no experts"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    architecture: str, changes: dict[str, Any], size: int, message: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "m", architecture, **changes)
    config = EngineConfig.from_options(str(folder), options(size, expert_parallel=True))
    with pytest.raises(ValueError, match=message):
        resolve_without_weights(config)


def test_experts_that_cannot_be_shared_are_split_by_auto(tmp_path: Path) -> None:
    check(CASES[4].save(tmp_path / "m"), 2, 96)
