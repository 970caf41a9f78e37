"""Measures `nanovllm serve` end to end: starts, load, shutdown, and constrained rows.

# a published shape with random weights, in a temporary folder
python scripts/bench/server.py --shape Qwen3-0.6B --output server.json
# a checkpoint, and options of the engine for all cases
python scripts/bench/server.py --model DIR --output server.json -- --tensor-parallel-size 2
# some cases only
python scripts/bench/server.py --shape Qwen3-8B --max-num-seqs 256 --cases offline throughput
# small, on a CPU
python scripts/bench/server.py --model tiny-qwen3 --requests 20 --max-len 200 \\
    --max-model-len 512 --output server.json -- --device cpu

Cases, in this order:

start       seconds from the start of the process to the first answer, with an empty store and
            with a full one, which also has bytecode of Python packages if the installation lacks
            it; with --bytecode also with bytecode outside the store
offline     the requests of `nanovllm bench throughput` at once; these four are nanovllm bench serve
rate-20     requests of random tokens, 20 a second; prompts of no two cases are the same
rate-50     50 a second
rate-inf    all at once
ends        SIGTERM, and SIGKILL of the engine's process: exit status, seconds, what is left
throughput  nanovllm bench throughput, for the share that the server keeps
structured  scripts/bench/structured_rows.py

Of the load there is the processor time of each process, too (processor_use.py), on Linux.

Each case has a time limit. A failing case is reported, the others continue, and the exit status is
1. --output is written after each case. Answers and prompts of the load are token ids, and a
tokenizer of the model's size decodes them. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS
from scripts.bench import processor_use, server_results
from scripts.bench.server_process import NAME, NANOVLLM, Limit, Server, last_json, run
from scripts.bench.server_results import LOADS
from scripts.bench.start_up import environment_of_starts

CASES = ("start", *LOADS, "ends", "throughput", "structured")
FIGURES_OF_RUNS = (
    "output_throughput", "steady_output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms",
    "p99_itl_ms",
)  # fmt: skip
# in a child, so that the measuring process takes no device memory
PROBE = """
import sys
sys.path[:] = filter(None, sys.path)  # nothing from the working directory
import json, torch
from nanovllm.cli.bench.engines import versions
found = {"versions": versions(), "device": None, "used_bytes": None}
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    found.update(device=torch.cuda.get_device_name(), used_bytes=total - free)
print(json.dumps(found))
"""
RELEASE_SECONDS = 10.0  # until the driver has freed a process's memory
SPARE_BYTES = 64 << 20  # the tolerance between two measurements of device memory


def arguments(given: list[str]) -> argparse.Namespace:
    """Words after "--" are options of the engine."""
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=sorted(CONFIGS), help="random weights of this shape")
    source.add_argument("--model", help="embedded model or folder")
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    add("--output", type=Path, metavar="FILE", help="write all results here as JSON")
    add("--log", type=Path, metavar="FILE", help="append the servers' logs here")
    add("--case-timeout", type=float, default=180.0, metavar="X", help="seconds for each case")
    add("--api-processes", type=int, default=4, metavar="N")
    add("--max-num-seqs", type=int, default=1024, metavar="N")
    add("--max-model-len", type=int, default=4096, metavar="N")
    add("--starts", type=int, default=3, metavar="N", help="starts with a full store")
    bytecode = "also start with a folder of bytecode: for containers whose packages have none"
    add("--bytecode", action="store_true", help=bytecode)
    add("--store", type=Path, metavar="DIR", help="compiled programs; default: an empty folder")
    lengths = parser.add_argument_group("the load")
    add = lengths.add_argument
    add("--requests", type=int, default=1000, metavar="N", help="at each rate")
    repeats = "each load, with other prompts; the result is the run with the median throughput"
    add("--repeats", type=int, default=1, metavar="N", help=repeats)
    few = "at 20 a second; default: 600, or --requests if this is less"
    most = "unfinished requests; more are sent as these end"
    add("--max-concurrency", type=int, metavar="N", help=most)
    add("--clients", type=int, metavar="N", help="processes that send; default: up to 6")
    add("--requests-at-20", type=int, metavar="N", help=few)
    add("--random-len", type=int, default=128, metavar="N", help="tokens of prompts and answers")
    add("--offline-requests", type=int, default=256, metavar="N")
    add("--min-len", type=int, default=100, metavar="N", help="of offline prompts and answers")
    add("--max-len", type=int, default=1024, metavar="N", help="of offline prompts and answers")
    add("--rows", type=int, default=32, metavar="N", help="rows of the case structured")
    add("--rows-tokens", type=int, default=256, metavar="N", help="tokens of each of these rows")
    args = parser.parse_args(given[:split])
    args.engine = given[split + 1 :]
    return args


class Bench:
    """The cases of one model. Those of the load share a server."""

    def __init__(self, args: argparse.Namespace, model: str, scratch: Path) -> None:
        self._args, self._model, self._scratch = args, model, scratch
        self._environment = environment_of_starts(None)
        self._server: Server | None = None
        self._used_bytes: int | None = None
        random = ["--random-weights"] if args.shape else []
        self._engine_words = [*random, *args.engine]
        self._engine_words += ["--compile-cache", str(args.store or scratch / "store")]
        self._log = args.log or scratch / "log"

    def machine(self) -> dict[str, Any]:
        found = self._probe(Limit(self._args.case_timeout))
        self._used_bytes = found.pop("used_bytes")
        return {**found, "host": platform.node(), "cpus": os.cpu_count()}

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def run(self, name: str, limit: Limit) -> dict[str, Any]:
        """The numbers of a case. Raises its errors."""
        if name not in LOADS and name != "ends":
            self.close()
        cases: dict[str, Callable[[Limit], dict[str, Any]]] = {
            "start": self._starts,
            "ends": self._ends,
            "throughput": self._throughput,
            "structured": self._structured,
            **{load: partial(self._load, load) for load in LOADS},
        }
        return cases[name](limit)

    def _new_server(self, environment: dict[str, str]) -> Server:
        args = self._args
        words = [
            self._model, "--host", "127.0.0.1", "--api-processes", str(args.api_processes),
            "--max-num-seqs", str(args.max_num_seqs), "--max-model-len", str(args.max_model_len),
            "--no-access-log", "--served-model-name", NAME, *self._engine_words,
            "--max-queue-len", str(max(4096, args.requests)),
        ]  # fmt: skip
        return Server(words, environment, self._log)

    def _running(self, limit: Limit) -> Server:
        """The server that is shared; a new one if there is none, or if it has ended."""
        if self._server is None or not self._server.is_running:
            self.close()
            self._server = self._new_server(self._environment)
            self._server.wait(limit)
            self._server.ask(limit)
        return self._server

    def _start(self, environment: dict[str, str], limit: Limit) -> float:
        """Seconds to the first answer. The server keeps running."""
        self.close()
        self._server = self._new_server(environment)
        self._server.wait(limit)
        self._server.ask(limit)
        return round(time.monotonic() - self._server.begun, 2)

    def _starts(self, limit: Limit) -> dict[str, Any]:
        num = self._args.starts
        found: dict[str, Any] = {"empty_store_s": self._start(self._environment, limit)}
        found["full_store_s"] = [self._start(self._environment, limit) for _ in range(num)]
        if self._args.bytecode:
            environment = environment_of_starts(self._scratch / "bytecode")
            self._start(environment, limit)  # writes it
            found["bytecode_s"] = [self._start(environment, limit) for _ in range(num)]
        for name in ("full_store_s", "bytecode_s"):
            if name in found:
                found[f"{name}_median"] = statistics.median(found[name])
        return found

    def _load(self, name: str, limit: Limit) -> dict[str, Any]:
        """The run with the median throughput, and the main figures of all runs."""
        runs = [self._load_once(name, run, limit) for run in range(self._args.repeats)]
        by_throughput = sorted(runs, key=lambda one: float(one["output_throughput"]))
        found = by_throughput[(len(runs) - 1) // 2]
        if len(runs) > 1:
            found["runs"] = [{key: one[key] for key in FIGURES_OF_RUNS} for one in runs]
        return found

    def _load_once(self, name: str, run_index: int, limit: Limit) -> dict[str, Any]:
        """The results of `nanovllm bench serve`, with its names."""
        args, server = self._args, self._running(limit)
        if name == "offline":
            words = ["--dataset-name", "nanovllm", "--num-prompts", str(args.offline_requests),
                     "--min-len", str(args.min_len), "--max-len", str(args.max_len)]  # fmt: skip
        else:
            few = min(600, args.requests) if args.requests_at_20 is None else args.requests_at_20
            num, length = few if name == "rate-20" else args.requests, str(args.random_len)
            words = ["--num-prompts", str(num), "--random-input-len", length,
                     "--random-output-len", length, "--ignore-eos", "--temperature", "0.6",
                     "--request-rate", str(LOADS[name])]  # fmt: skip
        seed = 1000 * list(LOADS).index(name) + run_index
        words += ["--seed", str(seed), "--base-url", server.url]
        words += ["--tokenizer", self._model, "--metric-percentiles", "50,99", "--disable-tqdm"]
        words += ["--save-result", "--result-dir", str(self._scratch)]
        for option in ("--max-concurrency", "--num-clients"):
            value = args.clients if option == "--num-clients" else args.max_concurrency
            words += [option, str(value)] if value is not None else []
        command = [*NANOVLLM, "bench", "serve", *words, "--result-filename", f"{name}.json"]
        processes: list[dict[str, Any]] = []
        with processor_use.watched(processes):
            run(command, self._environment, limit)
        found: dict[str, Any] = json.loads((self._scratch / f"{name}.json").read_text())
        return {**found, "processes": processes}

    def _ends(self, limit: Limit) -> dict[str, Any]:
        """The shutdown of two servers, and the device memory still in use after it."""
        found: dict[str, Any] = {}
        for name in ("sigterm", "sigkill_of_the_engine"):
            server = self._running(limit)
            if name == "sigterm":
                ended = server.end(server.process.pid, signal.SIGTERM)
            else:
                ended = server.end(server.engine_pid(), signal.SIGKILL)
            found[name] = {**ended, "device_bytes_left": self._bytes_left(limit)}
            self.close()
        wrong = [
            name for name, status in (("sigterm", 0), ("sigkill_of_the_engine", 1))
            if found[name]["exit_status"] != status or found[name]["processes_left"]
            or (found[name]["device_bytes_left"] or 0) > SPARE_BYTES
        ]  # fmt: skip
        if wrong:
            raise RuntimeError(f"{wrong[0]}: {found[wrong[0]]}")
        return found

    def _bytes_left(self, limit: Limit) -> int | None:
        """How much more of the device's memory is used than before the first server."""
        if self._used_bytes is None:
            return None
        end = time.monotonic() + RELEASE_SECONDS
        while True:
            left = max(0, int(self._probe(limit)["used_bytes"]) - self._used_bytes)
            if left <= SPARE_BYTES or time.monotonic() > end:
                return left

    def _probe(self, limit: Limit) -> dict[str, Any]:
        return last_json(run([sys.executable, "-c", PROBE], self._environment, limit))

    def _throughput(self, limit: Limit) -> dict[str, Any]:
        args = self._args
        source = "--random-weights" if args.shape else "--model"
        words = [source, args.shape or args.model, "--num-seqs", str(args.offline_requests),
                 "--bs", str(args.offline_requests), "--runs", "3",
                 "--min-len", str(args.min_len), "--max-len", str(args.max_len),
                 "--max-model-len", str(args.max_model_len)]  # fmt: skip
        own = [word for word in self._engine_words if word != "--random-weights"]
        out = run([*NANOVLLM, "bench", "throughput", *words, *own], self._environment, limit)
        return last_json(out)

    def _structured(self, limit: Limit) -> dict[str, Any]:
        script = Path(__file__).with_name("structured_rows.py")
        words = ["--model", self._model, "--rows", str(self._args.rows),
                 "--tokens", str(self._args.rows_tokens),
                 "--max-model-len", str(self._args.max_model_len), *self._engine_words]  # fmt: skip
        return last_json(run([sys.executable, str(script), *words], self._environment, limit))


@contextmanager
def model_of(args: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """The model for `nanovllm serve`."""
    if args.shape is None:
        yield args.model
        return
    from scripts.bench.shape_folder import write_folder  # imports transformers

    folder = scratch / args.shape
    folder.mkdir()
    write_folder(folder, CONFIGS[args.shape])
    yield str(folder)


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run the cases, and write the results after each of them."""
    begun = time.monotonic()
    results: dict[str, Any] = {
        "model": args.shape or args.model,
        "command": shlex.join(["python", "scripts/bench/server.py", *sys.argv[1:]]),
        "cases": {},
    }
    with model_of(args, scratch) as model:
        bench = Bench(args, model, scratch)
        try:
            results |= bench.machine()
            for name in (one for one in CASES if one in args.cases):
                try:
                    found = bench.run(name, Limit(args.case_timeout))
                except Exception as error:
                    found = {"error": f"{type(error).__name__}: {error}"}
                    bench.close()
                results["cases"][name] = found
                server_results.add_share(results["cases"])
                results["seconds"] = round(time.monotonic() - begun, 1)
                print(
                    f"[{results['seconds']:6.1f} s] {server_results.line(name, found)}", flush=True
                )
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        finally:
            bench.close()
    return results


def main() -> int:
    args = arguments(sys.argv[1:])
    for name in ("starts", "repeats"):
        if (number := getattr(args, name)) < 1:
            raise ValueError(f"--{name} is {number}: it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="server-") as name:
        results = measure(args, Path(name))
    share = results["cases"].get("offline", {}).get("share_of_throughput")
    if share is not None:
        print(f"the server keeps {share:.1%} of the offline throughput")
    return int(any("error" in one for one in results["cases"].values()))


if __name__ == "__main__":
    # the server has its own session, so nothing else would end it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(command_line.run(main))
