"""Training of the embedded vision model: Muon and AdamW, a cosine schedule, resumable states.

B conversations | S positions | T tokens of answers | V vocabulary | D hidden
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tiny.picture_batches import IGNORED, Batch, Plan
from tiny.vision_model import equal_sizes
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

FINAL_SHARE = 0.01  # of the learning rate, at the end
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.05, (0.9, 0.98), 1.0
LOSS_STEPS = 25  # over which losses are averaged


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine."""
    num_warmup = max(1, plan.steps // 50)
    if step < num_warmup:
        return plan.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, plan.steps - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return plan.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def _optimizers(model: Qwen3VLForConditionalGeneration, rate: float) -> list[Optimizer]:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices of
    products, which needs fewer steps here; AdamW for tables, norms and biases."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        # the mergers' large matrices would take more time in Muon than in all products
        of_product = param.ndim == 2 and "embed" not in name and "merger" not in name
        (matrices if of_product else others).append(param)
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=rate, betas=BETAS, weight_decay=0.0, fused=True),
    ]


class Trainer:
    """The model with its optimizer and progress."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, plan: Plan, amp: bool) -> None:
        self.model, self.plan, self.step, self._amp = model.train(), plan, 0, amp
        self.seconds = 0.0  # of training, those before a resumption included
        self.loss = math.nan  # the mean of the last steps
        self.planned = [plan.steps]  # also those of plans before a resumption
        equal_sizes(model)
        self._optimizers = _optimizers(model, plan.learning_rate)

    def update(self, batch: Batch) -> Tensor:
        """One step; the mean cross-entropy on the tokens of answers."""
        model, device = self.model, self.model.device
        for group in (group for one in self._optimizers for group in one.param_groups):
            group["lr"] = learning_rate(self.plan, self.step)
        input_BS, label_BS, position_3BS = (one.to(device) for one in batch[:3])
        media: dict[str, Any] = {}
        if batch.patch_PD is not None and batch.grid_B3 is not None:
            media = {
                "pixel_values": batch.patch_PD.to(device),
                "image_grid_thw": batch.grid_B3.to(device),
            }
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._amp):
            hidden_BSD = model.model(
                input_ids=input_BS, position_ids=position_3BS, use_cache=False, **media
            ).last_hidden_state
            target_BS = label_BS[:, 1:]
            is_answer_BS = target_BS != IGNORED
            logits_TV = model.lm_head(hidden_BSD[:, :-1][is_answer_BS])
        loss = functional.cross_entropy(logits_TV.float(), target_BS[is_answer_BS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write the state for resuming a run, atomically."""
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "planned": self.planned,
            "model": self.model.state_dict(),
            "optimizers": [one.state_dict() for one in self._optimizers],
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Resume from a file of `save`. Raises ValueError if there is none, or if it is of a run
        with another plan. The number of steps may differ: it sets the learning rate from here."""
        if not path.is_file():
            raise ValueError(f"there is no file {path} to resume from")
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        plan = Plan(**{**state["plan"], "steps": self.plan.steps})
        if plan != self.plan or state["step"] > plan.steps:
            raise ValueError(
                f"{path.name} is of step {state['step']} of {state['plan']}, "
                f"which does not fit {self.plan}"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        before = state["planned"]
        self.planned = before + [plan.steps] * (before[-1] != plan.steps)


def train(
    trainer: Trainer,
    data: Iterator[Batch],
    checkpoint: Path | None,
    last: int,
    save_seconds: float = 120,
) -> None:
    """Train on `data` up to step `last`, and save the state from time to time and at the end."""
    recent, saved = [], time.monotonic()
    with tqdm(
        total=last, initial=trainer.step, desc="training", unit="step", mininterval=5
    ) as progress:
        while trainer.step < last:
            begun = time.perf_counter()
            recent.append(trainer.update(next(data)))
            trainer.seconds += time.perf_counter() - begun
            progress.update()
            if trainer.step % LOSS_STEPS == 0 or trainer.step == last:
                trainer.loss = torch.stack(recent).mean().item()
                recent.clear()
                if not math.isfinite(trainer.loss):
                    raise FloatingPointError(f"the loss is {trainer.loss} at step {trainer.step}")
                progress.set_postfix(loss=f"{trainer.loss:.4f}", refresh=False)
            if checkpoint and time.monotonic() - saved > save_seconds:
                trainer.save(checkpoint)
                saved = time.monotonic()
    if checkpoint:
        trainer.save(checkpoint)
