"""Every dense architecture gives transformers' logits after every token of prompts and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm.models.dense import Layer, paged_kv
from nanovllm.models.model import LayerKind
from tests.architectures import of_types
from tests.conftest import save_tiny
from tests.models.harness import (
    BF16,
    Known,
    check_bf16,
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_logits,
)

TOLERANCE = 1e-4
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ORIGINAL_LEN = 64  # for rope types that extend a shorter context
VOCAB_SIZE = 128

# (prompt, total) tokens: a single token, a prompt that needs two steps, no multiple of a block
LENGTHS = ((1, 6), (19, 24), (99, 103), (33, 36))
SHORT_LENGTHS = ((1, 6), (19, 24), (50, 64))  # up to the original length
LONG_LENGTHS = ((66, 70), (99, 103), (65, 66))  # longer than it from the first step on


def rope_fields(rope: str, head_dim: int) -> dict[str, Any]:
    """Parameters of a rope type. longrope has a name for each side of the original length."""
    original = {"original_max_position_embeddings": ORIGINAL_LEN}
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(head_dim // 2)],
        "long_factor": [1.5 + 0.1 * i for i in range(head_dim // 2)],
        "factor": 4.0,
        **original,
    }
    fields: dict[str, dict[str, Any]] = {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, **original},
        "longrope_short": longrope,
        "longrope_long": longrope,
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **original,
        },
    }
    return {"rope_theta": 5000.0, **fields[rope]}


@dataclass(frozen=True)
class Case:
    architecture: str
    rope: str
    heads: tuple[int, int]  # query heads, key-value heads
    head_dim: int
    tied: bool
    # `rope_theta` and `rope_scaling` instead of `rope_parameters` in config.json
    old_spelling: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        spelling = "-old" if self.old_spelling else ""
        sizes = f"{self.heads[0]}x{self.heads[1]}x{self.head_dim}"
        return f"{self.architecture}-{self.rope}{spelling}-{sizes}"

    def save(self, folder: Path) -> Path:
        # hidden_size is not heads * head_dim, to show code that confuses them
        fields = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 256,
            "rope_parameters": rope_fields(self.rope, self.head_dim),
        }
        save_tiny(folder, self.architecture, **{**fields, **self.changes})
        if self.old_spelling:
            respell(folder)
        return folder

    def sequences(self) -> list[Known]:
        lengths = {"longrope_short": SHORT_LENGTHS, "longrope_long": LONG_LENGTHS}.get(
            self.rope, LENGTHS
        )
        return sequences(VOCAB_SIZE, *lengths)

    @property
    def max_model_len(self) -> int:
        return ORIGINAL_LEN if self.rope == "longrope_short" else 128


def respell(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    if parameters["rope_type"] in ("linear", "dynamic"):
        parameters["type"] = parameters.pop("rope_type")  # the name in the oldest files
    path.write_text(json.dumps(config))


BIASED_LLAMA = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"sliding_window": 16}
NO_WINDOW = {"sliding_window": None}
UPPER_WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
MIXED_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 23,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CASES = (
    Case("llama", "default", (4, 4), 32, tied=False),
    Case("llama", "linear", (4, 2), 64, tied=True, old_spelling=True),
    Case("llama", "dynamic", (7, 1), 80, tied=False, changes={"attention_bias": True}),
    Case("llama", "yarn", (14, 2), 128, tied=True, old_spelling=True, changes={"mlp_bias": True}),
    Case("llama", "longrope_short", (4, 2), 32, tied=True, changes=BIASED_LLAMA),
    Case("llama", "longrope_long", (2, 2), 80, tied=False, old_spelling=True),
    Case("llama", "llama3", (4, 2), 64, tied=True, changes=BIASED_LLAMA),
    Case("mistral", "default", (4, 2), 128, tied=False, old_spelling=True, changes=WINDOW),
    Case("mistral", "linear", (7, 1), 32, tied=True, changes=NO_WINDOW),
    Case("mistral", "dynamic", (4, 4), 64, tied=False, old_spelling=True, changes=WINDOW),
    Case("mistral", "yarn", (4, 2), 80, tied=False, changes={"sliding_window": 1}),
    Case("mistral", "longrope_short", (7, 1), 64, tied=True, old_spelling=True, changes=WINDOW),
    Case("mistral", "longrope_long", (4, 2), 32, tied=False, changes=WINDOW),
    Case(
        "mistral",
        "llama3",
        (2, 2),
        128,
        tied=True,
        old_spelling=True,
        changes={"sliding_window": 99},
    ),
    Case("qwen2", "default", (14, 2), 64, tied=True),
    Case("qwen2", "linear", (2, 2), 128, tied=False, old_spelling=True, changes=UPPER_WINDOWS),
    Case("qwen2", "dynamic", (4, 2), 32, tied=True, changes=MIXED_WINDOWS),
    Case("qwen2", "yarn", (4, 4), 64, tied=False, old_spelling=True),
    Case("qwen2", "longrope_short", (4, 2), 80, tied=False, changes=UPPER_WINDOWS),
    Case(
        "qwen2", "longrope_long", (7, 1), 128, tied=True, old_spelling=True, changes=MIXED_WINDOWS
    ),
    Case("qwen2", "llama3", (4, 4), 32, tied=False),
    Case("qwen3", "default", (4, 2), 128, tied=True, old_spelling=True),
    Case("qwen3", "linear", (4, 4), 80, tied=False, changes={"attention_bias": True}),
    Case("qwen3", "dynamic", (14, 2), 32, tied=False, old_spelling=True, changes=UPPER_WINDOWS),
    Case("qwen3", "yarn", (7, 1), 64, tied=True, changes=MIXED_WINDOWS),
    Case("qwen3", "longrope_short", (4, 4), 128, tied=True, old_spelling=True),
    Case(
        "qwen3",
        "longrope_long",
        (4, 2),
        64,
        tied=False,
        changes={"attention_bias": True, **UPPER_WINDOWS},
    ),
    Case("qwen3", "llama3", (7, 1), 32, tied=True, old_spelling=True),
)


def test_cases_cover_every_pair_that_matters() -> None:
    ropes = {case.rope for case in CASES}
    assert len(ropes) == 7
    for architecture in ARCHITECTURES:
        own = [case for case in CASES if case.architecture == architecture]
        assert {case.rope for case in own} == ropes
        assert {case.heads[0] // case.heads[1] for case in own} == {1, 2, 7}
        assert {case.head_dim for case in own} == {32, 64, 80, 128}
        assert {case.tied for case in own} == {case.old_spelling for case in own} == {False, True}
    assert {(case.rope, case.old_spelling) for case in CASES} == {
        (rope, old) for rope in ropes for old in (False, True)
    }


@pytest.mark.shows("eager", architectures=of_types(*ARCHITECTURES))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_logits_are_those_of_transformers(case: Case, device: str, tmp_path: Path) -> None:
    folder, known = case.save(tmp_path), case.sequences()
    runner = load(folder, device, enforce_eager=True, max_model_len=case.max_model_len)
    assert (
        max_difference(engine_logits(runner, known), transformers_logits(folder, known, device))
        <= TOLERANCE
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_logits(architecture: str, device: str, tmp_path: Path) -> None:
    """Batches without padding, with other splits of prompts and another block size."""
    case = next(case for case in CASES if case.architecture == architecture)
    folder, known = case.save(tmp_path), case.sequences()
    sizes = {"max_num_batched_tokens": 48, "kvcache_block_size": 32, "pad_batches": False}
    runner = load(folder, device, enforce_eager=True, **sizes)
    assert (
        max_difference(engine_logits(runner, known), transformers_logits(folder, known, device))
        <= TOLERANCE
    )


# One engine per architecture for every way in which the program of a layer can differ.
GRAPH_CASES = (
    Case(
        "llama", "llama3", (4, 2), 64, tied=True, changes={"num_hidden_layers": 2, **BIASED_LLAMA}
    ),
    Case("mistral", "default", (7, 1), 80, tied=False, changes={"num_hidden_layers": 2, **WINDOW}),
    Case("qwen2", "yarn", (4, 2), 32, tied=True, changes=UPPER_WINDOWS),
    Case(
        "qwen3",
        "default",
        (4, 4),
        128,
        tied=False,
        changes={"num_hidden_layers": 2, "attention_bias": True},
    ),
)
GRAPH_SIZES: dict[str, Any] = {
    "max_num_seqs": 2,
    "graph_batch_sizes": [2],
    "max_num_batched_tokens": 64,
}


@pytest.mark.shows(
    "graph", "GPU", architectures=of_types(*(case.architecture for case in GRAPH_CASES))
)
@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_graph_logits_are_those_of_transformers(case: Case, device: str, tmp_path: Path) -> None:
    folder = case.save(tmp_path)
    runner = load(folder, device, **GRAPH_SIZES)
    if runner.compiler.lowering is None:
        pytest.skip("no lowering for graph mode on this machine")
    assert runner.compiler.num_compiled + runner.compiler.num_loaded >= 6
    for lengths in (((1, 6), (99, 102)), ((19, 24), (32, 33))):
        known = sequences(VOCAB_SIZE, *lengths)
        assert (
            max_difference(engine_logits(runner, known), transformers_logits(folder, known, device))
            <= TOLERANCE
        )


# Mistakes must be visible -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_one_changed_number_in_any_weight_shows(
    architecture: str, device: str, tmp_path: Path
) -> None:
    changes = BIASED_LLAMA if architecture == "llama" else {"attention_bias": True}
    case = Case(
        architecture, "default", (4, 2), 32, tied=False, changes={"num_hidden_layers": 2, **changes}
    )
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, (19, 24))
    runner = load(folder, device, enforce_eager=True)
    expected = transformers_logits(folder, known, device)
    weights = {name: getattr(runner.params.layers[0], name) for name in Layer._fields}
    weights |= {name: getattr(runner.params, name) for name in ("final_norm_D", "head_VD")}
    weights["embed_VD"] = runner.params.embed_VD[known[0].token_ids[3]]
    present = {name: weight for name, weight in weights.items() if weight is not None}
    assert len(present) == 13
    for name, weight in present.items():
        number = weight.view(-1)[5:6]
        number += 0.1
        assert max_difference(engine_logits(runner, known), expected) > TOLERANCE, name
        number -= 0.1
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


def test_a_window_off_by_one_shows(device: str, tmp_path: Path) -> None:
    case = Case("mistral", "default", (4, 2), 32, tied=True, changes=WINDOW)
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, (17, 17), (5, 17))
    runner = load(folder, device, enforce_eager=True)
    expected = transformers_logits(folder, known, device)
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE
    for window in (15, 17):
        kinds = (LayerKind("window", paged_kv(runner.cfg, window)),) * 3
        model = replace(runner.model, layer_kinds=kinds)
        runner.steps = replace(runner.steps, model=model)
        found = engine_logits(runner, known)
        for both in zip(found, expected):  # prefill only, and decode
            assert max_difference(both[:1], both[1:]) > TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_tied_config_with_another_head_is_untied_with_a_warning(
    architecture: str, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(architecture, "default", (4, 2), 32, tied=False)
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, (19, 24))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    runner = load(folder, device, enforce_eager=True)
    assert "the embeddings are not tied, in spite of tie_word_embeddings" in caplog.text
    assert not runner.model.config.tied_embeddings
    assert (
        max_difference(engine_logits(runner, known), transformers_logits(folder, known, device))
        <= TOLERANCE
    )


# bf16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_agrees_up_to_rounding(architecture: str, device: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == architecture)
    folder = replace(case, changes={**case.changes, **BF16}).save(tmp_path)
    check_bf16(folder, device, case.sequences(), enforce_eager=True)


def test_bf16_graphs_agree_up_to_rounding(device: str, tmp_path: Path) -> None:
    case = Case("qwen3", "default", (4, 2), 64, tied=True, changes={"num_hidden_layers": 2, **BF16})
    check_bf16(case.save(tmp_path), device, sequences(VOCAB_SIZE, (1, 6), (99, 102)), **GRAPH_SIZES)
