"""Train an embedded model, of under four million parameters, on `tiny.tasks` and
`tiny.tool_tasks`.

    python scripts/train_tiny.py --out nanovllm/assets/tiny-qwen3
    python scripts/train_tiny.py --arch mixtral --out nanovllm/assets/tiny-mixtral
    python scripts/train_tiny.py --arch qwen3_5 --out nanovllm/assets/tiny-qwen3.5
    python scripts/train_tiny.py --arch qwen3-vl --out nanovllm/assets/tiny-qwen3-vl

Takes minutes on one GPU. To try everything out on a CPU, add
`--steps 20 --examples 2000 --batch-tokens 2048 --num-eval 32`.

qwen3-vl is trained on questions about pictures (`tiny.picture_tasks`), on one CPU core within an
hour. It saves its state every two minutes; with `--resume` an interrupted run continues from there.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tiny import tasks, tool_tasks
from tiny.architectures import MODEL_NAMES, TinyModel, build_model
from tiny.card import Run, card
from tiny.chat_tokenizer import build_tokenizer
from tiny.checkpoint import MAX_FOLDER_BYTES, evaluate, save
from tiny.corpus import Corpus, build_corpus, conversation, render
from tiny.training import Batches, measure_expert_shares, row_len_shares, steps_within, train
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.tools import command_line

logger = logging.getLogger("train_tiny")
SEEING = "qwen3-vl"
POSITIVE = (
    *("steps", "threads", "minutes", "examples", "batch_tokens", "num_eval", "workers"),
    *("batch", "stop"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--arch", choices=(*MODEL_NAMES, SEEING), default="qwen3")
    parser.add_argument("--steps", type=int, help="6000; of qwen3-vl 2400")
    parser.add_argument("--device", default="auto", help="cuda or cpu; auto: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-eval", type=int, default=3200, help="held-out questions to score")
    workers = "processes that generate examples: one for each core; qwen3-vl: 8 beside a GPU, or 1"
    parser.add_argument("--workers", type=int, help=workers)
    _add_text(parser.add_argument_group("qwen3, mixtral and qwen3_5"))
    _add_seeing(parser.add_argument_group(SEEING))
    args = parser.parse_args()
    _fill_in(parser, args)
    for name in (
        "steps",
        "minutes",
        "examples",
        "batch_tokens",
        "num_eval",
        "workers",
        "batch",
        "stop",
    ):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be positive")
    return args


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--minutes",
        type=float,
        help="take fewer steps, if needed to end the training this long after the start; "
        "the speed is measured first, and the evaluation takes additional time",
    )
    group.add_argument("--examples", type=int, help="conversations to generate: 3000000")
    group.add_argument("--batch-tokens", type=int, help="65536")


def _add_seeing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch", type=int, help="pictures of a step: 16")
    group.add_argument(
        "--checkpoint", type=Path, help="file of the state of training: NAME.train.pt"
    )
    group.add_argument("--stop", type=int, help="end after this step, though more are planned")
    group.add_argument("--resume", action="store_true", default=None, help="continue from it")


def _fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Defaults of the architecture; options of the other kind of training are refused."""
    text = {"minutes": None, "examples": 3_000_000, "batch_tokens": 65_536}
    seeing = {
        "batch": 16,
        "checkpoint": Path(f"{args.out.name}.train.pt"),
        "resume": False,
        "stop": None,
    }
    own, others = (seeing, text) if args.arch == SEEING else (text, seeing)
    for name in others:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is not an option of {args.arch}")
    own["steps"] = 2400 if args.arch == SEEING else 6000
    own["workers"] = None if args.arch == SEEING else os.cpu_count()
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def num_steps_of(
    args: argparse.Namespace, model: TinyModel, batches: Batches, started: float
) -> int:
    """--steps, or fewer if --minutes after `started` (of time.perf_counter) come first."""
    if args.minutes is None:
        return args.steps
    seconds = 60 * args.minutes - (time.perf_counter() - started)
    if seconds <= 0:
        raise ValueError(
            f"--minutes is {args.minutes}, but the examples took {-seconds:.0f} s more"
        )
    shares = row_len_shares(args.arch)
    num_steps = min(args.steps, steps_within(seconds, model, batches, shares))
    logger.info("%d steps", num_steps)
    return num_steps


def score(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], float]:
    """(accuracy by kind, accuracy of all) of the model in `args.out`, both logged."""
    if args.arch in tool_tasks.ARCHITECTURES:
        asked = tool_tasks.held_out(args.num_eval, args.seed)
    else:
        asked = tasks.held_out(args.num_eval, args.seed, tasks.kinds_of(args.arch))
    accuracies, wrong = evaluate(args.out, asked, device)
    num_asked = Counter(task.kind for task in asked)
    total = sum(accuracy * num_asked[kind] for kind, accuracy in accuracies.items()) / len(asked)
    for kind, accuracy in accuracies.items():
        logger.info("%-10s %6.1f %%", kind, 100 * accuracy)
    logger.info("%-10s %6.1f %%", "all", 100 * total)
    for line in wrong[:40]:
        logger.info("wrong: %s", line)
    return accuracies, total


def make_corpus(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """The training conversations, checked against the chat template."""
    model_name = MODEL_NAMES[args.arch]
    for task in islice(tool_tasks.training_examples(args.seed), 100):
        messages, tools = conversation(task, model_name), list(task.tools)
        written = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert render(messages, tools) == written
    return build_corpus(
        tokenizer.backend_tokenizer.to_str(),
        model_name,
        with_tools=args.arch in tool_tasks.ARCHITECTURES,
        kinds=tasks.kinds_of(args.arch),
        seed=args.seed,
        num_examples=args.examples,
        num_workers=args.workers,
    )


def log_expert_shares(shares_LE: list[list[float]]) -> tuple[float, float] | None:
    """The least and the greatest share of all layers; None for a dense model."""
    for layer_idx, shares_E in enumerate(shares_LE):
        listed = " ".join(f"{share:5.1%}" for share in shares_E)
        logger.info("experts of layer %d: %s", layer_idx, listed)
    return (min(map(min, shares_LE)), max(map(max, shares_LE))) if shares_LE else None


def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.arch == SEEING:
        from tiny import seeing  # needs Pillow

        seeing.run(args, choose_device(args.device))
    else:
        run(args)
    return check_size(args.out)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def run(args: argparse.Namespace) -> None:
    """Train a text model, save it to `args.out`, score the saved model, and write the card."""
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.seed)
    # before the GPU is touched: a forked process cannot use it, and must not inherit it
    corpus = make_corpus(args, tokenizer)
    logger.info("%d tokens, %.0f s", len(corpus.tokens_T), time.perf_counter() - started)

    device = choose_device(args.device)
    model = build_model(args.arch, tokenizer)
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    num_params = sum(param.numel() for param in model.parameters())
    logger.info("%d parameters on %s", num_params, device)
    batches = Batches(corpus, args.batch_tokens, device)
    num_steps = num_steps_of(args, model, batches, started)
    shares = row_len_shares(args.arch)
    loss = train(model, batches, num_steps=num_steps, seed=args.seed, shares=shares)
    seconds = time.perf_counter() - started
    logger.info("loss %.4f, %.0f s", loss, seconds)
    expert_shares = log_expert_shares(measure_expert_shares(model, batches))
    save(model, tokenizer, args.out)

    accuracies, total = score(args, device)
    finished = Run(
        steps=num_steps,
        examples=args.examples,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
        seconds=seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        torch_version=torch.__version__,
        num_eval=args.num_eval,
        accuracies=accuracies,
        total=total,
        expert_shares=expert_shares,
    )
    (args.out / "README.md").write_text(card(args.out, finished))


def check_size(folder: Path) -> int:
    """The exit status: 1 if the folder is too large to be embedded."""
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    logger.info("%d bytes in %s", num_bytes, folder)
    if num_bytes > MAX_FOLDER_BYTES:
        logger.error("the folder exceeds %d bytes", MAX_FOLDER_BYTES)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
