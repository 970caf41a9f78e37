"""Times an engine on the CPU of a machine that is idle, busy, or shared with a second engine.

python scripts/bench/busy_cpu.py
python scripts/bench/busy_cpu.py --shape Qwen3-0.6B --layers 8 --batch 1 4
taskset -c 0,1 python scripts/bench/busy_cpu.py     # two cores of a larger machine

Prints one line per batch size, then JSON: tokens per second on an idle machine, and the share of it
while busy loops run: one (`busy`), and four for each core (`load`); and the share of each of two
engines (`pair`). The idle speed is measured before and after each of these, since other programs
may run as well; `idle` has all its values. An engine settles for a second before: its threads adapt
to a busy machine for that long.

The engines inherit this process's environment: OMP_WAIT_POLICY, or another TREE (`--tree`, a
checkout of another revision), compares other ways of waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUSY = "while True: pass"
SETTLE_SECONDS = 1.2  # kernels/cpu/threads.h: the longest pause of the helpers, and a little more
ANSWER = "tokens per second:"


def engine(model: str, is_random: bool, torch_first: bool) -> None:
    """The program of an engine: for each line "BATCH SECONDS" it prints tokens per second."""
    if torch_first:
        import torch  # noqa: F401
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, device="cpu", max_model_len=256, random_weights=is_random)
    params = SamplingParams(max_tokens=16, temperature=0.6, ignore_eos=True)
    num_calls = 0

    def tokens_of(batch: int) -> int:
        nonlocal num_calls
        num_calls += 1
        prompts = [
            [2 + (num_calls * 31 + row * 7 + i) % 200 for i in range(16)] for row in range(batch)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in outputs)

    print(ANSWER, 0, flush=True)
    for line in sys.stdin:
        batch, seconds = line.split()
        start, num_tokens = time.perf_counter(), 0
        while time.perf_counter() - start < float(seconds):
            num_tokens += tokens_of(int(batch))
        print(ANSWER, num_tokens / (time.perf_counter() - start), flush=True)


class Engine:
    """An engine in a separate process, from a checkout."""

    def __init__(self, tree: Path, arguments: Sequence[str]) -> None:
        program = f"import runpy, sys; sys.path.insert(0, {str(tree)!r}); "
        program += f"runpy.run_path({__file__!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, "--engine", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answer()

    def begin(self, batch: int, seconds: float) -> None:
        assert self._process.stdin is not None
        print(batch, seconds, file=self._process.stdin, flush=True)

    def answer(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        raise SystemExit("an engine has ended")

    def speed(self, batch: int, seconds: float) -> float:
        self.begin(batch, seconds)
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def busy(num: int) -> Iterator[None]:
    """Run `num` busy loops in processes."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(engines: Sequence[Engine], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    first = engines[0]
    num_cores = len(os.sched_getaffinity(0))
    idle = [first.speed(batch, args.seconds) for _ in range(2)]
    shares: dict[str, list[float]] = {"busy": [], "load": [], "pair": []}

    def share(name: str, speeds: Sequence[float]) -> None:
        first.speed(batch, SETTLE_SECONDS)
        idle.append(first.speed(batch, args.seconds))
        shares[name] += [speed / statistics.mean(idle[-2:]) for speed in speeds]

    for _ in range(args.runs):
        with busy(1):
            speed = first.speed(batch, args.seconds)
        share("busy", [speed])
        with busy(4 * num_cores):
            speed = first.speed(batch, 2 * args.seconds)
        share("load", [speed])
        for one in engines:
            one.begin(batch, 2 * args.seconds)
        speeds = [one.answer() for one in engines]
        share("pair", speeds)
    return {"batch": batch, "idle": idle, **shares}


def model_of(args: argparse.Namespace, stack: ExitStack) -> list[str]:
    """The arguments of an engine's program."""
    extra = ["--torch-first"] if args.torch_first else []
    if args.shape is None:
        return ["--model", args.model, *extra]
    from nanovllm.tools.shapes import CONFIGS

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    config = {**CONFIGS[args.shape]}
    if args.layers:
        config["num_hidden_layers"] = args.layers
    Path(folder, "config.json").write_text(json.dumps(config))
    return ["--model", folder, "--random", *extra]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--random", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="tiny-qwen3")
    parser.add_argument("--shape", help="random weights in this shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--torch-first", action="store_true", help="programs import torch first")
    parser.add_argument("--tree", type=Path, nargs="+", default=[ROOT], help="checkouts")
    args = parser.parse_args()
    if args.engine:
        engine(args.model, args.random, args.torch_first)
        return
    with ExitStack() as stack:
        arguments = model_of(args, stack)
        for tree in args.tree:
            engines = [Engine(tree, arguments) for _ in range(2)]
            for one in engines:
                stack.callback(one.end)
            for batch in args.batch:
                found = measure(engines, batch, args)
                shares = ", ".join(
                    f"{name} {min(found[name]):.2f} … {max(found[name]):.2f}"
                    for name in ("busy", "load", "pair")
                    if found[name]
                )
                speeds = found["idle"]
                print(f"batch {batch}: {min(speeds):.0f} … {max(speeds):.0f} tok/s, {shares}")
                print(json.dumps({"tree": tree.name, "model": args.shape or args.model, **found}))


if __name__ == "__main__":
    if "--engine" not in sys.argv:  # an engine has its tree before all others
        sys.path.insert(0, str(ROOT))  # runs without installation
    from nanovllm.tools import command_line

    sys.exit(command_line.run(main))
