"""Train an EAGLE-3 head or a DFlash draft for a model, on text that the model itself generates.

    python scripts/train_draft.py --model DIR --out HEAD
    nanovllm serve DIR --speculative-config \\
        '{"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3}'

The model answers prompts through the engine, which then gives its hidden states over the answers.
So any checkpoint that the engine loads will do, also a GGUF file or a quantized one. The head (with
--method dflash the draft, whose blocks have as many mask tokens as --num-speculative-tokens) is
trained in plain torch, on a GPU if there is one, and saved in the layout that SGLang and vLLM read.
At the end the engine drafts with it on held-out prompts, greedily, and a line of JSON tells how
often the draft tokens at each position were accepted, and the mean tokens of a step.

--prompts FILE has a prompt on each line; without it there are about 400 made-up ones. Give your
own: a head drafts well what it was trained on. Accept lengths are those of each kind of held-out
prompts: prose, code and chat of other subjects and forms, or every tenth prompt of the file. With
--texts FILE the answers are kept, and another run with the same model and prompts reads them. For
SmolLM2-135M, in a GGUF file, on two CPU cores:

    python scripts/train_draft.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out HEAD \\
        --layers 14 26 29 --draft-vocab-size 4096 --num-speculative-tokens 2 \\
        --num-tokens 112 --learning-rate 1.5e-3 --texts answers.jsonl --minutes 20
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from draft import block, collect, head, prompts

from nanovllm import SamplingParams
from nanovllm.startup.draft import Drafts
from nanovllm.startup.draft_heads import DFlash, Eagle3
from nanovllm.tools import command_line

logger = logging.getLogger("train_draft")
POSITIVE = (
    "num_speculative_tokens", "num_prompts", "num_tokens", "draft_vocab_size", "batch", "minutes",
    "max_model_len", "threads", "steps", "answers", "max_num_seqs", "num_layers",
)  # fmt: skip
WARM_STEPS = 20  # until the full learning rate


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


def train(drafter: Any, batches: Sequence[Any], args: argparse.Namespace, device: str) -> int:
    """Train a module with a `loss` over batches for the steps or minutes of the options; returns
    the number of steps."""
    drafter.to(device)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(args.seed)
    start, step = time.monotonic(), 0

    def done() -> float:
        if args.steps is not None:
            return step / float(args.steps)
        return (time.monotonic() - start) / (60 * args.minutes)

    while (part := done()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / WARM_STEPS) * (1 - part)
        number = int(torch.randint(len(batches), (), generator=order))
        batch = type(batches[number])(*(one.to(device) for one in batches[number]))
        loss, shares = drafter.loss(batch, args.num_speculative_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            right = " ".join(f"{share:.2f}" for share in shares)
            logger.info("step %d: loss %.3f, right %s", step, loss.item(), right)
        step += 1
    return step


def accept_lengths(counts: list[int], num: int) -> dict[str, Any]:
    """How often the draft token at each position was accepted, and the mean tokens of a step."""
    num_steps = max(len(counts), 1)
    shares = [sum(count > place for count in counts) / num_steps for place in range(num)]
    return {
        "accepted_per_position": [round(share, 3) for share in shares],
        "accept_length": round(1 + sum(shares), 3),
        "steps": len(counts),
    }


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Log how long a part took."""
    start = time.monotonic()
    yield
    logger.info("%s: %.1f s", what, time.monotonic() - start)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and save a head; returns its accept lengths on held-out prompts."""
    torch.manual_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = {"device": args.device, "dtype": args.dtype, "max_model_len": args.max_model_len,
               "max_num_seqs": args.batch}  # fmt: skip
    with timed("answers"):
        texts, others = answered(args, options)
    by_depth = read_layers if args.method == "eagle3" else block_layers
    layers = tuple(args.layers or by_depth(collect.num_layers(args.model, options)))
    with timed("hidden states"):
        examples, target = collect.examples(args.model, texts, layers, options)
    examples.sort(key=lambda one: len(one.text.token_T))  # little padding
    device = (
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # its engines multiply in their own dtypes
    make = trained_head if args.method == "eagle3" else trained_block
    with timed("training"):
        drafts = make(examples, target, layers, args, device)
    num = args.num_speculative_tokens
    with timed("accept lengths"):
        counts = collect.accepted(args.model, drafts, others, num, options)
    found = accept_lengths([one for some in counts.values() for one in some], num)
    if len(counts) > 1:
        found["kinds"] = {kind: accept_lengths(some, num) for kind, some in counts.items()}
    return found


def answered(
    args: argparse.Namespace, options: dict[str, Any]
) -> tuple[list[collect.Text], dict[str, list[collect.Text]]]:
    """What the model answers to the prompts for training, and to the held-out ones by kind."""
    asked = prompts.training(args.prompts, args.num_prompts) * args.answers
    held_out = prompts.held_out(args.prompts)
    others = [one for some in held_out.values() for one in some]
    num = len(asked) + len(others)
    if args.texts is not None and args.texts.is_file():
        texts = collect.read(args.texts, num)
    else:
        params = [
            SamplingParams(
                temperature=args.temperature, max_tokens=args.num_tokens, seed=args.seed + number
            )
            for number in range(num)
        ]
        answering = {**options, "enforce_eager": True, "max_num_seqs": args.max_num_seqs}
        texts = collect.answers(args.model, asked + others, params, answering)
        if args.texts is not None:
            collect.write(args.texts, texts)
    rest = iter(texts[len(asked) :])
    return texts[: len(asked)], {kind: list(islice(rest, len(held_out[kind]))) for kind in held_out}


def trained_head(
    examples: list[collect.Example], target: collect.Target, layers: tuple[int, ...],
    args: argparse.Namespace, device: str,
) -> Drafts:  # fmt: skip
    """Train and save an EAGLE-3 head."""
    vocab_size = target.config.vocab_size
    target_X = head.drafted_tokens(examples, min(args.draft_vocab_size, vocab_size), vocab_size)
    groups = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
    batches = [head.batch_of(group, target_X, vocab_size) for group in groups]
    made = head.Head(target, target_X)
    logger.info("%d steps over %d texts", train(made, batches, args, device), len(examples))
    head.save(made, target, target_X, layers, args.out)
    return Eagle3(args.num_speculative_tokens, str(args.out))


def trained_block(
    examples: list[collect.Example], target: collect.Target, layers: tuple[int, ...],
    args: argparse.Namespace, device: str,
) -> Drafts:  # fmt: skip
    """Train and save a DFlash draft."""
    num = args.num_speculative_tokens
    groups = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
    batches = [block.texts_of(group) for group in groups]
    made = block.Block(target, args.num_layers, len(layers))
    logger.info("%d steps over %d texts", train(made, batches, args, device), len(examples))
    block.save(made, target, layers, num, args.out)
    return DFlash(num, str(args.out))


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
