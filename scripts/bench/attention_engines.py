"""Times whole engines that differ in their attention, in turn, in one process on one device.

python scripts/bench/attention_engines.py --out engines.json [--threshold 4096]

By default the device's own kernels ("triton") and "auto", which takes an installed flash-attn for
prefill where the table in nanovllm/platforms/attention.py says so. --threshold makes the line of
that table for this GPU: interface 3 with heads of 128, from steps of so many tokens on. Weights are
random. Every case is run once by each engine and then --rounds times in turn. `tok_s` counts the
tokens of prompts and answers together; `same` are the greedy tokens before the first difference of
their answer, and all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.platforms import attention
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS


class Case(NamedTuple):
    """Prompts of a length that run together, and the tokens of each answer."""

    prompts: int
    length: int
    answer: int


CASES = {
    "Qwen3-0.6B": (Case(1, 8192, 1), Case(1, 16384, 1), Case(16, 8192, 1), Case(256, 128, 256)),
    "Qwen3-8B": (Case(1, 8192, 1), Case(1, 16384, 1), Case(4, 16384, 1), Case(8, 8192, 64)),
}
SPARE_TOKENS = 4096  # of a cache, beyond what a case holds at most
LARGEST_BLOCK = 256  # tokens
BLOCK = {"auto": 128}  # with fa3-fwd; 64 for the others


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path)
    add("--shapes", nargs="+", default=list(CASES), choices=CASES)
    add("--backends", nargs=2, default=["triton", "auto"], metavar="BACKEND")
    add("--rounds", type=int, default=3)
    add("--threshold", type=int, help="tokens; by default the table decides")
    add("--layers", type=int, help="use only this many layers")
    add("--divide", type=int, default=1, help="divide prompts and lengths, for a trial on a CPU")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if args.threshold is not None:
        attention.FASTER_PREFILL[device] = {3: {128: args.threshold}}
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for row in _compare(shape, args):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps({"device": device, "rows": rows}, indent=1))
        gc.collect()  # the next engines need the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _compare(shape: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case and engine."""
    cases = [_divided(case, args.divide) for case in CASES[shape]]
    config = CONFIGS[shape]
    if args.layers:
        config = {**config, "num_hidden_layers": args.layers}
    engines = {backend: _load(config, backend, cases) for backend in args.backends}
    chosen = {name: llm.engine.runner.spec.attention for name, llm in engines.items()}
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(f"{' and '.join(chosen)} are the same attention on this device")
    for case in cases:
        for name, found in _measure(engines, case, args.rounds).items():
            about = {"shape": shape, "backend": name, "attention": chosen[name].describe()}
            yield {**about, **case._asdict(), **found}
    for llm in engines.values():
        llm.close()


def _divided(case: Case, by: int) -> Case:
    return Case(-(-case.prompts // by), max(case.length // by, 2), -(-case.answer // by))


def _load(config: dict[str, Any], backend: str, cases: list[Case]) -> LLM:
    """An engine whose cache holds the largest case, so that two fit on a device."""
    most = max(case.prompts * (case.length + case.answer + LARGEST_BLOCK) for case in cases)
    with tempfile.TemporaryDirectory(prefix="attention-engines-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return LLM(
            folder,
            random_weights=True,
            skip_tokenizer_init=True,
            attention_backend=backend,
            max_model_len=max(case.length + case.answer for case in cases) + 1,
            max_num_seqs=max(case.prompts for case in cases),
            num_kvcache_blocks=(most + SPARE_TOKENS) // BLOCK.get(backend, 64),
        )


def _measure(engines: dict[str, LLM], case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of each engine, and how many tokens are those of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, list[list[int]]] = {}
    params = SamplingParams(temperature=0, max_tokens=case.answer, ignore_eos=True)
    for number in range(rounds + 1):
        for name, llm in engines.items():
            rng, size = random.Random(number), llm.engine.model_config.vocab_size
            prompts = [
                [rng.randrange(5, size) for _ in range(case.length)] for _ in range(case.prompts)
            ]
            llm.reset_prefix_cache()
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds[name].append(time.perf_counter() - begun)
            answers[name] = [list(output["token_ids"]) for output in outputs]
    first = next(iter(answers.values()))
    num_tokens = case.prompts * (case.length + case.answer)
    return {
        name: {
            "seconds": [round(value, 5) for value in times[1:]],
            "tok_s": round(num_tokens / statistics.median(times[1:])),
            "same": [_same(first, answers[name]), case.prompts * case.answer],
        }
        for name, times in seconds.items()
    }


def _same(expected: list[list[int]], actual: list[list[int]]) -> int:
    """Tokens before the first difference of their answer."""
    total = 0
    for one, other in zip(expected, actual, strict=True):
        different = [at for at, pair in enumerate(zip(one, other, strict=True)) if len({*pair}) > 1]
        total += different[0] if different else len(one)
    return total


if __name__ == "__main__":
    sys.exit(command_line.run(main))
