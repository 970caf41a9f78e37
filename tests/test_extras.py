"""The commands that install optional parts name the place of this installation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nanovllm import extras

ROOT = Path(__file__).parents[1]


def files() -> list[Path]:
    folders = [ROOT / name for name in ("nanovllm", "compile", "kernels", "docs")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES]
    return [*found, ROOT / "README.md", ROOT / "example.py", ROOT / "bench.py"]


SUFFIXES = (".py", ".md", ".html", ".js")


def test_no_hint_names_a_package_of_an_index() -> None:
    bare = re.compile(r"pip install [^\n]*[\"' ]nanovllm(\[[a-z,]+\])?[\"']?(?! @)(\s|$|[.;)`])")
    wrong = [f"{path}: {one[0]}" for path in files() for one in bare.finditer(path.read_text())]
    assert not wrong


def test_the_command_of_a_checkout_names_its_folder() -> None:
    command = shlex.split(extras._command("vision", {}, ROOT))
    assert command == ["pip", "install", f"{ROOT}[vision]"]


@pytest.mark.parametrize("is_editable", [False, True])
def test_an_installation_from_a_folder_is_named(tmp_path: Path, is_editable: bool) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "setup.py").touch()
    origin = {"url": folder.as_uri(), "dir_info": {"editable": is_editable}}
    command = shlex.split(extras._command("serve", origin, tmp_path))
    assert command == ["pip", "install", *["-e"] * is_editable, f"{folder}[serve]"]


def test_an_installation_from_a_repository_is_named(tmp_path: Path) -> None:
    vcs = {"vcs": "git", "commit_id": "abc", "requested_revision": "v1"}
    origin = {"url": "https://example.org/nanovllm.git", "vcs_info": vcs}
    command = shlex.split(extras._command("ray", origin, tmp_path))
    assert command[2:] == ["nanovllm[ray] @ git+https://example.org/nanovllm.git@v1"]


def test_a_wheel_of_unknown_origin_needs_a_clone(tmp_path: Path) -> None:
    gone = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    for origin in ({}, gone):
        assert "in a clone of nanovllm's repository" in extras._command("video", origin, tmp_path)
