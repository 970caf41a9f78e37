"""`nanovllm list`, `pull` and `rm`, on a cache as huggingface_hub lays it out."""

from __future__ import annotations

import os
import time
from io import StringIO
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nanovllm import hub, progress
from nanovllm.cli import hub_models
from nanovllm.cli.main import run
from nanovllm.tools import command_line

COMMIT = "a1" * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the Hub's cache, which does not exist yet."""
    folder = tmp_path / "hub"
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(folder))
    return folder


def add(cache: Path, name: str, num_bytes: int = 0, *, kind: str = "model", days: int = 0) -> Path:
    """A repository with a config.json and, unless it is empty, a file of weights.

    All have the same commit, as copies of a repository have those of the original."""
    repo = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    files = {"config.json": 2, **({"model.safetensors": num_bytes} if num_bytes else {})}
    for file, size in files.items():
        (blobs / file).write_bytes(b"x" * size)
        when = time.time() - days * 86400 - 60
        os.utime(blobs / file, (when, when))
        (snapshot / file).symlink_to(blobs / file)
    return repo


def listed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert not run("list", [])
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_models_are_listed_with_size_and_use(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(cache, "b/large", 1_500_000, days=3)
    add(cache, "A/shape", days=400)
    add(cache, "c/data", 99, kind="dataset")
    head, *rows = listed(capsys)
    assert head == ["MODEL", "SIZE", "USED"]
    assert rows[0] == ["A/shape", "2", "B", "1", "year", "ago", "no", "weights"]
    assert rows[1] == ["b/large", "1.5", "MB", "3", "days", "ago"]
    assert [row[0] for row in rows[2:]] == list(hub.EMBEDDED)
    assert all(row[-1] == "embedded" and row[2] in ("kB", "MB") for row in rows[2:])


def test_without_a_cache_the_embedded_models_are_listed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row[0] for row in listed(capsys)[1:]] == list(hub.EMBEDDED)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.04e9, "2.0 GB")]
)
def test_sizes_are_written_for_people(num_bytes: float, text: str) -> None:
    assert hub_models.size(num_bytes) == text


# rm -----------------------------------------------------------------------------------------------


def test_rm_removes_models_and_nothing_else(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repos = [add(cache, name, 1000) for name in ("a/one", "b/two", "c/three")]
    data = add(cache, "a/one", 10, kind="dataset")
    assert run("rm", ["a/one", "b/two", "a/one", "--yes"]) == 0
    assert capsys.readouterr().out == "removed a/one, b/two (2.0 kB)\n"
    assert [repo.exists() for repo in repos] == [False, False, True] and data.exists()


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [("y\n", False), ("YES\n", False), ("n\n", True), ("\n", True), ("", True)],
)
def test_rm_asks(
    answer: str,
    is_kept: bool,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = add(cache, "a/one", 1000)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert run("rm", ["a/one"]) == int(is_kept)
    assert capsys.readouterr().out.startswith("remove a/one (1.0 kB)? [y/N] ")
    assert repo.exists() == is_kept


def test_rm_without_a_terminal_needs_yes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = add(cache, "a/one", 1000)
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    with pytest.raises(ValueError, match=r"would remove a/one \(1.0 kB\): use --yes"):
        run("rm", ["a/one"])
    assert repo.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/oen", "'a/oen' is not a model in the Hub's cache: did you mean a/one?"),
        ("/etc", "'/etc' is not a model in the Hub's cache: see nanovllm list"),
        ("tiny-qwen3", "tiny-qwen3 is embedded in nanovllm and cannot be removed"),
        ("c/data", "'c/data' is not a model"),
    ],
)
def test_rm_removes_nothing_if_one_is_not_there(name: str, message: str, cache: Path) -> None:
    repos = [add(cache, "a/one", 1000), add(cache, "c/data", 1, kind="dataset")]
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        run("rm", ["a/one", name, "--yes"])
    assert all(repo.exists() for repo in repos)


# pull ---------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the Hub was asked for. It gives `tmp_path`."""
    asked: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        asked.append({"model": model, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_pull_downloads_the_files_that_are_read(
    downloads: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    assert not run("pull", ["a/b", "--revision", "v1"])
    assert capsys.readouterr().out == f"{tmp_path}\n"
    (asked,) = downloads
    assert (asked["model"], asked["revision"]) == ("a/b", "v1")
    assert asked["allow_patterns"] == [*hub.CONFIG_FILES, "*.safetensors"]
    assert asked["ignore_patterns"] == ["consolidated*", "original/*"]
    assert asked["tqdm_class"](range(9)).disable, "no bar without a terminal"


def test_on_a_terminal_the_bars_are_those_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_drawn", lambda: True)
    assert progress.silent_class() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "a/b has no weights in the safetensors format"),
        ("tiny-qwen3", "tiny-qwen3 is embedded in nanovllm: there is nothing to download"),
        ("./here", "'./here' is not a Hub id"),
        ("/tmp", "'/tmp' is not a Hub id"),
    ],
)
def test_pull_refuses_what_it_cannot_get(
    name: str, message: str, downloads: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=message):
        run("pull", [name])


def test_an_unreachable_hub_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot find\nthe snapshot\n\nand outgoing traffic is off")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert command_line.run(lambda: run("pull", ["a/b"])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert (
        "'a/b' is not a local folder and could not be downloaded from the Hub: Cannot find the"
        in err
    )
