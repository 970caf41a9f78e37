"""Environment variables: what they may be, and where compiled code goes without them."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nanovllm import env


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable is set, temporary files go to `tmp_path`, and so do relative paths."""
    for name in ("NANOVLLM_CACHE", "NANOVLLM_DUMP_GRAPHS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwuid(_: int) -> Any:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def test_compiled_code_goes_to_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert env.read().store_folder(None) == tmp_path / "home" / ".cache" / "nanovllm"


@pytest.mark.parametrize("home", ["/dev/null", "relative", None])
def test_without_a_home_that_can_be_written_it_goes_to_one_temporary_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None
) -> None:
    if home is None:
        without_home(monkeypatch)
    else:
        monkeypatch.setenv("HOME", home)
    expected = tmp_path / f"nanovllm-{os.getuid()}"
    assert [env.read().store_folder(None) for _ in range(2)] == [expected, expected]
    assert not (tmp_path / "~").exists() and not (tmp_path / "relative").exists()


def test_a_filled_store_serves_from_a_home_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = env.read().store_folder(None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert env.read().store_folder(None) != folder
    (folder / "entries").mkdir()
    assert env.read().store_folder(None) == folder


@pytest.mark.parametrize("umask", [0, 0o022])
def test_the_folder_above_the_default_one_is_private_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, umask: int
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(umask)
    try:
        folder = env.read().store_folder(None)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700] * 2


def test_a_default_folder_that_others_could_replace_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = env.read().store_folder(None)
    folder.parent.chmod(0o777)
    assert env.read().store_folder(None) == tmp_path / f"nanovllm-{os.getuid()}"
    assert f"chmod go-w {folder.parent}" in str(env.problem_with(folder))
    folder.parent.chmod(0o755)
    assert env.read().store_folder(None) == folder


@pytest.mark.parametrize("name", ["NANOVLLM_CACHE", "NANOVLLM_DUMP_GRAPHS", "compile_cache"])
def test_a_tilde_is_the_home_folder_or_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def folder() -> Path | None:
        given = "~/x" if name == "compile_cache" else None
        if given is None:
            monkeypatch.setenv(name, "~/x")
        found = env.read()
        return found.dump_graphs if "DUMP" in name else found.store_folder(given)

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / "x"
    without_home(monkeypatch)
    with pytest.raises(ValueError, match=rf"{name} is '~/x'.*use a full path"):
        folder()


def test_a_compiler_that_is_no_command_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-m64")
    with pytest.raises(ValueError, match=r"CXX is \"g\+\+ '-m64\".* No closing quotation"):
        env.read()
    monkeypatch.setenv("CXX", "  ")
    assert env.read().cxx is None


@pytest.mark.parametrize("before", [None, "/before"])
def test_compilers_have_a_folder_of_their_own_for_a_while(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    if before is not None:
        monkeypatch.setenv("TMPDIR", before)
    own, store = tempfile.gettempdir(), tmp_path / "store"
    with env.folder_of_compilers(store, ".x-"):
        assert os.environ.get("TMPDIR") == before, "there is no such folder"
    store.mkdir()
    first, second = (env.folder_of_compilers(store, ".x-") for _ in range(2))
    first.__enter__()
    second.__enter__()
    folder = Path(os.environ["TMPDIR"])
    assert list(store.iterdir()) == [folder]
    first.__exit__(None, None, None)  # as another thread may do
    assert Path(os.environ["TMPDIR"]) == folder
    second.__exit__(None, None, None)
    assert os.environ.get("TMPDIR") == before
    assert folder.is_dir(), "programs that were started inside may go on"
    assert tempfile.gettempdir() == own


def test_the_folder_of_compilers_goes_with_its_process(tmp_path: Path) -> None:
    code = f"""if True:
        import os
        from pathlib import Path
        from nanovllm import env
        with env.folder_of_compilers(Path({str(tmp_path)!r}), ".x-"):
            (Path(os.environ["TMPDIR"]) / "cc.s").touch()
        print(len(os.listdir({str(tmp_path)!r})))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1" and not list(tmp_path.iterdir())


def test_a_process_that_is_ended_at_once_leaves_no_folder_of_compilers(tmp_path: Path) -> None:
    """Ranks and engines end without Python's cleanup; their parent removes their files."""
    code = f"""if True:
        import os
        from pathlib import Path
        from nanovllm import env
        store, kept = Path({str(tmp_path / "store")!r}), {str(tmp_path / "kept")!r}
        env.keep_temporary_files(Path(kept))
        with env.folder_of_compilers(store, ".x-"):
            assert os.environ["TMPDIR"] == kept
        os._exit(0)"""
    (tmp_path / "store").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ".local/state/nanovllm"),
        ("relative", ".local/state/nanovllm"),
        ("{}/x", "x/nanovllm"),
    ],
)
def test_what_a_session_keeps_is_below_the_state_folder(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_STATE_HOME", given.format(tmp_path))
    assert env.state_folder() == tmp_path / expected
    without_home(monkeypatch)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert env.state_folder() is None
