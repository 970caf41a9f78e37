"""Tokens per second with drafts and without, by proposer and rows.

    python scripts/bench/speculation.py --shape Qwen3-8B --out results.json
    python scripts/bench/speculation.py --model DIR --head HEAD --num 3 --out results.json

With --shape the weights are random and drafts are accepted at random, with the accept length of
each case (`rejection_sample_method`): eagle3 and dflash have heads of published shapes, whose steps
take as long as trained ones. With --model the drafts are those of a trained head, and the
prompts those of --prompts or made-up ones that training has not seen.

A rate counts from the first step after all prompts to the first end of an answer, so all rows run.
Each number of rows is measured --runs times; the median counts. Results are written after each
engine. With --tiny a small shape runs on the CPU in seconds, which shows that the script works:
its rates mean nothing. With --profile the tables of kernels follow: of a plain step and of the
largest one that verifies drafts, of one row.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from draft import prompts as draft_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.engine.engine import Engine
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.speculation_profile import profile_steps

logger = logging.getLogger("speculation")
PROMPT_TOKENS, DRAFTED = 128, 32_000  # tokens of a prompt, and those that a head can draft
TINY = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "eos_token_id": 511,
}  # fmt: skip
# What --tiny sets instead of the options' defaults
TINY_OPTIONS: dict[str, Any] = {
    "max_rows": 8, "tokens": 12, "runs": 1, "device": "cpu", "dtype": "float32",
    "enforce_eager": True,
}  # fmt: skip


class Case(NamedTuple):
    """A proposer: its method, drafts of a step at most, mean accept length, and numbers of rows.

    least: the rate of each number of rows that is aimed at, with Qwen3-8B on an H200: tokens per
    second, or a share of plain decoding if it is below 2.
    """

    name: str
    method: str
    num: int
    length: float | None
    rows: tuple[int, ...]
    least: tuple[float, ...]


OWN_HEAD = "dflash-own-head"  # with a head of some tokens, as `speculators` has it
CASES = (
    Case("plain", "", 0, None, (1, 8, 32, 256), (240, 0, 0, 0)),
    Case("eagle3", "eagle3", 3, 2.9, (1, 8, 32, 256), (520, 3600, 9500, 0.98)),
    Case("dflash", "dflash", 7, 4.5, (1,), (850,)),
    Case(OWN_HEAD, "dflash", 7, 4.5, (1,), (850,)),
    Case("ngram-useless", "ngram", 3, 1.0, (1, 256), (0.97, 0.97)),
)


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the model with random weights."""
    return TINY if args.tiny else CONFIGS[args.shape]


def head_config(shape: dict[str, Any], method: str) -> dict[str, Any]:
    """The config.json of a random head for a model of this shape, as heads are published."""
    num_layers = shape["num_hidden_layers"]
    config = {**shape, "tie_word_embeddings": False, "num_hidden_layers": 1}
    config.pop("layer_types", None)
    if method == "eagle3":
        layers = [1, num_layers // 2 - 1, num_layers - 4]
        return {
            **config, "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama",
            "draft_vocab_size": min(DRAFTED, shape["vocab_size"]),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers},
        }  # fmt: skip
    layers = [1 + i * (num_layers - 4) // 4 for i in range(5)]
    inner = {"mask_token_id": shape["vocab_size"] - 1, "target_layer_ids": layers}
    return {
        **config, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 16,
        "num_hidden_layers": 5, "num_target_layers": num_layers, "dflash_config": inner,
    }  # fmt: skip


def speculative(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The option `speculative_config` of a case."""
    given: dict[str, Any] = {"method": case.method, "num_speculative_tokens": case.num}
    if args.model is not None:
        return {**given, "model": str(args.head)}
    given |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": case.length}
    if case.method in ("eagle3", "dflash"):
        head = folder / case.method
        head.mkdir()
        config = head_config(shape_of(args), case.method)
        if case.name == OWN_HEAD:
            config["draft_vocab_size"] = DRAFTED
        (head / "config.json").write_text(json.dumps(config))
        given["model"] = str(head)
    return given


@contextmanager
def opened(case: Case, args: argparse.Namespace) -> Iterator[LLM]:
    rows = tuple(num for num in case.rows if num <= args.max_rows)
    options: dict[str, Any] = {
        "max_num_seqs": rows[-1], "graph_batch_sizes": rows, "device": args.device,
        "max_model_len": PROMPT_TOKENS + args.tokens + 16, "max_num_batched_tokens": 1024,
        "enable_prefix_caching": False, "enforce_eager": args.enforce_eager, "dtype": args.dtype,
    }  # fmt: skip
    with TemporaryDirectory() as name:
        folder, model = Path(name), args.model
        if model is None:
            (folder / "config.json").write_text(json.dumps(shape_of(args)))
            model, options["random_weights"] = name, True
        if case.method:
            options["speculative_config"] = speculative(case, folder, args)
        llm = LLM(model, **options)
        try:
            yield llm
        finally:
            llm.close()


def rate(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """Tokens per second of all prompts together, while all of them are answered."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(prompt, params, incremental=False)
    requests = list(engine.scheduler.waiting)
    while not all(one.output_ids for one in requests):
        engine.step()
    begun, num_begun = time.perf_counter(), sum(len(one.output_ids) for one in requests)
    while not any(one.completion is not None for one in engine.step()):
        pass
    seconds = time.perf_counter() - begun
    made = sum(len(one.output_ids) for one in requests) - num_begun
    while engine.has_unfinished:
        engine.step()
    return made / seconds


def prompts_of(llm: LLM, num: int, args: argparse.Namespace, run_idx: int) -> list[list[int]]:
    if args.model is None:
        made, vocab_size = random.Random(run_idx), shape_of(args)["vocab_size"]
        return [[made.randrange(vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(num)]
    held_out = [one for some in draft_prompts.held_out(args.prompts).values() for one in some]
    chosen = [held_out[(run_idx * num + i) % len(held_out)] for i in range(num)]
    chats: list[Any] = [[{"role": "user", "content": one}] for one in chosen]
    tokenizer = llm.get_tokenizer()
    if getattr(tokenizer, "chat_template", None):
        return llm.chat_prompts(chats)
    assert tokenizer is not None
    return [tokenizer.encode(one) for one in chosen]


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The rates of a case by rows, and what was drafted meanwhile."""
    started = time.perf_counter()
    found: dict[str, Any] = {"case": case.name, "accept_length": case.length, "rows": {}}
    with opened(case, args) as llm:
        engine = engine_of(llm)
        found["start_seconds"] = round(time.perf_counter() - started, 1)
        planner, counts = engine.scheduler.planner, engine.scheduler.counts
        if planner is not None:
            times = planner.lengths._times
            found["step_ms"] = {"drafts": list(times.lengths), "rows": list(times.rows)}
            found["step_ms"]["ms"] = [[round(ms, 3) for ms in row] for row in times.ms_RK]
        for num, least in zip(case.rows, case.least):
            if num > args.max_rows:
                continue
            before = dict(counts.steps), counts.num_drafts, counts.num_accepted_tokens
            rates = [
                round(rate(engine, prompts_of(llm, num, args, run_idx), args.tokens), 1)
                for run_idx in range(args.runs)
            ]
            num_drafts = counts.num_drafts - before[1]
            accepted = (counts.num_accepted_tokens - before[2]) / max(1, num_drafts)
            found["rows"][num] = {
                "tokens_per_second": statistics.median(rates), "all": rates, "aim": least,
                "tokens_of_a_verified_row": round(1 + accepted, 3),
                "steps_by_drafts": {
                    str(k): num - before[0].get(k, 0) for k, num in sorted(counts.steps.items())
                },
            }  # fmt: skip
        if args.profile:
            found["profiles"] = profile_steps(engine, case.rows[0], PROMPT_TOKENS)
    found["seconds"] = round(time.perf_counter() - started, 1)
    return found


def compare(results: list[dict[str, Any]]) -> None:
    """Add the share of plain decoding to each rate."""
    plain: dict[int, Any] = next((one["rows"] for one in results if one["case"] == "plain"), {})
    for one in results:
        for num, of_rows in one["rows"].items():
            if num in plain:
                share = of_rows["tokens_per_second"] / plain[num]["tokens_per_second"]
                of_rows["of_plain"] = round(share, 3)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=sorted(CONFIGS), default="Qwen3-8B", help="of random weights")
    add("--tiny", action="store_true", help="a small shape, on the CPU, for a test of the script")
    add("--model", help="a trained model: a folder, a GGUF file or a Hub id")
    add("--head", type=Path, help="the folder of its head, with --model")
    add("--method", choices=("eagle3", "dflash"), default="eagle3", help="of the head")
    add("--prompts", type=Path, help="file with a prompt on each line, with --model")
    add("--num", type=int, default=3, help="draft tokens of a step at most, with --model")
    add("--cases", nargs="+", choices=[one.name for one in CASES], help="default: all")
    add("--max-rows", type=int, default=256, help="leaves out more rows")
    add("--tokens", type=int, default=256, help="of each answer")
    add("--runs", type=int, default=3)
    add("--profile", action="store_true", help="print the kernels of a step of one row; on a GPU")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--enforce-eager", action="store_true")
    add("--out", type=Path, required=True, help="file for the results")
    if parser.parse_known_args(given)[0].tiny:
        parser.set_defaults(**TINY_OPTIONS)
    args = parser.parse_args(given)
    if args.tiny and args.model is not None:
        parser.error("--tiny has random weights: leave out --model")
    if (args.model is None) != (args.head is None):
        parser.error("--model and --head need each other")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cases = [one for one in CASES if args.cases is None or one.name in args.cases]
    if args.model is not None:
        rows = tuple(num for num in (1, 8) if num <= args.max_rows)
        cases = [
            Case("plain", "", 0, None, rows, (0, 0)),
            Case(args.method, args.method, args.num, None, rows, (1.6, 0)),
        ]
    results: list[dict[str, Any]] = []
    command = sys.argv[1:] if given is None else list(given)
    for case in cases:
        results.append(measure(case, args))
        compare(results)
        shown = {key: value for key, value in results[-1].items() if key != "profiles"}
        logger.info("%s", json.dumps(shown))
        about = {"versions": versions(), "command": command, "results": results}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
