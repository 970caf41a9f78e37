"""Files of tensors are opened once, read by several threads, and closed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.models import checkpoint as files
from nanovllm.models.checkpoint import Checkpoint, CheckpointError

SHAPES = {"one": (1,), "odd": (19, 7), "experts": (3, 99, 5), "large": (989, 11)}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[64, 1 << 24], ids=["many pieces", "one piece each"])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "PIECE_BYTES", request.param)
    return int(request.param)


def write(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three files with the tensors of `SHAPES` for three layers; returns all of them."""
    tensors = {}
    for idx in range(3):
        part = {f"{idx}.{name}": torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
        save_file(part, folder / f"part_{idx}.safetensors")
        tensors |= part
    return tensors


def read(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> Any:
    """All tensors, in an order that is not that of the files, into memory full of NaN."""
    found = {
        name: torch.full_like(tensors[name], float("nan"), dtype=dtype, device=device)
        for name in sorted(tensors, key=lambda name: name[::-1])
    }
    with Checkpoint(folder) as checkpoint:
        checkpoint.read(found.items())
    return found


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES[1:])
def test_tensors_are_read_exactly_to_any_dtype(
    stored: torch.dtype, wanted: torch.dtype, piece_bytes: int, tmp_path: Path, device: str
) -> None:
    tensors = write(tmp_path, stored)
    found = read(tmp_path, tensors, wanted, device)
    assert all(torch.equal(found[name].cpu(), tensors[name].to(wanted)) for name in tensors)


def test_rows_are_those_of_the_tensor(tmp_path: Path) -> None:
    tensors = write(tmp_path, torch.bfloat16)
    with Checkpoint(tmp_path) as checkpoint:
        for rows in (slice(0, 1), slice(98, 197), slice(0, 989), slice(988, 989)):
            assert torch.equal(checkpoint.rows("1.large", rows), tensors["1.large"][rows])


def test_a_file_is_read_the_same_where_files_have_one_position(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")  # as on Windows
    tensors = write(tmp_path)
    found = read(tmp_path, tensors, torch.float32, "cpu")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("calls", ["whole", "short", "of one run"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_columns_are_read_in_runs_with_the_gaps_between_them(
    wanted: torch.dtype, calls: str, piece_bytes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(files, "RUNS_AT_ONCE", 100)  # 989 rows need several calls
    whole_read = getattr(os, "preadv", None)
    if calls == "of one run":
        monkeypatch.setattr(files, "MOST_GAP_BYTES", 0)
    elif calls == "short" and whole_read is not None:

        def short_read(file: int, parts: list[memoryview], begin: int) -> int:
            return int(whole_read(file, parts[:1], begin))

        monkeypatch.setattr(os, "preadv", short_read)
    tensors = write(tmp_path)
    for start, stop in ((0, 4), (4, 11), (10, 11)):
        cut = files.Cut((989, 11), (989, 11), 1, start, stop)
        out = torch.full((989 * (stop - start),), float("nan"), dtype=wanted)
        with Checkpoint(tmp_path) as checkpoint:
            checkpoint.read_parts([("2.large", out, cut)])
        assert torch.equal(out.view(989, -1), tensors["2.large"][:, start:stop].to(wanted))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every file that is opened from here on."""
    found: list[Any] = []
    make: Callable[..., Any] = files.File

    def making(path: Path) -> Any:
        found.append(make(path))
        return found[-1]

    monkeypatch.setattr(files, "File", making)
    return found


def test_each_file_is_opened_once_and_closed(tmp_path: Path, opened: list[Any]) -> None:
    tensors = write(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        for _ in range(2):
            for name, tensor in tensors.items():
                checkpoint.read([(name, torch.empty_like(tensor))])
        assert not any(file._file.closed for file in opened)
    assert sorted(file.path.name for file in opened) == [f"part_{i}.safetensors" for i in range(3)]
    assert all(file._file.closed for file in opened)


def test_files_are_closed_after_an_error(tmp_path: Path, opened: list[Any]) -> None:
    tensors = write(tmp_path)
    message = r"tensor 0\.odd has shape \[19, 7\].* \[19, 8\]"
    with pytest.raises(CheckpointError, match=message), Checkpoint(tmp_path) as checkpoint:
        checkpoint.read([("1.odd", tensors["1.odd"]), ("0.odd", torch.empty(19, 8))])
    (tmp_path / "part_2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"part_2\.safetensors: damaged"):
        Checkpoint(tmp_path)
    assert len(opened) == 5 and all(file._file.closed for file in opened)


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_a_file_that_shrinks_meanwhile_is_named(
    wanted: torch.dtype, piece_bytes: int, tmp_path: Path
) -> None:
    tensors = write(tmp_path)
    found = [(name, torch.empty_like(tensor, dtype=wanted)) for name, tensor in tensors.items()]
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "part_1.safetensors", 1000)
        with pytest.raises(
            CheckpointError, match=r"part_1\.safetensors: the file has become short"
        ):
            checkpoint.read(found)


def test_memory_for_copies_is_made_once_and_only_if_it_is_needed(tmp_path: Path) -> None:
    tensors, made = write(tmp_path), list[int]()

    def buffer(num_bytes: int) -> Tensor:
        made.append(num_bytes)
        return files.plain_buffer(num_bytes)

    with Checkpoint(tmp_path, buffer) as checkpoint:
        for wanted, expected in ((torch.float32, 0), (torch.float16, 8), (torch.bfloat16, 8)):
            for name, tensor in tensors.items():
                checkpoint.read([(name, torch.empty_like(tensor, dtype=wanted))])
            assert len(made) == expected
