"""From process start to first token, in fresh processes: with an empty store, with a full one, and with another checkpoint.

python scripts/bench/start_up.py --shape Qwen3-0.6B            # random weights in a temporary folder
python scripts/bench/start_up.py --shape tiny --device cpu --max-model-len 2048     # the embedded model's shape
python scripts/bench/start_up.py --model DIR [--other DIR]     # checkpoints that are there

Prints one line per start and, last, JSON: seconds in total and by part. "python" is the interpreter and this script;
"imports" (torch and our engine; the last line has torch's alone) and "weights" are the parts that no store can save;
"cache", "prefill" and "decode" hold loading (or, cold, compiling) programs and kernels, running each bucket once, and
captures. Files that were just written are in the page cache, so reading weights is a copy from memory.

What is installed has bytecode here, as pip leaves it. Some containers have none and forbid Python to write any
(PYTHONDONTWRITEBYTECODE): --installed-as-is measures what a start takes there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The published config.json files, as far as shapes go.
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "attention_bias": False, "hidden_act": "silu", "eos_token_id": 151645, "dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen3-8B": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
IMPORT_TORCH = (
    "import time; begun = time.perf_counter(); import torch; print(time.perf_counter() - begun)"
)
IMPORT_ALL = """
import tokenizers, torch, torch._inductor.compile_fx, transformers
from transformers import AutoConfig, AutoTokenizer
from nanovllm.platforms import preload
preload.import_compilers()
"""
EMBEDDED = ROOT / "nanovllm" / "assets" / "tiny-qwen3"


def child(model: str, options: dict[str, Any], started: float) -> None:
    """One start: `started` is the time at which the parent spawned it."""
    seconds: dict[str, float] = {"python": time.time() - started}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    from nanovllm import LLM, SamplingParams

    lap("import nanovllm")
    llm = LLM(model, **options)  # which imports torch, beside what it has begun
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
    report = {
        "total": total, "seconds": seconds, "programs_compiled": runner.compiler.num_compiled,
        "programs_loaded": runner.compiler.num_loaded, "kernels_compiled": len(runner.platform.kernels_compiled()),
        "compilers_imported": [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules],
        "tokens": tokens,
    }  # fmt: skip
    print("RESULT " + json.dumps(report), flush=True)


def environment_of_starts(bytecode: Path | None) -> dict[str, str]:
    """No cache but the store: Triton's and Inductor's folders lie in it. Bytecode, if any, is kept in a folder of its own."""
    unset = ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NANOVLLM_CACHE"]
    unset += ["PYTHONDONTWRITEBYTECODE"] if bytecode is not None else []
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return (
        environment if bytecode is None else {**environment, "PYTHONPYCACHEPREFIX": str(bytecode)}
    )


def start(
    model: Path,
    store: Path,
    options: dict[str, Any],
    environment: dict[str, str],
    log_to: Path | None,
) -> dict[str, Any]:
    """Spawn one start, its log appended to a file."""
    job = json.dumps(
        {
            "model": str(model),
            "options": {**options, "compile_cache": str(store)},
            "started": time.time(),
        }
    )
    done = subprocess.run(
        [sys.executable, __file__, "--child", job], env=environment, capture_output=True, text=True
    )
    if log_to is not None:
        with log_to.open("a") as file:
            file.write(f"--- start with {options} at {time.ctime()}\n{done.stderr}\n")
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"a start failed ({done.returncode}):\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """Random weights in transformers' layout, a file a layer, and the embedded model's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from nanovllm.models import registry

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    hf = AutoConfig.from_pretrained(folder)
    dtype = getattr(
        torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    )
    model = registry.architecture(hf.architectures)(hf, dtype=dtype)
    pool = (
        torch.empty(1 << 24)
        .normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
    )
    for group_idx, group in enumerate(model.declared):
        tensors = {}
        for param in group.values():
            for source, rows in zip(param.sources, param.parts):
                shape = (rows, *param.shape[1:])
                size = int(torch.Size(shape).numel())
                repeats = -(-size // pool.numel())
                tensors[source] = pool.roll(len(tensors)).repeat(repeats)[:size].view(shape).clone()
        save_file(tensors, folder / f"part_{group_idx:03}.safetensors")
    return folder


def show(name: str, result: dict[str, Any]) -> None:
    parts = ", ".join(
        f"{part} {value:.2f}" for part, value in result["seconds"].items() if value >= 0.005
    )
    print(f"{name:16} {result['total']:6.2f} s: {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=["tiny", *SHAPES])
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint, instead of --shape")
    parser.add_argument(
        "--other", type=Path, help="with --model: another checkpoint of the same shape"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument(
        "--log",
        type=Path,
        help="a file for the starts' logs (NANOVLLM_LOG_LEVEL=DEBUG: also the workers')",
    )
    parser.add_argument("--warm", type=int, default=3, help="starts with the full store")
    parser.add_argument(
        "--installed-as-is", action="store_true", help="write no bytecode where there is none"
    )
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        child(job["model"], job["options"], job["started"])
        return
    if (args.shape is None) == (args.model is None):
        parser.error("give --shape or --model")
    sys.path.insert(0, str(ROOT))
    options = {"device": args.device, "max_model_len": args.max_model_len}
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        scratch = Path(name)
        model, other = args.model, args.other
        if args.shape:
            config = (
                json.loads((EMBEDDED / "config.json").read_text())
                if args.shape == "tiny"
                else SHAPES[args.shape]
            )
            model = write_checkpoint(scratch / "one", config, 0)
            other = write_checkpoint(scratch / "other", config, 1)
        environment = environment_of_starts(None if args.installed_as_is else scratch / "bytecode")
        # what this machine has never read, a first import pays for
        subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, check=True)
        store = scratch / "store"
        results = {"cold": start(model, store, options, environment, args.log)}
        show("cold", results["cold"])
        for i in range(args.warm):
            results[f"warm_{i + 1}"] = start(model, store, options, environment, args.log)
            show(f"warm {i + 1}", results[f"warm_{i + 1}"])
        if other is not None:
            # which stops, and names what is missing, where the store does not serve it as well
            required = {**options, "compile_cache_mode": "require"}
            results["other_checkpoint"] = start(other, store, required, environment, args.log)
            show("other checkpoint", results["other_checkpoint"])
        warm = [results[f"warm_{i + 1}"] for i in range(args.warm)]
        import_torch = [sys.executable, "-c", IMPORT_TORCH]
        alone = subprocess.run(
            import_torch, env=environment, check=True, capture_output=True, text=True
        )
        print(f"import torch, in a process of its own: {float(alone.stdout):.2f} s", flush=True)
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
    main()
