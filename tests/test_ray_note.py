"""Which note of a Ray cluster is believed: this user's or root's, and nobody else's."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from nanovllm import env, ray_note
from nanovllm.kernels import private_files

ADDRESS = "10.0.0.5:6379"


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A note of this user in a folder of this user."""
    logging.getLogger("nanovllm").propagate = True
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    path = tmp_path / "ray" / "ray_current_cluster"
    path.parent.mkdir(mode=0o755)
    path.write_text(ADDRESS + "\n")
    path.chmod(0o644)
    return path


def test_a_note_of_this_user_is_believed(note: Path) -> None:
    assert env.ray_address() == ADDRESS
    note.parent.chmod(0o1777)
    assert env.ray_address() == ADDRESS
    note.unlink()
    assert env.ray_address() is None


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_note_that_others_may_write_is_not_believed(
    note: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    note.chmod(mode)
    monkeypatch.setattr(private_files, "is_own_group", lambda _: False)
    assert env.ray_address() is None and f"its mode is {mode:o}" in caplog.text
    monkeypatch.setattr(private_files, "is_own_group", lambda _: True)  # the umask is 002 then
    assert (env.ray_address() is None) is (mode == 0o666)


def test_a_note_of_another_user_is_not_believed(
    note: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[4] = os.getuid() + 1
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", fstat)
    assert env.ray_address() is None and f"user {os.getuid() + 1} owns it" in caplog.text


def test_a_link_a_folder_and_a_pipe_are_no_notes(note: Path) -> None:
    note.rename(note.with_name("other"))
    note.symlink_to("other")
    assert env.ray_address() is None
    note.unlink()
    note.mkdir()
    assert env.ray_address() is None
    note.rmdir()
    os.mkfifo(note, 0o600)
    assert env.ray_address() is None, "and nothing waits for a writer"


def test_where_others_may_replace_the_note_the_cluster_must_be_ours(
    note: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray makes its folder for everybody."""
    note.parent.chmod(0o777)
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as cluster:
            port = cluster.getsockname()[1]
            note.write_text(f"127.0.0.1:{port}")
            assert env.ray_address() == f"127.0.0.1:{port}"
        assert env.ray_address() is None, "nobody listens"
    assert f"RAY_ADDRESS=127.0.0.1:{port} uses this cluster" in caplog.text
    assert f"may write to {note.parent}" in caplog.text
    for users, is_believed in (({0}, True), ({os.getuid()}, True), ({0, 12345}, False)):
        monkeypatch.setattr(ray_note, "_listening_users", lambda _, users=users: users)
        assert (env.ray_address() is not None) is is_believed


def test_the_folder_of_the_note_must_not_be_another_users(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_files, "_trusted", lambda: (os.getuid() + 1,))
    assert env.ray_address() is None
