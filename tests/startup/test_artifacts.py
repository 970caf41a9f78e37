"""The folder of compiled code is private to its owner."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.kernels import code_files
from nanovllm.startup.store_folder import open_store, use_private_cache


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "kept by the user")


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0o002)
    try:
        use_private_cache(tmp_path / "cache")
    finally:
        os.umask(previous)
    for path in (
        tmp_path / "cache",
        tmp_path / "cache" / "inductor",
        tmp_path / "cache" / "triton",
    ):
        assert path.stat().st_mode & 0o077 == 0
    assert os.environ["TRITON_CACHE_DIR"] == "kept by the user"


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
@pytest.mark.parametrize("shared", [".", "inductor", "triton"])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, shared: str, mode: int) -> None:
    folder = tmp_path / "cache"
    (folder / shared).mkdir(parents=True, mode=0o700)
    (folder / shared).chmod(mode)
    with pytest.raises(ValueError, match=rf"{folder}.* its mode is {mode:o}: .*chmod 700"):
        use_private_cache(folder)


def test_without_a_place_for_it_the_engine_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        store = use_private_cache(tmp_path / "file" / "cache")
    assert "compiled code is not kept" in caplog.text and "NANOVLLM_CACHE" in caplog.text
    assert store.folder == code_files.temporary_folder()


@pytest.fixture
def without_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of temporary files, in which a user without a home keeps compiled code."""
    logging.getLogger("nanovllm").propagate = True
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("NANOVLLM_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_every_start_has_the_same_private_store(
    without_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig("tiny-qwen3")
    with caplog.at_level(logging.WARNING):
        first, second = (open_store(config).folder for _ in range(2))
    assert first == second and list(without_home.iterdir()) == [first]
    assert first.stat().st_mode & 0o777 == 0o700
    assert f"compiled code is kept in {first}" in caplog.text and "NANOVLLM_CACHE" in caplog.text


def test_a_name_that_another_user_took_first_is_left_alone(
    without_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = without_home / f"nanovllm-{os.getuid()}"
    taken.mkdir(mode=0o700)
    taken.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        store = open_store(EngineConfig("tiny-qwen3"))
    assert store.folder == code_files.temporary_folder() and not list(taken.iterdir())
    assert f"{taken} is for compiled code" in caplog.text


def test_a_start_goes_on_if_others_could_replace_the_default_folder(
    without_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says why its programs are kept elsewhere."""
    cache = without_home / "home" / ".cache"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    monkeypatch.setenv("HOME", str(cache.parent))
    with caplog.at_level(logging.WARNING):
        store = open_store(EngineConfig("tiny-qwen3"))
    assert store.folder == without_home / f"nanovllm-{os.getuid()}"
    assert f"kept in {store.folder}" in caplog.text and f"chmod go-w {cache}" in caplog.text


@pytest.mark.parametrize("named_by", ["compile_cache", "NANOVLLM_CACHE"])
def test_a_named_folder_that_others_could_replace_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    config = EngineConfig("tiny-qwen3", compile_cache=str(shared / "store"))
    if named_by == "NANOVLLM_CACHE":
        monkeypatch.setenv(named_by, str(shared / "store"))
        config = EngineConfig("tiny-qwen3")
    expected = f"{shared}/store is .* owns {shared} and its mode is 777 .use chmod go-w {shared}"
    with pytest.raises(ValueError, match=expected):
        open_store(config)
