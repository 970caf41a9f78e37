"""Processes of ours run no code of the working directory, and leave no core dumps.

The working directory of each process here is a folder of somebody else, who has put modules there
that have the names of Python's and of libraries.
"""

from __future__ import annotations

import ast
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanovllm import env, programs
from nanovllm.cli.bench import against_server
from nanovllm.config import EngineConfig
from nanovllm.kernels.cpu import build
from nanovllm.media.decoders import Decoder
from nanovllm.media.memory import Memory
from nanovllm.media.options import MediaOptions
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.serving import engine_process
from nanovllm.serving.supervisor import ServerProcesses, Supervisor
from nanovllm.startup.compile_farm import fork_server, worker_handle
from nanovllm.structured.grammar_sandbox import GrammarSandbox
from nanovllm.structured.library import Source
from nanovllm.templates import Renderer
from tests.parallel.started import MODULE, started

ROOT = Path(__file__).parents[1]
NAMES = (
    "argparse", "asyncio", "dataclasses", "json", "llguidance", "logging", "msgspec", "numpy",
    "pkgutil", "pydantic", "ray", "resource", "runpy", "safetensors", "socket", "subprocess",
    "tokenizers", "torch", "tqdm", "transformers", "triton", "typing", "uvloop",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: its modules write their names to the file `ran`."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    ran = folder / "ran"
    for name in NAMES:
        text = f"open({str(ran)!r}, 'a').write('{name}\\n')\nraise SystemExit('{name} ran')\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    return folder


def ran(folder: Path) -> list[str]:
    """The modules of a folder that have run."""
    marker = folder / "ran"
    return marker.read_text().split() if marker.exists() else []


def run_rank(folder: Path) -> None:
    with started(2, folder) as ranks:
        ranks.call("echo")


def run_trial(_: Path) -> None:
    with closing(GrammarSandbox(dict)) as trial:
        assert trial.run(Source("regex", "[0-9]+"), timeout_s=30)


def run_worker(_: Path) -> None:
    worker = worker_handle.spawn(EngineConfig("tiny-qwen3", device="cpu"))
    try:
        assert "imports" in worker.next_answer()
    finally:
        worker_handle.end_all([worker], seconds=30)


def run_forked_worker(_: Path) -> None:
    server = fork_server.ForkServer(EngineConfig("tiny-qwen3", device="cpu"), 1)
    workers = server.fork(1)
    try:
        assert "imports" in workers[0].next_answer()
    finally:
        worker_handle.end_all(workers, seconds=30)


def run_client(_: Path) -> None:
    class Server:
        url, path, api_key = "http://127.0.0.1:1", "/", None

    async def run() -> None:
        client = against_server._Client(Server(), [], None)  # type: ignore[arg-type]
        await client.prepare()
        assert await client.run(0.0, None) == []
        await client.end()

    asyncio.run(run())


def run_decoder(_: Path) -> None:
    with (
        closing(Decoder(MediaOptions())) as decoder,
        Memory(1 << 30, 1).part(lambda: None) as part,
        pytest.raises(ValueError, match="not a picture"),
    ):
        decoder.picture(b"text", part)


def run_template(_: Path) -> None:
    renderer = Renderer()
    try:
        assert renderer.facts("{{ name }}", {}).variables == {"name"}
    finally:
        renderer.close()


RUNS = [run_rank, run_trial, run_worker, run_forked_worker, run_client, run_decoder, run_template]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_child_runs_no_code_of_the_working_directory(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.")  # an empty element is that directory, too
    files = tmp_path / "files"
    files.mkdir()
    run(files)
    assert ran(hostile) == []


RAY = """
from nanovllm.replicas import cluster
from nanovllm.replicas.ray_actor import ReplicaActor

def work():
    import importlib, sys
    import nanovllm.batch.worker
    for name in {names!r}:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                pass
    return sys.path

ray = cluster.connect(None, "a test")
print(ray.get(ray.remote(work).remote())[0])
"""


def test_an_actor_of_ray_runs_no_code_of_the_working_directory(
    hostile: Path, tmp_path: Path
) -> None:
    """And finds this package where the driver does."""
    script = tmp_path / "driver.py"
    names = [name for name in NAMES if name not in ("torch", "transformers", "triton")]  # slow
    script.write_text(RAY.format(names=names))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=variables, capture_output=True)
    assert (done.returncode, ran(hostile)) == (0, []), done.stderr.decode()
    assert done.stdout.decode().split()[-1] == str(ROOT)


def test_one_place_knows_how_a_child_is_started() -> None:
    """All others take the command from there."""
    for path in (ROOT / "nanovllm").rglob("*.py"):
        if path.name == "programs.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple | ast.Call):
                parts = node.args if isinstance(node, ast.Call) else node.elts
                found = any(ast.unparse(part) == "sys.executable" for part in parts)
                assert not found or is_log(node), f"{path}:{node.lineno} starts a child"


def is_log(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 imports runpy from there")
def test_python_m_nanovllm_runs_no_code_of_the_working_directory(hostile: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (["-m", "nanovllm", "info", "--help"], ["-mnanovllm", "--version"]):
        done = subprocess.run([sys.executable, *words], env=variables, capture_output=True)
        assert (done.returncode, ran(hostile)) == (0, []), done.stderr


def test_a_program_of_the_user_still_imports_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m theirs`, which imports this package, is not `python -m nanovllm`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import nanovllm, theirs_too\n")
    (tmp_path / "theirs" / "__main__.py").write_text("import sys; print(sys.argv[1:])\n")
    (tmp_path / "theirs_too.py").write_text("")
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "theirs", "nanovllm"]
    assert subprocess.check_output(command, env=variables, text=True) == "['nanovllm']\n"


def test_an_api_process_finds_the_module_that_the_supervisor_finds(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it imports nothing else from there first."""
    (hostile / "users_service.py").write_text(
        "import json, pathlib\n"
        "def run(process):\n    pathlib.Path(process.options['file']).write_text(json.dumps(1))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(hostile)])
    monkeypatch.setattr(engine_process, "PROGRAM", "tests.serving.fake_engine")
    config, options = EngineConfig("tiny-qwen3"), {"file": str(tmp_path / "called")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Supervisor(ServerProcesses(config, "users_service:run", listener, options)).run()
    assert (tmp_path / "called").read_text() == "1"
    assert ran(hostile) == []


@pytest.mark.parametrize("run", [run_trial, run_decoder, run_template])
def test_what_is_printed_when_python_starts_is_no_answer(
    run: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('a library is loaded', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run(tmp_path)


@pytest.mark.parametrize("run", [run_trial, run_decoder, run_template])
def test_what_strangers_send_is_read_without_the_users_variables(
    run: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    variables: list[dict[str, str]] = []
    popen = subprocess.Popen

    def spy(*args: Any, **kwargs: Any) -> Any:
        variables.append(kwargs["env"])
        return popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", spy)
    run(tmp_path)
    (found,) = variables
    assert "PATH" in found and not any("secret" in text for text in found.values())


def test_children_get_no_relative_folders_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH", "CPATH"):
        monkeypatch.setenv(name, f"{os.pathsep}/a{os.pathsep}.{os.pathsep}b/c{os.pathsep}/d")
    monkeypatch.setenv("LIBRARY_PATH", "")
    found = env.for_children()
    whole = os.pathsep.join(["/a", "/d"])
    assert [found[name] for name in ("PATH", "LD_LIBRARY_PATH", "CPATH")] == [whole] * 3
    assert found["PYTHONPATH"] == os.pathsep.join([str(ROOT), whole])
    assert "LIBRARY_PATH" not in found, "an empty one means the working directory"
    env.drop_relative()
    assert os.environ["PATH"] == whole and "LIBRARY_PATH" not in os.environ


def test_a_compiler_of_the_working_directory_is_not_used(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = build.installed("g++")
    for folder in (hostile, hostile / "bin"):
        folder.mkdir(exist_ok=True)
        (folder / "g++").write_text(f"#!/bin/sh\necho compiler >> {hostile / 'ran'}\n")
        (folder / "g++").chmod(0o700)
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", "bin", os.environ["PATH"]]))
    assert usual is not None and build.installed("g++") == usual
    assert build.installed("bin/g++") == str(hostile / "bin" / "g++"), "the user has named it"


@pytest.mark.parametrize("wanted", [False, True])
def test_a_child_leaves_no_core_dump_unless_the_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    import resource

    monkeypatch.setenv("NANOVLLM_CORE_DUMPS", str(int(wanted)))
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        ranks = WorkerGroup.start({}, 2, MODULE, tmp_path)
        try:
            ranks.call("echo")
            limits = resource.prlimit(ranks.pids[0], resource.RLIMIT_CORE)
        finally:
            ranks.close()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert limits == (before[1] if wanted else 0, before[1])


def test_a_bad_switch_for_core_dumps_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CORE_DUMPS", "yes")
    with pytest.raises(ValueError, match="NANOVLLM_CORE_DUMPS is 'yes': use 0 or 1"):
        programs.begin()


def test_the_command_line_leaves_no_core_dump(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "from nanovllm.cli.main import main\n"
        f"main(['cache', 'list', {str(tmp_path)!r}])\n"
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, hard)\n"
    )
    (tmp_path / "entries").mkdir()
    variables: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)
