"""Runs the cases of `gpu_cases.py`, side by side where the machine has several GPUs.

    python scripts/bench/run_cases.py --list
    python scripts/bench/run_cases.py --out FOLDER --store STORE --cases "hot-*" int4-16
    python scripts/bench/run_cases.py --out FOLDER --store STORE --cases "hot-*" --other TREE

Cases begin in the order that is asked for, each as soon as the GPUs that it needs are free. One is
not begun unless its limit fits in --seconds, and one that FOLDER/results.json has without an error
is not run again: so several calls with the same --out do all of them. With --other each case runs
in that tree first, which has a store of its own. FOLDER gets results.json after each case, and the
output of each case in files of its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from scripts.bench.gpu_cases import CASES, MODEL, PLACE, STORE, Case
from scripts.bench.server_process import Limit, run

RATE = "tokens_per_second"
TREE = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the cases, and run none")
    add("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names, also with * and ?")
    add("--out", type=Path, default=Path("cases"), metavar="FOLDER", help="results and output")
    add("--store", type=Path, default=Path("store"), metavar="DIR", help="compiled programs")
    add("--other", type=Path, metavar="TREE", help="another revision, which runs each case first")
    add("--model", metavar="PATH", help="a trained model, as a GGUF file, for the cases of one")
    add("--gpus", type=int, metavar="N", help="default: all of this machine")
    add("--seconds", type=float, default=560.0, metavar="X", help="for all cases together")
    return parser.parse_args()


def chosen(patterns: Sequence[str]) -> list[str]:
    """The names of cases, pattern by pattern. Raises ValueError if a pattern matches none."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in CASES if fnmatch(name, pattern)]
        if not names:
            raise ValueError(f"no case is named {pattern!r}: --list prints them")
        found |= dict.fromkeys(names)
    return list(found)


class Round:
    """The cases of one call: which GPUs are free, and what has been measured."""

    def __init__(self, args: argparse.Namespace, num_gpus: int) -> None:
        self._folder: Path = args.out
        self._store: Path = args.store
        self._other: Path | None = args.other
        self._model = str(Path(args.model).absolute()) if args.model else None
        self._end = time.monotonic() + args.seconds
        self._num_gpus = num_gpus
        self._free = list(range(num_gpus))
        self._changed = threading.Condition()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / "results.json"
        self.results: dict[str, Any] = {}
        if self._file.exists():
            self.results = json.loads(self._file.read_text())

    def run(self, names: Sequence[str]) -> None:
        threads = []
        for name in names:
            if name in self.results and "error" not in self.results[name]:
                continue
            if (gpus := self._take(name)) is not None:
                threads.append(threading.Thread(target=self._run, args=(name, gpus)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _take(self, name: str) -> list[int] | None:
        """Wait for the GPUs of a case; None if there is no time, or there are too few."""
        case = CASES[name]
        seconds = case.seconds * (2 if self._other else 1)
        if MODEL in case.words and self._model is None:
            print(f"{name}: needs --model", file=sys.stderr)
            return None
        if case.num_gpus > self._num_gpus:
            print(f"{name}: needs {case.num_gpus} GPUs", file=sys.stderr)
            return None
        with self._changed:
            while len(self._free) < case.num_gpus:
                self._changed.wait()
            if time.monotonic() + seconds > self._end:
                print(f"{name}: no time left for its {seconds:g} s", file=sys.stderr)
                return None
            gpus, self._free = self._free[: case.num_gpus], self._free[case.num_gpus :]
        return gpus

    def _run(self, name: str, gpus: list[int]) -> None:
        try:
            case = CASES[name]
            if self._model is not None:
                words = (self._model if word == MODEL else word for word in case.words)
                case = case._replace(words=tuple(words))
            result: dict[str, Any] = {}
            if self._other:
                store = self._store.with_name(f"{self._store.name}-other")
                before = measure(case, self._other, store, self._folder / f"{name}.other", gpus)
                result = {"other": before}
            result |= measure(case, TREE, self._store, self._folder / name, gpus)
            with self._changed:
                self.results[name] = result
                self._file.write_text(json.dumps(self.results, indent=1))
                print(name, *shown(result), sep=", ", flush=True)
        finally:
            with self._changed:
                self._free += gpus
                self._changed.notify_all()


def measure(case: Case, tree: Path, store: Path, place: Path, gpus: list[int]) -> dict[str, Any]:
    """A case's results: its lines of JSON, or else the last line of its output, and its file's.
    place: where its output goes, with the suffixes .out and .err, and .json for its own file."""
    own = place.with_name(f"{place.name}.json")
    filled = {STORE: str(store.absolute()), PLACE: str(own.absolute())}
    words = [filled.get(word, word) for word in case.words]
    environment = {
        **os.environ, "NANOVLLM_CACHE": str(store.absolute()), "PYTHONPATH": _path(tree),
        "CUDA_VISIBLE_DEVICES": _visible(gpus),
    }  # fmt: skip
    result: dict[str, Any] = {"command": " ".join(["python", *words])}
    if own.is_file():
        own.unlink()  # of an earlier run, which failed
    started = time.monotonic()
    try:
        run([sys.executable, *words], environment, Limit(case.seconds), folder=tree, output=place)
    except (RuntimeError, TimeoutError) as error:
        result["error"] = str(error)
    result["seconds"] = round(time.monotonic() - started, 1)
    output = place.with_name(f"{place.name}.out").read_text().splitlines()
    lines = [found for line in output if (found := json_of(line))]
    result |= {"lines": lines} if lines else {"last_line": "".join(output[-1:])}
    if own.is_file() and (text := own.read_text()):
        try:
            result["results"] = of_file(text)
        except ValueError as error:  # it was killed while it wrote
            result.setdefault("error", f"{own.name}: {error}")
    return result


def of_file(text: str) -> Any:
    """The results in a file: its JSON, or a list of the objects that are its lines."""
    return [json.loads(one) for one in text.splitlines()] if _has_lines(text) else json.loads(text)


def _has_lines(text: str) -> bool:
    """Whether a file of results has one JSON object a line."""
    return text.count("\n{") > 0 and text.startswith("{") and "\n}" not in text


def json_of(line: str) -> dict[str, Any] | None:
    """The object that a line is; None for other lines."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def shown(result: dict[str, Any]) -> list[str]:
    """A case's seconds, its rates, and its error."""
    rates = [line[RATE] for line in result.get("lines", ()) if RATE in line]
    words = [f"{result['seconds']:g} s", *(f"{rate:,.1f} tok/s" for rate in rates)]
    words += [f"the other: {', '.join(shown(result['other']))}"] if "other" in result else []
    return [*words, result["error"][-300:]] if "error" in result else words


def _visible(gpus: Sequence[int]) -> str:
    """These of the GPUs that this process may use."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = own.split(",") if own else list(map(str, range(max(gpus) + 1)))
    return ",".join(names[gpu] for gpu in gpus)


def _path(tree: Path) -> str:
    return os.pathsep.join(filter(None, [str(tree.absolute()), os.environ.get("PYTHONPATH", "")]))


def main() -> int:
    """Run what is left; the number of cases that have failed, at most 1."""
    args = arguments()
    names = chosen(args.cases)
    if args.list:
        for name in names:
            print(f"{name:20} {CASES[name].seconds:4g} s  python {' '.join(CASES[name].words)}")
        return 0
    num_gpus = args.gpus
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    turn = Round(args, num_gpus)
    turn.run(names)
    return int(any("error" in turn.results.get(name, {}) for name in names))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
