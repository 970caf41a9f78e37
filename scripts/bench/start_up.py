"""Times starts in fresh processes: with an empty store, a full one, and another checkpoint.

    python scripts/bench/start_up.py --shape Qwen3-0.6B
    python scripts/bench/start_up.py --shape tiny --device cpu --max-model-len 2048
    TMPDIR=DIR python scripts/bench/start_up.py --shape Qwen3-30B-A3B --one
    python scripts/bench/start_up.py --model DIR [--other DIR]

With `--shape`, checkpoints with random weights are written to a temporary folder; `tiny` has the
shape of the embedded model. Large ones need a disk with room for them, and `--one` for no second.

Prints one line per start, then JSON: seconds from process start to first token, in total and by
part. "python" is the interpreter and this script. "imports" (torch and the engine; the JSON also
has torch's alone) and "weights" are the parts that a store cannot shorten. "cache", "prefill" and
"decode" load or, in a cold start, compile programs and kernels, run each bucket once, and capture.
Weights come from the page cache: the files have just been written.

Installed packages have bytecode here, as pip leaves them. In containers that have none and set
PYTHONDONTWRITEBYTECODE, a start takes what --installed-as-is measures.
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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# imports nothing from the working directory
PATH = "import sys; sys.path[:] = filter(None, sys.path); "
IMPORT_TORCH = PATH + (
    "import time; begun = time.perf_counter(); import torch; print(time.perf_counter() - begun)"
)
IMPORT_ALL = f"""{PATH}
import tokenizers, torch, torch._inductor.compile_fx, transformers
from transformers import AutoConfig, AutoTokenizer
from nanovllm.platforms import preload
preload.import_compilers()
"""
EMBEDDED = ROOT / "nanovllm" / "assets" / "tiny-qwen3"


def child(model: str, options: dict[str, Any], started: float) -> None:
    """One start. The parent spawned this process at the time `started`."""
    seconds: dict[str, float] = {"python": time.time() - started}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    from nanovllm import LLM, SamplingParams

    lap("import nanovllm")
    llm = LLM(model, **options)  # imports torch
    lap("LLM")
    load = llm.engine.load_seconds
    seconds["imports"] = seconds.pop("LLM") - sum(load.values())
    seconds.update(load)
    stream = llm.stream(
        [list(range(5, 24))], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    )
    tokens = list(next(stream)["token_ids"])
    lap("first token")
    total = time.time() - started
    tokens += [token for piece in stream for token in piece["token_ids"]]
    runner = llm.engine.runner
    compilers = ("torch._dynamo", "torch._inductor", "sympy")
    report = {
        "total": total,
        "seconds": seconds,
        "programs_compiled": runner.compiler.num_compiled,
        "programs_loaded": runner.compiler.num_loaded,
        "kernels_compiled": len(runner.platform.kernels_compiled()),
        "compilers_imported": [name for name in compilers if name in sys.modules],
        "tokens": tokens,
    }
    print("RESULT " + json.dumps(report), flush=True)


def environment_of_starts(bytecode: Path | None) -> dict[str, str]:
    """The variables of a start. Unsets the folders of Triton's and Inductor's caches, so that they
    are in the store. Bytecode, if any, is in a separate folder."""
    unset = ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NANOVLLM_CACHE"]
    if bytecode is not None:
        unset.append("PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if bytecode is not None:
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    return environment


def start(
    model: Path,
    store: Path,
    options: dict[str, Any],
    environment: dict[str, str],
    log_to: Path | None,
) -> dict[str, Any]:
    """Spawn one start and return its report. Appends its log to a file."""
    all_options = {**options, "compile_cache": str(store)}
    job = json.dumps({"model": str(model), "options": all_options, "started": time.time()})
    command = [sys.executable, __file__, "--child", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if log_to is not None:
        with log_to.open("a") as file:
            file.write(f"--- start with {options} at {time.ctime()}\n{done.stderr}\n")
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"a start failed ({done.returncode}):\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def show(name: str, result: dict[str, Any]) -> None:
    parts = ", ".join(
        f"{part} {value:.2f}" for part, value in result["seconds"].items() if value >= 0.005
    )
    print(f"{name:16} {result['total']:6.2f} s: {parts}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--child", help=argparse.SUPPRESS)
    add("--shape", help="tiny or a name in nanovllm/tools/shapes.py")
    add("--model", type=Path, help="a folder with a checkpoint, instead of --shape")
    add("--other", type=Path, help="with --model: another checkpoint of the same shape")
    add("--layers", type=int, help="use this many layers only (with --shape)")
    add("--one", action="store_true", help="with --shape: write no second checkpoint of it")
    add("--device", default="auto")
    add("--max-model-len", type=int, default=4096)
    log = "a file for the starts' logs; NANOVLLM_LOG_LEVEL=DEBUG adds those of the workers"
    add("--log", type=Path, help=log)
    add("--warm", type=int, default=3, help="starts with the full store")
    add("--installed-as-is", action="store_true", help="write no bytecode where there is none")
    args = parser.parse_args()
    if args.child is None and (args.shape is None) == (args.model is None):
        parser.error("give --shape or --model")
    if args.model and (args.layers or args.one):
        parser.error("--layers and --one go with --shape")
    return args


def checkpoints(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path | None]:
    """The model and another checkpoint of its shape, if any. Writes them for --shape."""
    if args.shape is None:
        return args.model, args.other
    # not at the top: a start times its imports
    from nanovllm.tools.shapes import CONFIGS
    from scripts.bench.random_checkpoint import write_checkpoint

    shapes = {"tiny": json.loads((EMBEDDED / "config.json").read_text()), **CONFIGS}
    if args.shape not in shapes:
        raise ValueError(f"--shape {args.shape} is unknown: use one of {', '.join(shapes)}")
    one, other = scratch / "one", scratch / "other"
    config = dict(shapes[args.shape])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    write_checkpoint(one, config, 0)
    return one, None if args.one else write_checkpoint(other, config, 1)


def all_starts(
    args: argparse.Namespace, scratch: Path, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Reports of the cold start, the warm ones, and the one with another checkpoint."""
    model, other = checkpoints(args, scratch)
    options = {"device": args.device, "max_model_len": args.max_model_len}
    # the first import on a machine reads files that are not in the page cache
    subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, check=True)
    results: dict[str, dict[str, Any]] = {}
    for name in ("cold", *(f"warm_{i + 1}" for i in range(args.warm))):
        results[name] = start(model, scratch / "store", options, environment, args.log)
        show(name.replace("_", " "), results[name])
    if other is not None:
        # "require" fails with a list of what is missing, unless the store also fits this checkpoint
        required = {**options, "compile_cache_mode": "require"}
        found = start(other, scratch / "store", required, environment, args.log)
        results["other_checkpoint"] = found
        show("other checkpoint", found)
    return results


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        scratch = Path(name)
        environment = environment_of_starts(None if args.installed_as_is else scratch / "bytecode")
        results = all_starts(args, scratch, environment)
        import_torch = [sys.executable, "-c", IMPORT_TORCH]
        alone = subprocess.run(
            import_torch, env=environment, check=True, capture_output=True, text=True
        )
    print(f"import torch, in a separate process: {float(alone.stdout):.2f} s", flush=True)
    warm = [results[f"warm_{i + 1}"] for i in range(args.warm)]
    summary = {
        "model": args.shape or str(args.model),
        "cold_s": results["cold"]["total"],
        "warm_s": statistics.median(result["total"] for result in warm),
        "warm_without_imports_and_weights_s": statistics.median(
            result["total"] - result["seconds"]["imports"] - result["seconds"]["weights"]
            for result in warm
        ),
        "import_torch_s": float(alone.stdout),
        "bytecode": "as installed" if args.installed_as_is else "written",
        "same_tokens": all(result["tokens"] == results["cold"]["tokens"] for result in warm),
        "starts": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    given = arguments()
    if given.child:
        job = json.loads(given.child)
        child(job["model"], job["options"], job["started"])
    else:
        sys.path.insert(0, str(ROOT))  # runs without installation
        from nanovllm.tools import command_line  # not at the top: a start times its imports

        sys.exit(command_line.run(partial(main, given)))
