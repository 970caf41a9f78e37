"""Trains and scores the embedded vision model, for `train_tiny.py --arch qwen3-vl`."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import Counter

import torch
from tiny.card import Run
from tiny.picture_batches import Encoder, Plan, batches
from tiny.picture_card import card
from tiny.picture_scoring import evaluate
from tiny.picture_tasks import held_out
from tiny.picture_training import Trainer, train
from tiny.vision_model import build_model, build_tokenizer, save

logger = logging.getLogger("train_tiny")
TURNS, LEARNING_RATE = 6, 2e-3


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train, save to `args.out`, score the saved model, and write the card."""
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    logger.info("%d parameters on %s", sum(one.numel() for one in model.parameters()), device)
    plan = Plan(args.steps, args.batch, TURNS, args.seed, LEARNING_RATE)
    trainer = Trainer(model, plan, amp=device.type == "cuda")
    if args.resume:
        trainer.resume(args.checkpoint)
        logger.info("resuming after step %d", trainer.step)
    workers = args.workers or (1 if device.type == "cpu" else min(8, os.cpu_count() or 1))
    data = batches(plan, Encoder(tokenizer), trainer.step, workers)
    train(trainer, data, args.checkpoint, min(args.stop or plan.steps, plan.steps))
    save(model, tokenizer, args.out)

    tasks = list(held_out(args.num_eval, args.seed))
    accuracies, wrong = evaluate(args.out, tasks, device)
    num_tasks = Counter(one.task.kind for one in tasks)
    total = sum(accuracy * num_tasks[kind] for kind, accuracy in accuracies.items()) / len(tasks)
    for kind, accuracy in {**accuracies, "all": total}.items():
        logger.info("%-10s %6.1f %%", kind, 100 * accuracy)
    for line in wrong[:40]:
        logger.info("wrong: %s", line)
    finished = Run(
        steps=trainer.step,
        examples=trainer.step * plan.batch * plan.turns,
        batch_tokens=0,
        seed=plan.seed,
        seconds=trainer.seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU core",
        torch_version=torch.__version__,
        num_eval=len(tasks),
        accuracies=accuracies,
        total=total,
    )
    (args.out / "README.md").write_text(
        card(args.out, finished, plan, trainer.loss, trainer.planned)
    )
    logger.info("%.0f s in all", time.perf_counter() - started)
