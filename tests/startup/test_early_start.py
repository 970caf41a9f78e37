"""What starts before torch is imported starts only if needed and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineConfig
from nanovllm.platforms import preload
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.startup import resolve
from nanovllm.startup.compile_farm import farm as compile_farm
from nanovllm.startup.compile_farm import fork_server, worker_handle
from nanovllm.startup.compile_farm.farm import CompileFarm
from nanovllm.startup.compile_farm.fork_server import ForkServer

OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_model_len": 64, "max_num_seqs": 4, "graph_batch_sizes": [4],
    "num_kvcache_blocks": 20, "max_num_batched_tokens": 64,
}  # fmt: skip
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def test_importing_the_package_does_not_import_torch() -> None:
    command = [sys.executable, "-c", "import sys, nanovllm; sys.exit('torch' in sys.modules)"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == 0


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that shows a GPU's driver, on a machine with spare cores; Triton is not imported."""
    path = tmp_path / "driver"
    path.touch()
    monkeypatch.setattr(preload, "DRIVERS", (str(path),))
    monkeypatch.setattr(preload, "_import_triton", lambda: None)
    monkeypatch.setattr(preload, "_torch_is_for_cuda", lambda: False)
    monkeypatch.setattr(preload, "max_processes", lambda: 3)
    return path


@on_linux
def test_a_device_is_opened_beside_the_import_of_torch(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    monkeypatch.setattr(preload, "_open_device", opened.append)
    preload.begin("cuda")()
    assert not opened, "torch is not for such a device"
    monkeypatch.setattr(preload, "_torch_is_for_cuda", lambda: True)
    for device in ("auto", "cpu", "cuda", "cuda:3", "npu"):
        preload.begin(device)()
    assert opened == [0, 0, 3]
    driver.unlink()
    preload.begin("auto")()
    assert opened == [0, 0, 3]


def test_a_driver_that_is_not_there_is_no_error() -> None:
    preload._open_device(99)


def test_torch_writes_nothing_to_the_environment_while_a_device_is_opened() -> None:
    """The driver reads the environment in another thread at the same time."""
    script = (
        "import sys, numpy; written = []\n"
        "writes = ('os.putenv', 'os.unsetenv')\n"
        "sys.addaudithook(lambda event, args: written.append(args) if event in writes else None)\n"
        "import nanovllm.engine.engine; sys.exit(str(written) if written else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        timeout=300,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of processes of each server instead of starting the server."""
    found: list[int] = []
    monkeypatch.setattr(compile_farm, "ForkServer", lambda config, most: found.append(most))
    return found


@on_linux
def test_a_server_is_begun_for_a_gpu_and_an_empty_store_alone(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(monkeypatch)
    store = tmp_path / "store"
    for options in ({"device": "cpu"}, {"enforce_eager": True}, {"compile_cache_mode": "require"}):
        config: Any = {"compile_cache": store, **options}
        CompileFarm.start(EngineConfig("tiny-qwen3", **config))
    assert not found
    CompileFarm.start(EngineConfig("tiny-qwen3", compile_cache=store))
    (store / "entries").mkdir(parents=True)
    CompileFarm.start(EngineConfig("tiny-qwen3", compile_cache=store, device="cuda:1"))
    assert found == [3, 3]
    (store / "entries" / "one").touch()
    CompileFarm.start(EngineConfig("tiny-qwen3", compile_cache=store))
    driver.unlink()
    CompileFarm.start(EngineConfig("tiny-qwen3", compile_cache=tmp_path / "other"))
    assert found == [3, 3]


@on_linux
def test_a_server_forks_as_many_as_are_wanted_and_ends_with_them(bare_store: Path) -> None:
    config = EngineConfig("tiny-qwen3", **OPTIONS, compile_cache=bare_store)
    server = ForkServer(config, 3)
    forked = server.fork(2)
    assert len(forked) == 2 and all("imports" in worker.next_answer() for worker in forked)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    assert len(children.read_text().split()) == 2
    worker_handle.end_all(forked, seconds=30)
    assert server.process.returncode == 0
    server.end()


@on_linux
def test_a_server_that_is_asked_for_nothing_goes_away(tmp_path: Path) -> None:
    config = EngineConfig("tiny-qwen3", **OPTIONS, compile_cache=tmp_path / "store")
    ended, abandoned = ForkServer(config, 2), ForkServer(config, 2)
    ended.end()
    assert ended.process.returncode == -signal.SIGKILL
    assert abandoned.process.stdin is not None
    abandoned.process.stdin.close()  # as if this process died
    assert abandoned.process.wait(60) == 0


@on_linux
def test_a_server_that_could_not_import_leaves_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    monkeypatch.setattr(fork_server, "worker_command", lambda config: command)
    server = ForkServer(EngineConfig("tiny-qwen3", **OPTIONS), 2)
    server.process.wait(60)
    forked = server.fork(2)
    for worker in forked:
        with pytest.raises(BrokenPipeError):
            worker.next_answer()
    assert forked[0].stderr.read() == "no such module\n"
    worker_handle.end_all(forked)


@on_linux
@pytest.mark.parametrize("count", [2, 0])
def test_a_start_uses_its_server_or_ends_it(
    count: int, tiny_qwen3: Path, bare_store: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; 0 means that torch finds none."""
    begun: list[ForkServer] = []
    ended: list[int | None] = []

    def begin(config: EngineConfig, most: int) -> ForkServer:
        begun.append(ForkServer(config, most))
        return begun[0]

    resolve_model = resolve.resolve_model

    def resolve_later(*args: Any, **options: Any) -> Any:
        ended.append(begun[0].process.poll())
        return resolve_model(*args, **options)

    monkeypatch.setattr(compile_farm, "_is_likely_needed", lambda config: True)
    monkeypatch.setattr(compile_farm, "ForkServer", begin)
    monkeypatch.setattr(
        compile_farm, "spawn", lambda config: pytest.fail("another process was started")
    )
    monkeypatch.setattr(resolve, "resolve_model", resolve_later)
    monkeypatch.setattr(CpuPlatform, "compile_workers", lambda *_: count)
    llm = LLM(str(tiny_qwen3), **OPTIONS, compile_cache=bare_store)
    compiler = llm.engine.runner.compiler
    assert (compiler.num_compiled == 0) == (count > 0)
    assert ended == [None if count else -signal.SIGKILL], "one that is not wanted does not stay"
    assert begun[0].process.returncode == (0 if count else -signal.SIGKILL)
    assert len(begun) == 1


@on_linux
def test_an_import_that_fails_leaves_no_server(
    tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C during the import of torch."""
    server = ForkServer(EngineConfig("tiny-qwen3", **OPTIONS), 2)
    ends = [end for three in server._unused for end in three]
    monkeypatch.setattr(compile_farm, "_is_likely_needed", lambda config: True)
    monkeypatch.setattr(compile_farm, "ForkServer", lambda config, most: server)
    monkeypatch.setitem(sys.modules, "nanovllm.engine.engine", None)
    with pytest.raises(ImportError):
        LLM("tiny-qwen3", **OPTIONS, compile_cache=tmp_path / "store")
    assert server.process.returncode == -signal.SIGKILL
    for end in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)


@on_linux
def test_a_start_that_fails_leaves_no_server(
    tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[ForkServer] = []

    def new(config: EngineConfig, most: int) -> ForkServer:
        begun.append(ForkServer(config, most))
        return begun[0]

    monkeypatch.setattr(compile_farm, "ForkServer", new)
    with pytest.raises(ValueError, match="the folder has no config"):
        LLM(str(tmp_path), **{**OPTIONS, "device": "auto"}, compile_cache=tmp_path / "store")
    assert begun[0].process.returncode is not None
