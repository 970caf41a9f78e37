"""The steps of an engine with a proposer whose layers may be one kernel: plain ones, and those that
verify drafts of few rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm import LLM, EngineConfig
from nanovllm.compile.lower.persistent import plan as plans
from nanovllm.compile.store import Store
from nanovllm.models.model import Batch
from nanovllm.runner import persistent
from nanovllm.runner.persistent import Form, Parts, PersistentSteps
from nanovllm.startup.compile_farm.builder import small_runner
from nanovllm.startup.resolve import resolve_without_weights
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.speculation import head_config
from tests.compile.persistent_cases import error
from tests.conftest import save_tiny
from tests.engine.test_ended_drafts import GRAPHS
from tests.engine.test_speculation_pairs import PROMPTS, heads, opened, speculative, target
from tests.engines import greedy, tokens

__all__ = ["heads", "target"]  # fixtures


class Refusing:
    """`PersistentSteps` of a device that has none, and what it is asked for."""

    def __init__(self) -> None:
        self.begun: list[Form] = []
        self.prepared: set[Form] = set()
        self.asked: set[Form] = set()

    def may_take(self, form: Form) -> bool:
        return True

    def begin(self, parts: Parts, h_RD: Tensor, batch: Batch, forms: Sequence[Form]) -> None:
        assert parts.is_plain
        self.begun += forms

    def prepare(
        self, parts: Parts, h_RD: Tensor, batch: Batch, *, has_several: bool = False
    ) -> None:
        self.prepared.add(self.form(h_RD, batch, has_several))

    def logits(
        self, cos_sin_MH: Tensor, h_RD: Tensor, batch: Batch, *, has_several: bool = False
    ) -> None:
        self.asked.add(self.form(h_RD, batch, has_several))

    def form(self, h_RD: Tensor, batch: Batch, has_several: bool) -> Form:
        """That of a step, each of whose rows is one for the layers."""
        assert len(batch.seq_len_R) == len(batch.block_table_RP) == len(h_RD)
        return Form(len(h_RD), has_several)

    def check_later(self, *_: object) -> None:
        return None


def reading(head: Path, layers: list[int], folder: Path) -> Path:
    """A copy of a head that reads other layers."""
    shutil.copytree(head, folder)
    config = json.loads((folder / "config.json").read_text())
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "adapts"),
    [(None, True), ("ngram", False), ("draft_model", True), ("eagle3", True), ("eagle3", False)],
)
def test_all_decode_steps_may_be_one_kernel(
    method: str | None, adapts: bool, target: Path, heads: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake, chosen = Refusing(), []
    heads = {**heads, "eagle3": reading(heads["eagle3"], [1, 3, 0], tmp_path / "head")}
    monkeypatch.setattr(persistent, "chosen", lambda *args: chosen.append(args) or fake)
    options: dict[str, Any] = {}
    if method is not None:
        tuning = {"adapt_draft_length": adapts, "run_ahead": 1}
        options = {**speculative(method, heads), "tuning": tuning}
    with opened(target, **{**GRAPHS, **options}) as llm:
        runner = llm.engine.runner
        forms = {Form(1), Form(2)}
        for num in runner.layout.verify_tokens:
            forms |= {Form(rows * num, has_several=True) for rows in (1, 2)}
        assert len(forms) == 2 if method is None else len(forms) > 3
        assert set(fake.begun) == fake.prepared == forms
        assert len(fake.begun) == len(forms)
        assert fake.asked >= forms  # at warm-up
        drafting = runner.steps.drafting
        layers = drafting.proposer.layers if method == "eagle3" else ()
        _, _, kept = chosen[-1]
        assert tuple(kept) == layers
        for place, layer in enumerate(layers):
            assert kept[layer].data_ptr() == drafting.states_TLD[:, place].data_ptr()
        assert len(tokens(llm, PROMPTS[:1], greedy(5))[0]) == 5


@pytest.mark.parametrize(("heads", "is_taken"), [(128, True), (32, False)])
def test_a_worker_stores_the_plan_that_starts_read(
    heads: int, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or why there is none. The worker has fewer layers and blocks."""
    monkeypatch.setattr(persistent.lowered, "num_programs", lambda device: 7)
    monkeypatch.setattr(persistent.lowered, "compile_kernel", lambda *_, **options: None)
    monkeypatch.setattr(PersistentSteps, "prepare", lambda *_, **options: None)
    folder = save_tiny(tmp_path / "model", dtype="bfloat16", head_dim=heads, num_hidden_layers=4)
    options = {
        **GRAPHS, "dtype": "bfloat16", "max_model_len": 64, "device": "cpu",
        "num_kvcache_blocks": 9, "compile_cache": tmp_path / "store",
        "tuning": {"persistent_step": True},
    }  # fmt: skip
    worker = small_runner(resolve_without_weights(EngineConfig(str(folder), **options)))
    for kind, size in worker.layout.buckets:
        worker.run_bucket(kind, size)
    entries = list(Store(tmp_path / "store").entries())
    assert [entry.name for entry in entries if entry.kind == "plan"] == ["plan_1"]
    monkeypatch.setattr(plans, "trace", lambda *_, **options: pytest.fail("a region is read"))
    with closing(LLM(str(folder), **options, compile_cache_mode="require")) as llm:
        runner = llm.engine.runner
        assert runner.compiler.num_loaded == worker.compiler.num_compiled
        made = runner.steps.persistent
        assert set(made._schedules) == ({Form(1), Form(2)} if is_taken else set())
        assert [one.plan.num_layers for one in made._schedules.values()] == [4, 4] * is_taken
        assert all("heads of 32" in why for why in made.reasons.values())


@pytest.mark.gpu
def test_a_step_of_one_kernel_verifies_and_keeps_what_a_head_reads(tmp_path: Path) -> None:
    """On a GPU: logits of each token, and hidden states after the layers that the head reads, as of
    several kernels, for two rows of four tokens."""
    shape = {**CONFIGS["Qwen3-0.6B"], "num_hidden_layers": 8, "vocab_size": 512, "eos_token_id": 0}
    for name, config in (("model", shape), ("head", head_config(shape, "eagle3"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    given = {
        "method": "eagle3", "model": str(tmp_path / "head"), "num_speculative_tokens": 3,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0,
    }  # fmt: skip
    llm = LLM(
        str(tmp_path / "model"), random_weights=True, skip_tokenizer_init=True, max_num_seqs=2,
        graph_batch_sizes=[2], max_model_len=256, max_num_batched_tokens=256,
        gpu_memory_utilization=0.3, speculative_config=given,
        tuning={"persistent_step": True, "adapt_draft_length": False},
    )  # fmt: skip
    with closing(llm), torch.no_grad():
        made = tokens(llm, [[5, 6, 7], list(range(100))], greedy(40))
        assert [len(one) for one in made] == [40, 40]
        runner = llm.engine.runner
        assert {Form(2), Form(8, True)} <= set(runner.steps.persistent.steps)
        step = runner.buckets.verify(2, 4)
        for row, (first, pos) in enumerate(((1, 70), (3, 20))):
            runner.state.block_tables[0][row, :2] = torch.tensor([first, first + 1])
            runner.state.pos_S[row] = pos
        token_ids = np.arange(8) + 9
        step.fill(runner.buckets.span_arrays([0, 1], [4, 4], token_ids, 8, 2))
        states = runner.steps.drafting.states_TLD
        found = []
        for own in (runner.steps.persistent, None):
            steps = replace(runner.steps, persistent=own)
            states[:8].zero_()
            logits_TV, _ = steps.verify_logits(step.span, 4)
            found.append((logits_TV.clone(), states[:8].clone()))
        runner.steps.persistent.steps[Form(8, True)].check()
    for own, usual in zip(*found):
        assert not torch.equal(own, usual)
        assert error(own, usual) < 4e-2
