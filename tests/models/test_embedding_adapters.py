"""Adapters of the head and of the table of tokens give the numbers of PEFT's, merged and not.

PEFT's module of a head is beside the table's, also if both have one weight. So the merged model of
a tied one has two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, LoRARequest
from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import AdapterError
from tests.engines import drain, greedy
from tests.models import lora_cases, test_shards
from tests.models.families import FAMILIES, VOCAB_SIZE
from tests.models.harness import (
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_logits,
    transformers_model,
)
from tests.models.lora_cases import ALPHA, CONFIG, PREFIX, RANK, WEIGHTS
from tests.models.thread_ranks import ThreadGroup, on_ranks

TOLERANCE = 1e-4
LORA: dict[str, Any] = {
    "enable_lora": True, "max_loras": 2, "max_lora_rank": 5, "lora_embeddings": True
}  # fmt: skip
TABLE, HEAD = "model.embed_tokens", "lm_head"
# with a head of its own; tied, where the table is stored with a factor; with norms of another kind
NAMES = ("granite-untied", "gemma3", "cohere")


class Case(NamedTuple):
    folder: Path
    adapter: Path
    merged: Path


def save_adapter(folder: Path, checkpoint: Path, seed: int = 0, *, ties: bool = False) -> Path:
    """An adapter of q, the table and the head, as PEFT writes it: with copies of both weights."""
    lora_cases.save_adapter(
        folder, checkpoint, seed=seed, std=0.2, named=lambda module: module.endswith("q_proj"),
        target_modules=["q_proj", "embed_tokens", *([] if ties else ["lm_head"])],
        ensure_weight_tying=ties,
    )  # fmt: skip
    weights, tensors = load_file(checkpoint / "model.safetensors"), load_file(folder / WEIGHTS)
    table_VD = weights[f"{TABLE}.weight"]
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    a_RV, b_DR = drawn(RANK, VOCAB_SIZE), drawn(table_VD.shape[1], RANK)
    a_RD, b_VR = drawn(RANK, table_VD.shape[1]), drawn(VOCAB_SIZE, RANK)
    if ties:
        a_RD, b_VR = b_DR.t().contiguous(), a_RV.t().contiguous()
    tensors |= {
        f"{PREFIX}{TABLE}.lora_embedding_A": a_RV,
        f"{PREFIX}{TABLE}.lora_embedding_B": b_DR,
        f"{PREFIX}{HEAD}.lora_A.weight": a_RD,
        f"{PREFIX}{HEAD}.lora_B.weight": b_VR,
        f"{PREFIX}{TABLE}.base_layer.weight": table_VD,
        f"{PREFIX}{HEAD}.base_layer.weight": weights.get(f"{HEAD}.weight", table_VD).clone(),
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def save_merged(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """The checkpoint with table and head, which are no longer tied, and the rest merged."""
    path, tensors = checkpoint / "model.safetensors", load_file(adapter / WEIGHTS)
    untied = folder.with_name(folder.name + "-untied")
    untied.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(path)
    weights.setdefault(f"{HEAD}.weight", weights[f"{TABLE}.weight"].clone())
    a_RV, b_DR = (tensors[f"{PREFIX}{TABLE}.lora_embedding_{one}"].double() for one in "AB")
    delta_VD = (b_DR @ a_RV).t() * (ALPHA / RANK)
    weights[f"{TABLE}.weight"] = (weights[f"{TABLE}.weight"].double() + delta_VD).float()
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    return lora_cases.save_merged(folder, untied, adapter)


def make_case(root: Path, name: str, *, ties: bool = False) -> Case:
    family = next(one for one in FAMILIES if one.name == name)
    folder = family.save(root / "model")
    adapter = save_adapter(root / "adapter", folder, ties=ties)
    return Case(folder, adapter, save_merged(root / "merged", folder, adapter))


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


def test_logits_are_those_of_the_merged_model(case: Case) -> None:
    known = sequences(VOCAB_SIZE, (1, 4), (19, 21))
    runner = load(case.folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(runner, case.adapter, 2)
    found, expected = engine_logits(runner, known), transformers_logits(case.merged, known, "cpu")
    assert max_difference(found, expected) < TOLERANCE
    runner.state.adapter_S.fill_(0)  # type: ignore[union-attr]
    plain = transformers_logits(case.folder, known, "cpu")
    assert max_difference(engine_logits(runner, known), plain) < TOLERANCE
    assert max_difference(found, plain) > 100 * TOLERANCE


def test_ranks_have_their_parts(case: Case) -> None:
    """The vocabulary is odd: the last rank's part is padded."""
    known = sequences(VOCAB_SIZE, (1, 4), (19, 21))
    config = EngineConfig.from_options(str(case.folder), test_shards.options(2, **LORA))

    def logits(group: ThreadGroup) -> list[torch.Tensor]:
        runner = test_shards.load_rank(config, group)
        lora_cases.use(runner, case.adapter)
        return engine_logits(runner, known)

    expected = transformers_logits(case.merged, known, "cpu")
    for found in on_ranks(2, logits):
        assert max_difference(found, expected) < TOLERANCE


def test_a_head_that_peft_ties_is_the_tables_adapter(tmp_path: Path) -> None:
    """With ensure_weight_tying the config does not name the head."""
    case = make_case(tmp_path, "gemma3", ties=True)
    known = sequences(VOCAB_SIZE, (19, 21))
    runner = load(case.folder, "cpu", enforce_eager=True, **LORA)
    lora_cases.use(runner, case.adapter)
    expected = transformers_logits(case.merged, known, "cpu")
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE


MODES: dict[str, dict[str, Any]] = {
    "eager": {"device": "cpu", "enforce_eager": True},
    "graph": {"device": "cpu", "graph_batch_sizes": (4,)},
    "cuda": {"device": "cuda"},
}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eager", "graph", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_of_a_batch_have_their_own(mode: str, tmp_path: Path) -> None:
    """Answers, and log-probabilities of answers and prompts, with drafts of the prompts' tokens.
    Loading compiles nothing."""
    case = make_case(tmp_path, "gemma3")
    other = save_adapter(tmp_path / "other", case.folder, seed=1)
    models = [
        transformers_model(one, "cpu")
        for one in (case.folder, case.merged, save_merged(tmp_path / "both", case.folder, other))
    ]
    llm = LLM(
        str(case.folder), dtype="float32", max_model_len=64, kvcache_block_size=16,
        max_num_seqs=4, max_num_batched_tokens=64, num_kvcache_blocks=30,
        skip_tokenizer_init=True, **MODES[mode], **LORA,
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    )  # fmt: skip
    num_programs = llm.engine.runner.compiler.num_compiled
    asked = [None, LoRARequest("a", 1, str(case.adapter)), LoRARequest("b", 2, str(other))]
    prompts = [[5, 9, 33, 71, 20], [8, 14] * 6, [41]]
    params = greedy(8, logprobs=2, prompt_logprobs=0)
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        ids = [
            llm.engine.add_request(prompt, params, incremental=False, lora_request=asked[i])
            for prompt, i in zip(prompts, order)
        ]
        done = drain(llm)
        for prompt, i, one in zip(prompts, order, ids):
            answer = done[one].token_ids
            logits_TV = models[i](torch.tensor([prompt + answer])).logits[0, :-1]
            assert answer == logits_TV[len(prompt) - 1 :].argmax(-1).tolist()
            of_prompt, of_answer = done[one].prompt_logprobs, done[one].logprobs
            assert of_prompt is not None and of_answer is not None
            found = [top for top in (*of_prompt, *of_answer) if top is not None]
            for expected_V, top in zip(logits_TV.log_softmax(-1), found, strict=True):
                for token_id, given in top.items():
                    assert abs(given.logprob - expected_V[token_id]) < TOLERANCE
    assert llm.engine.runner.compiler.num_compiled == num_programs
    llm.close()


def test_what_has_no_slots_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "granite-untied")
    known = load(case.folder, "cpu", enforce_eager=True, **{**LORA, "lora_embeddings": False})
    with pytest.raises(AdapterError, match="need the option lora_embeddings=True"):
        known.check_adapter(1, case.adapter)
    runner = load(case.folder, "cpu", enforce_eager=True, **LORA)
    fields, tensors = (case.adapter / CONFIG).read_text(), load_file(case.adapter / WEIGHTS)
    (tmp_path / CONFIG).write_text(fields)
    edits = {
        f"{TABLE}.base_layer.weight": (VOCAB_SIZE + 1, 56, "is not a copy of the model's table"),
        "model.layers.0.mlp.up_proj.base_layer.weight": (56, 56, "is not a copy of the model's"),
        f"{TABLE}.lora_embedding_A": (RANK, VOCAB_SIZE + 1, r"embed_tokens has lora_A \[4, 100\]"),
        f"{TABLE}.lora_A.weight": (RANK, VOCAB_SIZE, "embed_tokens is not a linear layer"),
        f"{HEAD}.lora_embedding_A": (RANK, 56, "lm_head is not a linear layer"),
    }
    for name, (rows, columns, error) in edits.items():
        save_file({**tensors, PREFIX + name: torch.ones(rows, columns)}, tmp_path / WEIGHTS)
        with pytest.raises(AdapterError, match=error):
            runner.check_adapter(1, tmp_path)
