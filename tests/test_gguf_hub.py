"""Names of GGUF models: files, folders, and types on a Hub that is a fake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from nanovllm.cli.main import run
from nanovllm.hub import names_model, resolve

NAMES = (
    "README.md", "config.json", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.Q8_0.gguf",
    "mmproj-m-f16.gguf",
    "big/m-BF16-00001-of-00002.gguf", "big/m-BF16-00002-of-00002.gguf", "m-F16.gguf",
    "imat/m-F16.gguf", "m[1]-IQ4_NL.gguf",
)  # fmt: skip


class FakeHub:
    """A repository "some/model" with NAMES; `downloads` are those that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloads, self.is_online = folder, [], True
        self.cached: set[str] = set()

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        if not self.is_online:
            raise ConnectionError("no connection")
        response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
        if repository != "some/model":
            raise RepositoryNotFoundError("not found", response=response)
        if revision not in (None, "v1"):
            raise RevisionNotFoundError("not found", response=response)
        return list(NAMES)

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None,
        allow_patterns: Sequence[str],
        ignore_patterns: Sequence[str],
        tqdm_class: Any,
        local_files_only: bool = False,
    ) -> str:
        known = self.cached if local_files_only or not self.is_online else NAMES
        chosen = filter_repo_objects(
            known, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in chosen:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"GGUF")
            self.cached.add(name)
            self.downloads.append(name)
        return str(self.folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.mark.parametrize(
    "type_name, names",
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q8_0", ["m.Q8_0.gguf"]),
        ("BF16", ["big/m-BF16-00001-of-00002.gguf", "big/m-BF16-00002-of-00002.gguf"]),
        ("IQ4_NL", ["m[1]-IQ4_NL.gguf"]),
    ],
)
def test_a_type_names_one_file(type_name: str, names: list[str], fake: FakeHub) -> None:
    """Only that is downloaded, and its other parts; the second time without a connection."""
    model = f"some/model:{type_name}"
    for fake.is_online in (True, False):
        fake.downloads = []
        assert resolve(model, revision="v1") == fake.folder / names[0]
        assert set(fake.downloads) == set(names)


@pytest.mark.parametrize(
    "model, message",
    [
        ("some/model:Q4_K", "no GGUF file has 'Q4_K' in its name .*m-Q4_K_M.gguf, m-Q4_K_S.gguf"),
        ("some/model:F16", r"2 GGUF files have 'F16' in their names \(imat/m-F16.gguf, m-F16.gguf"),
        ("other/model:F16", "model 'other/model:F16' is neither a local folder nor a repository"),
        ("some/model:", "nor a Hub id"),
        ("some/model:a/b", "nor a Hub id"),
    ],
)
def test_other_names_are_refused(model: str, message: str, fake: FakeHub) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(model)
    assert fake.downloads == []


def test_a_revision_that_does_not_exist(fake: FakeHub) -> None:
    with pytest.raises(ValueError, match="has no revision 'v2' on the Hub"):
        resolve("some/model:Q8_0", revision="v2")


def test_offline_without_the_file(fake: FakeHub) -> None:
    fake.is_online = False
    with pytest.raises(ValueError, match=r"no GGUF file has 'Q8_0' in its name \(no GGUF file\)"):
        resolve("some/model:Q8_0")


def test_pull(fake: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert not run("pull", ["some/model:Q8_0"])
    assert capsys.readouterr().out == f"{fake.folder / 'm.Q8_0.gguf'}\n"
    with pytest.raises(ValueError, match="name one by its type, as in some/model:Q4_K_M"):
        run("pull", ["some/model"])


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.gguf"
    assert not names_model("a.gguf") and names_model("some/model:Q4_0")
    with pytest.raises(ValueError, match=r"model './a.gguf' does not exist"):
        resolve("./a.gguf")
    path.write_bytes(b"GGUF")
    for name in ("a.gguf", "./a.gguf", str(path)):
        assert names_model(name) and resolve(name).samefile(path)
    assert resolve(str(tmp_path)) == path
    with pytest.raises(ValueError, match="is not a Hub id, and only a Hub id has revisions"):
        resolve(str(path), revision="v1")
    (tmp_path / "mmproj-a.gguf").touch()
    assert resolve(str(tmp_path)) == path
    for i in (1, 2):
        (tmp_path / f"b-0000{i}-of-00002.gguf").touch()
    with pytest.raises(ValueError, match=r"has 2 GGUF models: name the file.*a\.gguf, b-00001"):
        resolve(str(tmp_path))
    path.unlink()
    assert resolve(str(tmp_path)) == tmp_path / "b-00001-of-00002.gguf"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path
