"""Files of texts: the command embed, and batch jobs of models that pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nanovllm
from nanovllm import LLM, PoolingParams
from nanovllm.batch import command
from nanovllm.cli.main import run
from tests.pooling.pooling_cases import assert_near, embeddings, pooling_llm, save_decoder

TEXTS = ["the cat", "a cat", "an error on the ban"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_decoder(folder)
    return folder


@pytest.fixture
def llm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine that the commands get in place of a new one."""
    llm = pooling_llm(folder)

    def make(model: str, **options: Any) -> LLM:
        assert (model, options) == (str(folder), {"task": "embed"})
        return llm

    monkeypatch.setattr(nanovllm, "LLM", make)
    monkeypatch.setattr(command, "load_engine", lambda config: llm.shared)
    yield llm
    llm.close()


def written(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "in")


def test_lines_are_embedded_in_their_order(llm: LLM, folder: Path, tmp_path: Path) -> None:
    wanted = embeddings(llm, TEXTS, pooling_params=PoolingParams(dimensions=8))
    target = tmp_path / "out.jsonl"
    words = [written(tmp_path, *TEXTS), "--model", str(folder), "--dimensions", "8"]
    run("embed", [*words, "--no-progress", "-o", str(target)])
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [one["index"] for one in found] == [0, 1, 2]
    assert_near([torch.tensor(one["embedding"]) for one in found], wanted, atol=1e-6)


def test_an_array_has_a_row_for_each_line(llm: LLM, folder: Path, tmp_path: Path) -> None:
    wanted = embeddings(llm, TEXTS)
    target = tmp_path / "out.npy"
    words = [written(tmp_path, *TEXTS), "--model", str(folder), "--no-progress"]
    run("embed", [*words, "-o", str(target)])
    found = np.load(target)
    assert found.dtype == np.float32
    assert_near(list(torch.from_numpy(found)), wanted, atol=1e-6)


def test_an_empty_line_is_named(llm: LLM, folder: Path, tmp_path: Path) -> None:
    words = [written(tmp_path, "a", "", "b"), "--model", str(folder), "--no-progress"]
    with pytest.raises(ValueError, match="line 2 is empty"):
        run("embed", words)


def test_a_batch_job_writes_the_numbers_of_each_row(llm: LLM, folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": text} for text in TEXTS]
    rows[1]["params"] = {"dimensions": 5}  # type: ignore[assignment]
    rows.append({"prompt": "a", "id": "bad", "params": {"temperature": 0}})  # type: ignore[dict-item]
    source = written(tmp_path, *map(json.dumps, rows))
    target = tmp_path / "out"
    words = [source, "-o", str(target), "--model", str(folder), "--task", "embed"]
    assert run("batch", [*words, "--no-progress"]) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    data = [torch.tensor(one["data"]) for one in found[:3]]
    whole = embeddings(llm, TEXTS)
    assert_near([data[0], data[2]], [whole[0], whole[2]], atol=1e-6)
    assert len(data[1]) == 5 and found[0]["usage"]["prompt_tokens"] > 0
    assert found[3]["error"] == "params has 'temperature', which is not a pooling parameter"


def test_the_input_of_embed_is_not_its_output(tmp_path: Path) -> None:
    source, link = Path(written(tmp_path, *TEXTS)), tmp_path / "link"
    link.symlink_to(source)
    before = source.read_text()
    for target in (source, link):
        with pytest.raises(ValueError, match="is the input: use another file with -o"):
            run("embed", [str(source), "-o", str(target), "--model", "none"])
        assert source.read_text() == before


def test_an_older_output_of_embed_stays_if_the_model_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str, **options: Any) -> LLM:
        raise ValueError("no such model")

    monkeypatch.setattr(nanovllm, "LLM", fail)
    target = tmp_path / "old.jsonl"
    target.write_text("old\n")
    with pytest.raises(ValueError, match="no such model"):
        run("embed", [written(tmp_path, *TEXTS), "-o", str(target), "--model", "none"])
    assert target.read_text() == "old\n"
