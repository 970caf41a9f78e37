"""Tokens per second of unconstrained rows, alone and with one more row, and of constrained rows.

    python scripts/bench/structured_rows.py --model tiny-qwen3 --device cpu

Prints a line of JSON: medians and all values of several runs. Grammars are compiled, and steps
captured, before the clock starts; the masks are those of a text. A run ends with the first batch's
last token, so a slower row beside it does not count. The row beside it
is constrained, or free: one more row of any kind makes a step longer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import engine_of
from nanovllm.cli.engine_options import add_engine_options, engine_options
from nanovllm.engine.engine import Engine
from nanovllm.flags import Parser
from nanovllm.tools import command_line

REGEX = "[a-zA-Z0-9 ,.]+"
PROMPT_TOKENS = 16


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=32, help="unconstrained rows, or constrained rows")
    add("--tokens", type=int, default=256, help="of each answer")
    add("--runs", type=int, default=3)
    add_engine_options(parser, skip=("max_num_seqs",))
    return parser.parse_args()


class Rows:
    """Runs batches on an engine. Prompts are new each time, so none is in the prefix cache."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self._engine, self._num_tokens = engine, num_tokens
        self._random = random.Random(0)

    def rate(self, num: int, *, is_constrained: bool, beside: bool | None) -> float:
        """Tokens per second of `num` rows. beside: whether one more row is constrained; None: there
        is none."""
        engine = self._engine
        ids = {self._add(is_constrained) for _ in range(num)}
        others = [] if beside is None else [self._add(beside)]
        begun = time.perf_counter()
        num_tokens = 0
        while ids:
            for one in engine.step():
                if one.request_id in ids and one.completion is not None:
                    num_tokens += len(one.completion.token_ids)
                    ids.remove(one.request_id)
        seconds = time.perf_counter() - begun
        engine.abort_all(others)
        if num_tokens != num * self._num_tokens:
            raise RuntimeError(f"{num} answers have {num_tokens} tokens: some have ended early")
        return num_tokens / seconds

    def _add(self, is_constrained: bool) -> int:
        top = self._engine.model_config.vocab_size - 1
        params = SamplingParams(
            temperature=0.6, max_tokens=self._num_tokens, ignore_eos=True,
            structured_outputs={"regex": REGEX} if is_constrained else None,  # type: ignore[arg-type]
        )  # fmt: skip
        prompt = [self._random.randint(0, top) for _ in range(PROMPT_TOKENS)]
        return self._engine.add_request(prompt, params, incremental=False)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model, options = engine_options(args, skip=("rows", "tokens", "runs", "max_num_seqs"))
    llm = LLM(model, max_num_seqs=args.rows + 1, **options)
    rows = Rows(engine_of(llm), args.tokens)
    kinds: dict[str, dict[str, Any]] = {
        "free": {"is_constrained": False, "beside": None},
        "free_beside_free": {"is_constrained": False, "beside": False},
        "free_beside_one": {"is_constrained": False, "beside": True},
        "constrained": {"is_constrained": True, "beside": None},
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for run in range(args.runs + 1):  # the kinds take turns; the first run warms up
        for name, kind in kinds.items():
            value = rows.rate(args.rows, **kind)
            if run:
                found[name].append(round(value, 1))
    llm.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "rows": args.rows,
        "tokens": args.tokens,
        "tokens_per_second": medians,
        "free_beside_one_share": round(medians["free_beside_one"] / medians["free"], 4),
        "of_free_beside_free": round(medians["free_beside_one"] / medians["free_beside_free"], 4),
        "constrained_share": round(medians["constrained"] / medians["free"], 4),
        "all": found,
    }


def main() -> None:
    args = arguments()
    for name in ("rows", "tokens", "runs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
