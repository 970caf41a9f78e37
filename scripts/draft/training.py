"""Training of a head or a draft: the order of texts, the steps, and what it has learned so far.

Some prompts are set apart: the head never learns from their texts, so the share of tokens that it
has right there, beside that in training, shows how far it is overfitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("train_draft")
WARM_STEPS = 20  # until the full learning rate
SHOWN_STEPS = 100  # between two lines of the log
WEIGHT_DECAY = 0.05  # of matrices between hidden states
MUON_RATE = 4.0  # of its learning rate
APART_EVERY = 50  # of prompts, one is set apart
POOL = 16  # batches that are cut from texts in the order of their lengths
EVAL_BATCHES = 6  # of texts that are set apart, at most

MakeBatch = Callable[[Sequence[int]], Any]  # from the numbers of texts to a tuple of tensors


class Plan(NamedTuple):
    """num: tokens that are drafted. steps: in place of minutes, if it is given."""

    num: int
    batch: int
    learning_rate: float
    minutes: float
    steps: int | None
    seed: int
    device: torch.device


class Parts(NamedTuple):
    """Numbers of texts by their use."""

    trained: list[int]
    apart: list[int]
    held_out: list[int]


def parts_of(num_prompts: int, num_answers: int, num_held_out: int) -> Parts:
    """Of texts that are the answers to all prompts, to all of them again, and so on, and then those
    to held-out prompts."""
    num = num_prompts * num_answers
    is_apart = [one % num_prompts % APART_EVERY == APART_EVERY - 1 for one in range(num)]
    trained = [one for one in range(num) if not is_apart[one]]
    apart = [one for one in range(num) if is_apart[one]]
    return Parts(trained, apart, list(range(num, num + num_held_out)))


def batches(
    numbers: Sequence[int], lengths: Sequence[int], size: int, order: torch.Generator
) -> Iterator[list[int]]:
    """Batches of texts without an end. Each pass has all texts in a new order; those of a batch
    have nearly the same length, so there is little padding."""
    while True:
        shuffled = [numbers[i] for i in torch.randperm(len(numbers), generator=order).tolist()]
        for first in range(0, len(shuffled), POOL * size):
            pool = sorted(shuffled[first : first + POOL * size], key=lengths.__getitem__)
            cut = [pool[i : i + size] for i in range(0, len(pool), size)]
            for i in torch.randperm(len(cut), generator=order).tolist():
                yield cut[i]


def optimizers_of(drafter: torch.nn.Module, plan: Plan) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices between hidden states, which
    then need fewer steps; AdamW for heads over tokens, and for vectors."""
    matrices, others = [], []
    for name, one in drafter.named_parameters():
        (matrices if one.dim() == 2 and not name.startswith("lm_head") else others).append(one)
    muon = torch.optim.Muon(
        matrices, MUON_RATE * plan.learning_rate, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    is_fused = plan.device.type == "cuda"
    adamw = torch.optim.AdamW(
        others, plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused
    )
    return muon, adamw


def half_precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in bf16 on a GPU that has it, and on a CPU with a matrix unit (AMX)."""
    is_on = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_matrix_unit()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bf16 several times as fast as fp32. Only newer releases of torch
    can tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def moved(batch: Any, device: torch.device) -> Any:
    return type(batch)(*(one.to(device, non_blocking=True) for one in batch))


@torch.no_grad()
def shares_right(drafter: Any, made: Sequence[Any], plan: Plan) -> list[float]:
    """The mean share of right tokens at each position, of some batches."""
    with half_precision(plan.device):
        shares = [drafter.loss(moved(one, plan.device), plan.num)[1] for one in made]
    return [round(float(one), 3) for one in torch.stack(shares).mean(0)]


def train(
    drafter: Any, make_batch: MakeBatch, lengths: Sequence[int], parts: Parts, plan: Plan
) -> dict[str, Any]:
    """Train a module with a `loss` for the steps or minutes of the plan; returns the number of
    steps, and the shares of right tokens of each part at the end."""
    drafter.to(plan.device)
    optimizers = optimizers_of(drafter, plan)
    rates = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
    order = torch.Generator().manual_seed(plan.seed)
    given = batches(parts.trained, lengths, plan.batch, order)
    tests = {"apart": parts.apart[: EVAL_BATCHES * plan.batch], "held out": parts.held_out}
    made = {
        name: [make_batch(some[i : i + plan.batch]) for i in range(0, len(some), plan.batch)]
        for name, some in tests.items()
        if some
    }
    right: dict[str, Any] = {}
    start, step = time.monotonic(), 0
    while (part := _done(plan, step, time.monotonic() - start)) < 1:
        for group, rate in rates:
            group["lr"] = rate * min(1, (step + 1) / WARM_STEPS) * (1 - part)
        loss, shares = _step(drafter, moved(make_batch(next(given)), plan.device), plan, optimizers)
        if step % SHOWN_STEPS == 0:
            right = {"training": [round(float(one), 3) for one in shares]}
            right |= {name: shares_right(drafter, some, plan) for name, some in made.items()}
            told = ", ".join(f"{name} {_written(some)}" for name, some in right.items())
            logger.info("step %d: loss %.3f, right in %s", step, float(loss), told)
        step += 1
    right |= {name: shares_right(drafter, some, plan) for name, some in made.items()}
    return {"trained_steps": step, "texts": len(parts.trained), "right": right}


def _step(
    drafter: Any, batch: Any, plan: Plan, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[Tensor, Tensor]:
    with half_precision(plan.device):
        loss, shares = drafter.loss(batch, plan.num)
    drafter.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
    for one in optimizers:
        one.step()
    return loss.detach(), shares


def _done(plan: Plan, step: int, seconds: float) -> float:
    """Which part of training is done."""
    return seconds / (60 * plan.minutes) if plan.steps is None else step / plan.steps


def _written(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)
