"""What a trained head gains: plain and speculative decoding of one row, in turn, in one process.

    python scripts/bench/draft_gain.py --model SmolLM2-135M-Instruct.Q4_1.gguf --head HEAD \\
        --num 1 2 3 --quantization int8 --threads 2 --out gain.json
    python scripts/bench/draft_gain.py --model FILE --head HEAD --train-minutes 2 --out gain.json

Each held-out prompt of scripts/draft/prompts.py is answered greedily by an engine without drafts
and by one for each --num, one after the other, --turns times. Of each kind of prompts, and of all,
the results have: the seconds of the decode steps (of all turns the least, by prompt, since other
programs only add to them; and those of each turn), also in processor time; the gain, which is the
time of plain decoding in these divided by that with drafts; the shares of accepted drafts at each
position of the steps that verified; and how many answers equal those without drafts.

With --train-minutes scripts/train_draft.py trains the head first, unless --head is there, with the
options after `--`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import train_draft
from draft import prompts as draft_prompts
from draft.collect import counts_of

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import engine_of, versions
from nanovllm.tools import command_line

logger = logging.getLogger("draft_gain")
Prompts = dict[str, list[list[int]]]


class Answer(NamedTuple):
    """seconds, processor_seconds: of the steps after the first token."""

    token_ids: tuple[int, ...]
    seconds: float
    processor_seconds: float


def answer(llm: LLM, prompt: list[int], num_tokens: int) -> Answer:
    """Answer one prompt greedily, up to its stop token."""
    engine = engine_of(llm)
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    engine.add_request(prompt, params, incremental=False)
    (request,) = engine.scheduler.waiting
    while engine.has_unfinished and not request.output_ids:
        engine.step()
    begun, processor_begun = time.perf_counter(), time.process_time()
    while engine.has_unfinished:
        engine.step()
    times = time.perf_counter() - begun, time.process_time() - processor_begun
    return Answer(tuple(request.output_ids), *times)


def opened(args: argparse.Namespace, num: int) -> LLM:
    """An engine with `num` drafts of a step at most, or without."""
    options: dict[str, Any] = {
        "max_num_seqs": 1, "graph_batch_sizes": (1,), "device": args.device, "dtype": args.dtype,
        "max_model_len": args.max_model_len, "enable_prefix_caching": False,
        "enforce_eager": args.enforce_eager,
    }  # fmt: skip
    if num:
        speculative = {"method": "eagle3", "model": str(args.head), "num_speculative_tokens": num}
        if args.quantization is not None:
            speculative["quantization"] = args.quantization
        options["speculative_config"] = speculative
        options["tuning"] = {"adapt_draft_length": not args.always}
    return LLM(args.model, **options)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each kind of prompts, what each number of drafts gains."""
    with ExitStack() as stack:
        llms = {num: stack.enter_context(closing(opened(args, num))) for num in (0, *args.num)}
        asked = tokens_of(llms[0], args)
        for llm in llms.values():  # what only the first request does
            answer(llm, next(iter(asked.values()))[0], args.tokens)
        for kind, prompts in asked.items():
            before = {num: counts_of(llms[num], num) for num in args.num}
            found: dict[int, list[list[Answer]]] = {num: [] for num in llms}  # by turn and prompt
            for _ in range(args.turns):
                for num in llms:
                    found[num].append([])
                for prompt in prompts:
                    for num, llm in llms.items():
                        found[num][-1].append(answer(llm, prompt, args.tokens))
            for num in args.num:
                counts = counts_of(llms[num], num).since(before[num])
                lengths = train_draft.accept_lengths(counts)
                yield {"kind": kind, "num": num, **lengths, **gains(found[0], found[num])}


def gains(plain: list[list[Answer]], drafts: list[list[Answer]]) -> dict[str, Any]:
    """The gain in time of the least of all turns by prompt, and of each turn."""
    of_turns = [
        seconds(one, "seconds") / seconds(other, "seconds") for one, other in zip(plain, drafts)
    ]
    found: dict[str, Any] = {"gain_by_turn": [round(one, 3) for one in of_turns]}
    for name in ("seconds", "processor_seconds"):
        least = [least_seconds(one, name) for one in (plain, drafts)]
        found[name] = [round(one, 3) for one in least]
        found["gain" if name == "seconds" else "processor_gain"] = round(least[0] / least[1], 3)
    equal = [a.token_ids == b.token_ids for a, b in zip(plain[0], drafts[0])]
    num_tokens = sum(len(one.token_ids) for one in plain[0])
    return found | {"equal_answers": f"{sum(equal)} of {len(equal)}", "tokens": num_tokens}


def seconds(answers: list[Answer], name: str) -> float:
    return sum(getattr(one, name) for one in answers)


def least_seconds(turns: list[list[Answer]], name: str) -> float:
    return sum(min(getattr(one, name) for one in of_prompt) for of_prompt in zip(*turns))


def tokens_of(llm: LLM, args: argparse.Namespace) -> Prompts:
    """The held-out prompts of each kind, in the model's chat template if it has one."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    found = {}
    for kind, texts in draft_prompts.held_out(args.prompts).items():
        chats: list[Any] = [[{"role": "user", "content": one}] for one in texts[: args.each]]
        has_template = getattr(tokenizer, "chat_template", None)
        found[kind] = (
            llm.chat_prompts(chats)
            if has_template
            else [tokenizer.encode(one) for one in texts[: args.each]]
        )
    return found


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train the head with the options after `--`."""
    words = ["--model", args.model, "--out", str(args.head), "--device", args.device]
    words += ["--minutes", str(args.train_minutes), *args.rest]
    return train_draft.run(train_draft.parse_args(words), measures=False)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, a GGUF file or a Hub id")
    add("--head", type=Path, help="the folder of its EAGLE-3 head. Default: beside --out")
    add("--train-minutes", type=float, help="trains the head first, unless it is there")
    add("--num", type=int, nargs="+", default=[1, 3], help="draft tokens of a step at most")
    add("--always", action="store_true", help="draft so many in each step, also at a loss")
    add("--quantization", help="of the head")
    add("--prompts", type=Path, help="file with a prompt on each line; every tenth is asked")
    add("--each", type=int, default=6, help="prompts of a kind at most")
    add("--tokens", type=int, default=128, help="of each answer at most")
    add("--turns", type=int, default=3)
    add("--threads", type=int, help="threads of torch on a CPU")
    add("--max-model-len", type=int, default=512)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--enforce-eager", action="store_true")
    add("--out", type=Path, required=True, help="file for the results")
    add("rest", nargs="*", help="after --: options of train_draft.py")
    args = parser.parse_args(given)
    if args.head is None:
        args.head = args.out.with_suffix(".head")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # it logs the times of steps by their numbers of drafts
    logging.getLogger("nanovllm.runner.warmup").setLevel(logging.DEBUG)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    about: dict[str, Any] = {"versions": versions(), "results": []}
    about["command"] = sys.argv[1:] if given is None else list(given)
    if args.train_minutes is not None and not (args.head / "config.json").is_file():
        about["training"] = train(args)
        logger.info("%s", json.dumps(about["training"]))
    for one in measure(args):
        logger.info("%s", json.dumps(one))
        about["results"].append(one)
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
