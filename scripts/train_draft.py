"""Train an EAGLE-3 head or a DFlash draft for a model, on text that the model itself generates.

    python scripts/train_draft.py --model DIR --out HEAD
    nanovllm serve DIR --speculative-config \\
        '{"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3}'

The model answers prompts through the engine, which then gives its hidden states over the answers.
So any checkpoint that the engine loads will do, also a GGUF file or a quantized one. The head (with
--method dflash the draft, whose blocks have as many mask tokens as --num-speculative-tokens) is
trained in plain torch, on a GPU if there is one, and saved in the layout that SGLang and vLLM read.
Every 100 steps the log has the share of tokens that the head has right at each position: in
training, in answers to prompts that are set apart, one of fifty, and in those to held-out prompts.
At the end the engine drafts with it on held-out prompts, greedily, and a line of JSON tells how
often the draft tokens at each position were accepted, and the mean tokens of a step.

--prompts FILE has a prompt on each line; without it there are some thousand made-up ones, of which
--num-prompts takes the first. Give your own: a head drafts well what it was trained on. Or let the
model make up --own-prompts N besides, in the chat template, which are about what it was trained on.
Accept lengths are those of each kind of held-out prompts: prose, code and chat of other subjects
and forms, or every tenth prompt of the file. With --texts FILE the answers are kept, and another
run with the same model and prompts reads them; it refuses those of other prompts. Hidden states
stay on the GPU if they take at most half of its free memory: (layers + 1) x 2 bytes x the hidden
size, for each token. For SmolLM2-135M, in a GGUF file, on two CPU cores:

    python scripts/train_draft.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out HEAD \\
        --layers 14 26 29 --draft-vocab-size 4096 --num-speculative-tokens 2 \\
        --num-prompts 400 --num-tokens 112 --learning-rate 1.5e-3 --texts answers.jsonl --minutes 20
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from draft import block, collect, head, prompts, text_file, training
from draft.collect import Counts, Examples, Target, Text
from draft.own_prompts import own_prompts
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line

logger = logging.getLogger("train_draft")
POSITIVE = (
    "num_speculative_tokens", "num_prompts", "num_tokens", "draft_vocab_size", "batch", "minutes",
    "max_model_len", "threads", "steps", "answers", "max_num_seqs", "num_layers",
)  # fmt: skip
READ_TEXTS = 64  # of a step that reads hidden states, at most


def parse_args(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the head to")
    parser.add_argument("--method", choices=("eagle3", "dflash"), default="eagle3")
    parser.add_argument("--num-layers", type=int, default=3, help="of a DFlash draft")
    parser.add_argument("--prompts", type=Path, help="file with a prompt on each line")
    parser.add_argument("--num-prompts", type=int, help="for training; default: all")
    parser.add_argument("--own-prompts", type=int, default=0, help="that the model makes up")
    parser.add_argument("--texts", type=Path, help="file of answers, written if it is not there")
    parser.add_argument("--num-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers")
    parser.add_argument("--answers", type=int, default=1, help="to each prompt, to train on")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="prompts answered at a time")
    parser.add_argument("--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--draft-vocab-size", type=int, default=32_000, help="at most")
    layers = "after which states are read, from 0: three, of DFlash any number. Default: by depth"
    parser.add_argument("--layers", type=int, nargs="+", help=layers)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, in place of --minutes")
    parser.add_argument("--batch", type=int, default=8, help="texts of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto", help="cuda or cpu; auto: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be positive")
    if args.own_prompts < 0:
        parser.error(f"--own-prompts is {args.own_prompts}: it must be 0 or more")
    if args.method == "eagle3" and args.layers is not None and len(args.layers) != 3:
        parser.error(f"--layers has {len(args.layers)}: an EAGLE-3 head reads 3")
    return args


def read_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's layers, or in a small model a low, a middle and the last one."""
    if num_layers < 8:
        return num_layers // 4, num_layers // 2, num_layers - 1
    return 1, num_layers // 2 - 1, num_layers - 4


def block_layers(num_layers: int) -> tuple[int, ...]:
    """Five layers from a low to a high one, or all of a small model."""
    if num_layers < 8:
        return tuple(range(num_layers))
    return tuple(1 + i * (num_layers - 4) // 4 for i in range(5))


def accept_lengths(counts: Counts) -> dict[str, Any]:
    """How often the draft token at each position was accepted, and the mean tokens of a step."""
    shares = [count / max(counts.num_steps, 1) for count in counts.accepted]
    return {
        "accepted_per_position": [round(share, 3) for share in shares],
        "accept_length": round(1 + sum(shares), 3),
        "steps": counts.num_steps,
    }


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Log how long a part took."""
    start = time.monotonic()
    yield
    logger.info("%s: %.1f s", what, time.monotonic() - start)


def device_of(args: argparse.Namespace) -> torch.device:
    has_gpu = torch.cuda.is_available()
    return torch.device(args.device if args.device != "auto" else "cuda" if has_gpu else "cpu")


def engine_options(args: argparse.Namespace, num_seqs: int) -> dict[str, Any]:
    """Of an engine for prompts of which so many are answered at a time. A GPU has graphs of that
    size, and of two smaller ones for the last answers; on a CPU a start with graphs takes long."""
    options = common_options(args) | {"max_num_seqs": num_seqs}
    if device_of(args).type == "cpu":
        return options | {"enforce_eager": True}
    return options | {
        "graph_batch_sizes": sorted({num_seqs, -(-num_seqs // 4), -(-num_seqs // 16)})
    }


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "dtype": args.dtype, "max_model_len": args.max_model_len}


def run(args: argparse.Namespace, measures: bool = True) -> dict[str, Any]:
    """Train and save a head; returns what it has right, and with `measures` its accept lengths on
    held-out prompts."""
    torch.manual_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with timed("answers"):
        texts, others = answered(args)
    options = common_options(args) | {"max_num_seqs": min(args.max_num_seqs, READ_TEXTS)}
    by_depth = read_layers if args.method == "eagle3" else block_layers
    layers = tuple(args.layers or by_depth(collect.num_layers(args.model, options)))
    every = texts + [one for some in others.values() for one in some]
    device = device_of(args)
    with timed("hidden states"):
        examples, target = collect.examples(args.model, every, layers, options, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # its engines multiply in their own dtypes
    parts = training.parts_of(len(texts) // args.answers, args.answers, len(every) - len(texts))
    make = trained_head if args.method == "eagle3" else trained_block
    with timed("training"):
        found = make(examples, parts, target, layers, args)
    del examples
    if measures:
        with timed("accept lengths"):
            found |= measured(args, others)
    return found


def measured(args: argparse.Namespace, others: dict[str, list[Text]]) -> dict[str, Any]:
    """Accept lengths on held-out prompts, of all kinds together and of each."""
    num = args.num_speculative_tokens
    drafts = {"method": args.method, "model": str(args.out), "num_speculative_tokens": num}
    options = engine_options(args, max(map(len, others.values())))
    counts = collect.accepted(args.model, drafts, others, options)
    together = [sum(places) for places in zip(*(one.accepted for one in counts.values()))]
    num_steps = sum(one.num_steps for one in counts.values())
    found = accept_lengths(Counts(num_steps, tuple(together)))
    if len(counts) > 1:
        found["kinds"] = {kind: accept_lengths(some) for kind, some in counts.items()}
    return found


def answered(args: argparse.Namespace) -> tuple[list[Text], dict[str, list[Text]]]:
    """What the model answers to the prompts for training, and to the held-out ones by kind.
    The model may have made up fewer prompts than it was to."""
    asked = prompts.training(args.prompts, args.num_prompts)
    held_out = prompts.held_out(args.prompts)
    others = [one for some in held_out.values() for one in some]
    origin = text_file.origin_of(asked + others, args.own_prompts, args.answers)
    if args.texts is not None and args.texts.is_file():
        texts = text_file.read(args.texts, origin)
    else:
        texts = newly_answered(args, asked, others)
        if args.texts is not None:
            text_file.write(args.texts, origin, texts)
    num_trained = len(texts) - len(others)
    rest = iter(texts[num_trained:])
    return texts[:num_trained], {kind: list(islice(rest, len(held_out[kind]))) for kind in held_out}


def newly_answered(args: argparse.Namespace, asked: list[str], others: list[str]) -> list[Text]:
    """Answers to prompts for training, given ones and the model's own, and to other prompts."""
    with closing(LLM(args.model, **engine_options(args, args.max_num_seqs))) as llm:
        if args.own_prompts:
            asked = asked + own_prompts(llm, args.own_prompts, args.seed, asked + others)
        every = asked * args.answers + others
        params = [
            SamplingParams(
                temperature=args.temperature, max_tokens=args.num_tokens, seed=args.seed + number,
                detokenize=False,
            )
            for number in range(len(every))
        ]  # fmt: skip
        return collect.answers(llm, every, params)


def trained(
    made: nn.Module, make_batch: training.MakeBatch, examples: Examples, parts: training.Parts,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train a module on batches; returns its steps, and what it has right."""
    plan = training.Plan(
        args.num_speculative_tokens, args.batch, args.learning_rate, args.minutes, args.steps,
        args.seed, device_of(args),
    )  # fmt: skip
    lengths = [len(one.token_T) for one in examples.texts]
    found = training.train(made, make_batch, lengths, parts, plan)
    logger.info("%d steps over %d texts", found["trained_steps"], found["texts"])
    return found


def trained_head(
    examples: Examples, parts: training.Parts, target: Target, layers: tuple[int, ...],
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train and save an EAGLE-3 head."""
    vocab_size = target.config.vocab_size
    choice_N = examples.likely_NP[: examples.firsts[parts.held_out[0]], 0]
    target_X = head.drafted_tokens(choice_N, min(args.draft_vocab_size, vocab_size), vocab_size)
    number_V = head.numbers_of(target_X, vocab_size).to(examples.token_N.device)
    made = head.Head(target, target_X)
    make_batch = partial(head.batch_of, examples, number_V=number_V)
    found = trained(made, make_batch, examples, parts, args)
    head.save(made, target, target_X, layers, args.out)
    return found


def trained_block(
    examples: Examples, parts: training.Parts, target: Target, layers: tuple[int, ...],
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train and save a DFlash draft."""
    made = block.Block(target, args.num_layers, len(layers))
    found = trained(made, partial(block.texts_of, examples), examples, parts, args)
    block.save(made, target, layers, args.num_speculative_tokens, args.out)
    return found


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
