"""Starts of engines in processes of their own, for tests of the store.

`python starts.py MODEL OPTIONS` is one start: it answers two prompts and prints JSON.

Most of such a process is spent on imports. So `python starts.py` is a server: it imports torch and
the engine once and forks a process for each start that a line of its stdin describes. A start that
compiles is forked from a second process, which has imported the compilers as well. `Starts` is the
test's side. The forks end as any process does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
COMPILERS = ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers")


class Ended(NamedTuple):
    """A process that has ended."""

    returncode: int
    out: str
    err: str


class Starts:
    """A server. `begin` and `wait` allow several starts at once."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """The starts write to files in `folder`."""
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(
        self, arguments: list[str], environment: dict[str, str], *, compiles: bool = False
    ) -> tuple[Any, ...]:
        """Fork a process; returns a handle for `wait`. `arguments` are those of one start, or a
        script and its arguments."""
        self._count += 1
        paths = [str(self._folder / f"{self._count}.{end}") for end in ("out", "err")]
        pid = self._ask(
            {"verb": "start", "arguments": arguments, "environment": environment, "paths": paths},
            compiles,
        )
        return pid, compiles, *paths

    def wait(self, begun: tuple[Any, ...]) -> Ended:
        pid, compiles, *paths = begun
        code = self._ask({"verb": "wait", "pid": pid}, compiles)
        return Ended(code, *(Path(path).read_text() for path in paths))

    def _ask(self, request: dict[str, Any], compiles: bool) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        return ask(self._server.stdin, self._server.stdout, {**request, "compiles": compiles})

    def close(self) -> None:
        self._server.communicate(timeout=60)


def one_anew(arguments: list[str], environment: dict[str, str]) -> Ended:
    """One start in a process that has imported nothing."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def ask(to: IO[str], answers: IO[str], request: dict[str, Any]) -> int:
    print(json.dumps(request), file=to, flush=True)
    return int(answers.readline())


def one_start(model: str, options: str) -> None:
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, **json.loads(options))
    params = [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1, seed=3, max_tokens=9),
    ]
    outputs = llm.generate([[5, 6, 7], [8] * 19], params, use_tqdm=False)
    runner = llm.engine.runner
    counters: dict[str, Any] = {}
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.utils import counters
    found = {
        "tokens": [output["token_ids"] for output in outputs],
        "compiled": runner.compiler.num_compiled,
        "loaded": runner.compiler.num_loaded,
        "kernels": runner.platform.kernels_compiled(),
        "modules": [name for name in COMPILERS if name in sys.modules],
        "counters": {name: dict(values) for name, values in counters.items() if values},
    }
    print(json.dumps(found))


def begin_fork(request: dict[str, Any]) -> int:
    """The fork's process id; the fork itself never returns."""
    pid = os.fork()
    if pid:
        return pid
    for end, path in enumerate(request["paths"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), end)
    os.environ.update(request["environment"])
    first, *others = request["arguments"]
    if first.endswith(".py"):
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")
    else:
        one_start(first, *others)
    sys.exit()


def serve(requests: IO[str], answers: IO[str], has_compilers: bool) -> NoReturn:
    second: tuple[IO[str], IO[str]] | None = None
    for line in requests:
        request = json.loads(line)
        if request["compiles"] and not has_compilers:
            second = second or fork_second(requests)
            answer = ask(*second, request)
        elif request["verb"] == "start":
            answer = begin_fork(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        print(answer, file=answers, flush=True)
    sys.exit()


def fork_second(requests: IO[str]) -> tuple[IO[str], IO[str]]:
    """The second process's ends for requests and answers."""
    theirs, ours = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(theirs[1])
        os.close(ours[0])
        import_compilers()
        serve(os.fdopen(theirs[0]), os.fdopen(ours[1], "w"), has_compilers=True)
    os.close(theirs[0])
    os.close(ours[1])
    return os.fdopen(theirs[1], "w"), os.fdopen(ours[0])


def import_compilers() -> None:
    import torch
    from transformers import AutoConfig  # noqa: F401

    from nanovllm.compile.trace import trace
    from nanovllm.platforms import preload

    preload.import_compilers()
    trace(lambda x: x + 1, {"x": torch.zeros(2, 2)}, varying=("x",))
    gc.freeze()


if __name__ == "__main__":
    if sys.argv[1:]:
        one_start(*sys.argv[1:])
    else:
        import nanovllm.engine.engine  # noqa: F401

        serve(sys.stdin, os.fdopen(os.dup(1), "w"), has_compilers=False)
