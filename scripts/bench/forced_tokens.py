"""Steps and tokens per second of JSON, with the tokens that its schema forces verified together.

    python scripts/bench/forced_tokens.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out results.json

One row at a time, greedily, under a schema with names, numbers, choices and a nested object. Plain
engines are compared with those that look tokens up (`ngram`) with up to --num drafts. "compact":
the grammar allows no whitespace between the parts, so more of the text is forced. Each case runs
once before it is measured; "equal" says whether the answers are those of the plain engine.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.structured_params import StructuredOutputsParams
from nanovllm.tools import command_line

logger = logging.getLogger("forced_tokens")
NAME = {"type": "string", "maxLength": 12}
PLACE = {
    "type": "object", "additionalProperties": False, "required": ["street_name", "postal_code"],
    "properties": {"street_name": NAME, "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"}},
}  # fmt: skip
PROPERTIES = {
    "first_name": NAME, "last_name": NAME, "age": {"type": "integer", "minimum": 1, "maximum": 99},
    "occupation": {"enum": ["software engineer", "teacher", "physician"]},
    "is_student": {"type": "boolean"}, "address": PLACE,
}  # fmt: skip
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": list(PROPERTIES),
    "properties": PROPERTIES,
}  # fmt: skip
PEOPLE = ("a nurse", "an old man", "a young woman", "a doctor from Paris")


def answer(llm: LLM, *, compact: bool) -> tuple[list[list[int]], int, float]:
    """The answers one after another, and the steps and seconds that they took."""
    form = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=compact)
    params = SamplingParams(temperature=0, max_tokens=160, structured_outputs=form)
    chats: list[Any] = [[{"role": "user", "content": f"Describe {who} as JSON."}] for who in PEOPLE]
    metrics, begun = engine_of(llm).metrics, time.perf_counter()
    before = metrics.num_steps
    found = [llm.chat(chat, params, use_tqdm=False)[0]["token_ids"] for chat in chats]
    return found, metrics.num_steps - before, time.perf_counter() - begun


def measure(args: argparse.Namespace, num: int) -> dict[str, Any]:
    """Answers, steps and rates of an engine with up to `num` drafts; 0: a plain one."""
    options: dict[str, Any] = {
        "device": args.device, "enforce_eager": args.enforce_eager, "max_model_len": 512,
        "max_num_seqs": 1,
    }  # fmt: skip
    if num:
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": num}
    llm = LLM(args.model, **options)
    found: dict[str, Any] = {}
    for name, compact in (("compact", True), ("free", False)):
        answer(llm, compact=compact)
        counts = engine_of(llm).scheduler.counts
        before = counts.num_forced_tokens
        answers, steps, seconds = answer(llm, compact=compact)
        num_tokens = sum(map(len, answers))
        found[name] = {
            "answers": answers, "tokens": num_tokens, "steps": steps,
            "forced": counts.num_forced_tokens - before,
            "tokens_per_second": round(num_tokens / seconds, 1),
        }  # fmt: skip
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a Hub id")
    parser.add_argument("--num", type=int, nargs="+", default=[3, 7], help="drafts of a step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: list[dict[str, Any]] = []
    plain: dict[str, Any] = {}
    for num in (0, *args.num):
        found = measure(args, num)
        plain = plain or {name: dict(one) for name, one in found.items()}
        for name, one in found.items():
            first = plain[name]
            one["equal"] = one.pop("answers") == first["answers"]
            one["of_plain"] = round(one["tokens_per_second"] / first["tokens_per_second"], 3)
            results.append({"drafts": num, "whitespace": name, **one})
            logger.info("%s", json.dumps(results[-1]))
    about = {"versions": versions(), "command": sys.argv[1:], "results": results}
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
