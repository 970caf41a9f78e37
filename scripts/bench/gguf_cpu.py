"""Speed and memory of a GGUF model on a CPU: the engine, and llama.cpp with as many threads.

    python scripts/bench/gguf_cpu.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --turns 5

The engines take turns, each time in a process of its own, and a figure is the best of all turns:
other programs on the machine make all figures smaller. With one thread times are processor time,
which other programs change less. Needs the package llama-cpp-python, built
for the machine (scripts/llama_cpp_model.py). Both have their defaults: the engine graphs, and
llama.cpp a cache in fp16. Prints a line of JSON for each turn, and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line
from scripts.llama_cpp_model import LlamaCpp, Token, library

ENGINES = ("engine", "llama.cpp")
PROMPT_TOKENS, LONG_TOKENS, BATCH = 16, 512, 8
Answer = Callable[[int, int, int], object]  # (sequences, tokens of a prompt, tokens of an answer)


def prompt_ids(sequence: int, num_tokens: int) -> list[int]:
    """Different ones for each sequence, among the first of the vocabulary."""
    return [100 + (sequence * 7919 + i * 104729) % 10_000 for i in range(num_tokens)]


def by_engine(path: Path, num_tokens: int) -> Answer:
    llm = LLM(
        str(path), device="cpu", max_model_len=LONG_TOKENS + num_tokens, max_num_seqs=BATCH,
        enable_prefix_caching=False,
    )  # fmt: skip

    def answer(num: int, prompt: int, tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt_ids(i, prompt)} for i in range(num)]
        llm.generate(prompts, params, use_tqdm=False)

    return answer


def by_llama_cpp(path: Path, num_tokens: int, num_threads: int) -> Answer:
    model = LlamaCpp(path, num_threads, LONG_TOKENS + num_tokens, BATCH)

    def answer(num: int, prompt: int, tokens: int) -> None:
        model.clear()
        found = model.logits(
            Token(one, i, sequence, i == prompt - 1)
            for sequence in range(num)
            for i, one in enumerate(prompt_ids(sequence, prompt))
        )
        for place in range(prompt, prompt + tokens - 1):
            best = found.argmax(-1)
            found = model.logits(Token(int(one), place, i) for i, one in enumerate(best))

    return answer


def peak_bytes() -> int:
    """The most memory that this process has had, with pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second, and MB, of the engine `args.child` in this process."""
    before, tokens = peak_bytes(), args.tokens
    if args.child == "engine":
        answer = by_engine(args.gguf, tokens)
    else:
        answer = by_llama_cpp(args.gguf, tokens, args.threads)

    def rate(num: int, prompt: int, answered: int, counted: int) -> float:
        clock = time.process_time if args.threads == 1 else time.perf_counter
        times = []
        for _ in range(args.repeats + 1):  # the first one warms up
            start = clock()
            answer(num, prompt, answered)
            times.append(clock() - start)
        return round(counted / min(times[1:]), 1)

    return {
        "batch 1": rate(1, PROMPT_TOKENS, tokens, tokens),
        f"batch {BATCH}": rate(BATCH, PROMPT_TOKENS, tokens, BATCH * tokens),
        f"prompt of {LONG_TOKENS}": rate(1, LONG_TOKENS, 1, LONG_TOKENS),
        "MB": round((peak_bytes() - before) / 1e6),
    }


def child(engine: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", engine, "--gguf", str(args.gguf)]
    for name in ("threads", "tokens", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"engine": engine, **found}), flush=True)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | engine | llama.cpp | ratio |", "|---|---|---|---|"]
    for name in found["engine"][0]:
        pick = min if name.startswith("MB") else max
        ours, theirs = (pick(one[name] for one in found[engine]) for engine in ENGINES)
        lines.append(f"| {name} | {ours:,g} | {theirs:,g} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gguf", type=Path, required=True)
    add("--turns", type=int, default=3, help="of each engine")
    add("--repeats", type=int, default=3, help="of each measurement in a turn")
    add("--tokens", type=int, default=96, help="of each answer")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--child", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    library()
    if args.child:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.turns):
        for engine in ENGINES:
            found[engine].append(child(engine, args))
    print(f"{args.gguf.name}, {args.gguf.stat().st_size / 1e6:.0f} MB, {args.threads} threads")
    print(table(found))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
