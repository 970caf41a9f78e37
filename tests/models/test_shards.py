"""The parts of a model on several ranks give the logits of the model on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.models import loader
from nanovllm.models.shards import Shard
from nanovllm.runner.runner import Runner
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.load import load_chosen
from nanovllm.startup.resolve import resolve_without_weights
from nanovllm.startup.startup_timer import StartupTimer
from tests.architectures import of_types
from tests.conftest import save_tiny
from tests.models import harness
from tests.models.harness import engine_logits, max_difference, sequences
from tests.models.moe_cases import CASES as MOE_CASES
from tests.models.thread_ranks import ThreadGroup, on_ranks

LENGTHS = ((1, 5), (19, 22), (70, 72))
TOLERANCE = 1e-4
DENSE = ("llama", "mistral", "qwen2", "qwen3")
WITH_EXPERTS = [MOE_CASES[i] for i in (1, 4, 5, 9)]
EIGHT_HEADS = {"num_attention_heads": 8, "hidden_size": 64, "head_dim": 16}


def options(size: int, **changes: Any) -> dict[str, Any]:
    sizes = {
        "device": "cpu",
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "kvcache_block_size": 16,
        "num_kvcache_blocks": 33,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": size,
    }
    return {**sizes, **changes}


def load_rank(config: EngineConfig, group: ThreadGroup) -> Runner:
    resolved = resolve_without_weights(config)
    resolved = replace(resolved, shard=Shard(group.rank, group.size))
    farm = CompileFarm(config)
    return load_chosen(resolved, farm, StartupTimer(), lambda: group).runner


def check(folder: Path, size: int, vocab_size: int, **changes: Any) -> None:
    known = sequences(vocab_size, *LENGTHS)
    alone = engine_logits(harness.load(folder, "cpu", enforce_eager=True), known)
    config = EngineConfig.from_options(str(folder), options(size, **changes))
    found = on_ranks(size, lambda group: engine_logits(load_rank(config, group), known))
    assert len(found) == size
    for logits in found:
        assert max_difference(logits, alone) < TOLERANCE
        assert all(map(torch.equal, logits, found[0]))


@pytest.mark.shows("ranks", architectures=of_types(*DENSE))
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture", DENSE)
def test_dense_models(architecture: str, size: int, tmp_path: Path) -> None:
    """Two key-value heads, so that four ranks have them twice; an odd vocabulary; biases."""
    biases = {"attention_bias": True, "mlp_bias": True} if architecture == "llama" else {}
    tied = {"tie_word_embeddings": size == 2, "vocab_size": 99}
    check(save_tiny(tmp_path / "m", architecture, **tied, **biases), size, 99)


def test_eight_ranks(tmp_path: Path) -> None:
    check(save_tiny(tmp_path / "m", vocab_size=101, **EIGHT_HEADS), 8, 101)


@pytest.mark.shows("ranks", architectures=of_types(*(case.architecture for case in WITH_EXPERTS)))
@pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)
def test_models_with_a_part_of_every_expert(case: Any, tmp_path: Path) -> None:
    check(case.save(tmp_path / "m"), 2, 96, expert_parallel=False)


def test_one_rank_compiles_for_all(tmp_path: Path) -> None:
    folder, known = save_tiny(tmp_path / "m", vocab_size=99), sequences(99, *LENGTHS)
    alone = engine_logits(harness.load(folder, "cpu", enforce_eager=True), known)
    graphs = {
        "enforce_eager": False,
        "graph_batch_sizes": [4],
        "compile_cache": str(tmp_path / "c"),
    }
    config = EngineConfig.from_options(str(folder), options(2, **graphs))

    def work(group: ThreadGroup) -> tuple[int, int, list[torch.Tensor]]:
        runner = load_rank(config, group)
        counts = runner.compiler.num_compiled, runner.compiler.num_loaded
        return *counts, engine_logits(runner, known)

    (num_first, _, logits), (num_other, num_loaded, _) = on_ranks(2, work)
    assert num_first > 0 and num_other == 0 and num_loaded >= num_first
    assert max_difference(logits, alone) < TOLERANCE


def test_parts_of_random_weights_are_those_of_one_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", vocab_size=99)
    choices = [
        resolve_without_weights(EngineConfig.from_options(str(folder), options(size)))
        for size in (1, 2)
    ]
    cpu = torch.device("cpu")
    whole = loader.random(choices[0].model, loader.Target(cpu), 7, int)
    parts = [
        loader.random(choices[1].model, loader.Target(cpu, shard=Shard(rank, 2)), 7, int)
        for rank in range(2)
    ]
    for layer, *of_ranks in zip(whole.layers, *(part.layers for part in parts)):
        joined = torch.cat([one.down_DF for one in of_ranks], dim=1)
        assert torch.equal(joined, layer.down_DF)
        gates, ups = zip(*(one.gate_up_GD.chunk(2) for one in of_ranks))
        assert torch.equal(torch.cat([*gates, *ups]), layer.gate_up_GD)
    joined = torch.cat([part.embed_VD for part in parts])
    assert torch.equal(joined[:99], whole.embed_VD) and not joined[99:].any()


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, "must divide the 4 attention heads"),
        (8, {}, "must divide the 4 attention heads"),
        (4, {"intermediate_size": 126}, "share the 126 rows of model.layers.0.mlp.gate"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share_is_refused(
    size: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=message):
        resolve_without_weights(EngineConfig.from_options(str(folder), options(size)))


def test_options_for_one_rank_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    with pytest.raises(ValueError, match=r"does not go with|cpu:0"):
        resolve_without_weights(EngineConfig.from_options(str(folder), options(2, device="cpu:0")))
