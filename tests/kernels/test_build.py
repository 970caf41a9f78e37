"""Compiling C++ files into libraries: which compiler runs, its errors, which files are used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.kernels import private_files
from nanovllm.kernels.cpu import build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries; settings are the test's own."""
    monkeypatch.setattr(build._LibraryState, "settings", build.LibraryOptions())
    monkeypatch.setattr(build._LibraryState, "compiled", [])
    return tmp_path / "cpp"


def answer(source: Path, folder: Path, compiler: str | None, may_compile: bool = True) -> int:
    build.configure(folder, compiler, may_compile)
    found: int = build.load(source).answer()
    return found


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_options_of_the_compiler_are_used_and_are_part_of_the_key(
    source: Path, folder: Path
) -> None:
    assert answer(source, folder, "g++ -DANSWER=42") == 42
    assert answer(source, folder, "g++ -D 'ANSWER=(3 + 4)'") == 7
    assert answer(source, folder, "g++ -DANSWER=42", may_compile=False) == 42


def test_headers_beside_a_source_are_part_of_it_and_of_its_key(source: Path, folder: Path) -> None:
    header = source.with_name("number.h")
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }')
    header.write_text("#define NUMBER 3\n")
    assert answer(source, folder, None) == 3
    header.write_text("#define NUMBER 4\n")
    assert answer(source, folder, None) == 4
    header.write_text("#define NUMBER 4\n#error wrong\n")
    with pytest.raises(RuntimeError, match=r"number\.h:2:2: error: #error wrong"):
        answer(source, folder, None)
    header.write_text("#define NUMBER unknown\n")
    with pytest.raises(RuntimeError, match=r"answer\.cpp:2"):
        answer(source, folder, None)


def test_a_compiler_may_run_through_another_program_or_have_spaces_in_its_path(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    assert answer(source, folder, "env g++ -DANSWER=42") == 42
    spaced = program(tmp_path / "my compiler", 'exec g++ -DANSWER=5 "$@"')
    assert answer(source, folder, str(spaced)) == 5


def test_inductor_gets_one_program_that_has_the_options(folder: Path, source: Path) -> None:
    answer(source, folder, "g++ -D 'ANSWER=(3 + 4)'")
    script = build.script_of_compiler()
    assert script is not None
    command = [script, "-E", "-"]
    done = subprocess.run(command, input="ANSWER", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(3 + 4)"
    build.configure(folder, "g++", True)
    assert build.script_of_compiler() is None


def test_the_first_line_of_an_error_says_that_the_disk_is_full(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    messages = "In function f:\\nfatal error: /tmp/x.s: No space left on device\\nerror: exit 1"
    compiler = program(tmp_path / "full", f"cat > /dev/null; printf '{messages}' >&2; exit 1")
    with pytest.raises(RuntimeError) as caught:
        answer(source, folder, str(compiler))
    assert str(caught.value).splitlines()[0].endswith("/tmp/x.s: No space left on device")


@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_a_library_that_others_may_write_is_compiled_again(
    source: Path, folder: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("nanovllm").propagate = True
    compiler = "g++ -DANSWER=42"
    answer(source, folder, compiler)
    (written,) = folder.glob(f"*{suffix}")
    written.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        assert answer(source, folder, compiler) == 42
    assert f"{written} is for compiled code" in caplog.text and "chmod 600" in caplog.text
    assert build.compiled() == ["answer", "answer"] and written.stat().st_mode & 0o777 == 0o600
    written.chmod(0o602)
    with pytest.raises(RuntimeError, match="no usable library"):
        answer(source, folder, compiler, may_compile=False)


def test_a_link_that_another_user_owns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may link a name in a public folder to a private folder of ours."""
    (tmp_path / "private").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "private")
    private_files.make_private(link)
    real, me = Path.lstat, os.getuid()

    def lstat(path: Path) -> os.stat_result:
        fields = list(real(path))
        fields[4] = me + 1
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(private_files.UnsafePath, match=f"user {me + 1} owns it"):
        private_files.make_private(link)


def test_a_temporary_folder_is_deleted_when_the_process_ends(tmp_path: Path) -> None:
    script = (
        "import os\n"
        "from nanovllm.kernels.code_files import temporary_folder\n"
        "(temporary_folder() / 'file').write_text('')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "print((temporary_folder() / 'file').exists())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"], "the end of a fork deletes nothing"
    assert not list(tmp_path.glob("nanovllm-*"))


def test_a_compiler_that_is_killed_leaves_no_temporary_file(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    killed = program(tmp_path / "killed", 'cat > /dev/null; touch "$TMPDIR/cc.s"; kill -9 $$')
    with pytest.raises(RuntimeError, match=r"killed failed \(-9\)"):
        answer(source, folder, str(killed))
    assert list((tmp_path / "temporary").iterdir()) == list(folder.iterdir()) == []
