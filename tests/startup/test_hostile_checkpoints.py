"""A checkpoint's files are data of strangers: they run nothing, and absurd values are errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanovllm import LLM
from nanovllm.hub import resolve
from nanovllm.startup.config_file import transformers_config
from nanovllm.startup.generation_config import default_params, generation_config
from nanovllm.tokenizer import load_full


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint without its weights."""
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for path in resolve("tiny-qwen3").glob("*.json"):
        shutil.copy(path, copied)
    return copied


def edit(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    return path


@pytest.mark.parametrize("in_config", [False, True])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(
    folder: Path, in_config: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = tmp_path / "it-ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")

    def ask(*words: object) -> str:
        raise AssertionError("it asks on stdin")

    monkeypatch.setattr("builtins.input", ask)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )
    if in_config:
        edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    try:
        load_full(folder)
    except ValueError as error:
        assert "needs custom code" in str(error)
    assert not trace.exists()


def test_the_tokenizer_is_told_that_no_code_may_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **options: asked.append(options)
    )
    load_full(folder)
    assert asked == [{"trust_remote_code": False}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("vocab_size", 10**12),
        ("hidden_size", 10**12),
        ("intermediate_size", 1e12),
        ("num_attention_heads", 10**12),
        ("max_position_embeddings", 10**30),
        ("text_config", {"num_hidden_layers": 10**12}),
    ],
)
def test_an_absurd_size_is_named_before_anything_is_made_of_it(
    folder: Path, name: str, value: Any
) -> None:
    path = edit(folder / "config.json", **{name: value})
    inner = "num_hidden_layers" if isinstance(value, dict) else name
    with pytest.raises(ValueError, match=rf"config\.json: {inner} is 1.*: it must be at most"):
        transformers_config(path, {})
    with pytest.raises(ValueError, match=rf"{inner} is 1"):  # nor may an override have it
        transformers_config(resolve("tiny-qwen3") / "config.json", {name: value})


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "[1,2]", "{", "\xff"])
def test_json_that_is_nested_too_deeply_or_is_no_object_is_named(folder: Path, text: str) -> None:
    path = folder / "generation_config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        generation_config(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -1), ("top_k", "x" * 100), ("max_new_tokens", -(10**12))]
)
def test_absurd_defaults_for_sampling_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError):
        default_params({key: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"intermediate_size": 1 << 24}, r"shape \[\d+, 256\], but the config asks for \d+"),
        ({"num_attention_heads": 1 << 16}, "but the config asks for"),
        ({"max_position_embeddings": 10**12}, "1000000000000 tokens: it must have at most"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1e30,
                                 "original_max_position_embeddings": 10**15}},
            "the longest sequence has 1.* tokens",
        ),
    ],
    ids=["wide", "heads", "long", "rope"],
)  # fmt: skip
def test_a_config_that_asks_for_more_than_is_stored_gets_no_memory(
    folder: Path, changes: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(resolve("tiny-qwen3") / "model.safetensors", folder)
    edit(folder / "config.json", **changes)
    sizes: list[int] = []
    empty = torch.empty

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        sizes.append(math.prod(args[0]) if args and isinstance(args[0], tuple) else 0)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", noted)
    with pytest.raises(ValueError, match=match):
        LLM(str(folder), device="cpu", enforce_eager=True)
    assert max(sizes, default=0) < 1 << 24
