"""Training of the embedded models: rows of several conversations, AdamW, a cosine.

T tokens | D conversations | B rows | S positions of a row | N tokens of answers
"""

from __future__ import annotations

import copy
import logging
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from tiny.architectures import TinyModel, balance_loss, expert_shares, forward
from tiny.chat_tokenizer import MAX_POSITIONS
from tiny.corpus import Corpus
from tiny.tasks import KINDS_OF
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

logger = logging.getLogger("train_tiny")

# row length -> share of the steps. Short rows often begin anew, as chats do; conversations with
# tools fit the middle ones; long rows train the last positions.
ROW_LEN_SHARES = {128: 0.45, 512: 0.45, MAX_POSITIONS: 0.1}
SHORT_ROWS = {128: 1.0}  # of a model that is trained on a CPU
LEARNING_RATE, FINAL_LEARNING_RATE = 2e-3, 2e-5
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.1, (0.9, 0.98), 1.0
NUM_UNTIMED, NUM_TIMED = 3, 8  # steps of each row length that `steps_within` runs


def row_len_shares(arch: str) -> dict[int, float]:
    """The row lengths of a model's training, by a key of `architectures.MODEL_NAMES`."""
    return SHORT_ROWS if arch in KINDS_OF else ROW_LEN_SHARES


class Batch(NamedTuple):
    input_BS: Tensor
    target_BS: Tensor
    is_answer_BS: Tensor  # of the targets


class Batches:
    """Draws batches from a corpus on the device.

    A row begins at a random conversation and continues with those that follow it in the corpus,
    without a mask between them. The model learns to answer the last question whatever came before,
    and no token is spent on padding.
    """

    def __init__(self, corpus: Corpus, batch_tokens: int, device: torch.device) -> None:
        self.batch_tokens = batch_tokens
        self._corpus = corpus
        self._tokens_T = torch.from_numpy(corpus.tokens_T).to(device)
        self._is_answer_T = torch.from_numpy(corpus.is_answer_T).to(device)
        self._starts_D = torch.from_numpy(corpus.starts_D).to(device)

    def draw(self, row_len: int, generator: torch.Generator) -> Batch:
        """`batch_tokens` tokens in rows of `row_len`; ValueError if the corpus is too short."""
        row_len = min(row_len, self.batch_tokens)
        num_rows = self.batch_tokens // row_len
        num_tokens = len(self._corpus.tokens_T)
        # conversations from `last_start` on are too close to the end for a full row
        last_start = int(np.searchsorted(self._corpus.starts_D, num_tokens - row_len - 1))
        if last_start == 0:
            raise ValueError(f"{num_tokens} tokens of examples do not fill a row of {row_len}")
        device = self._tokens_T.device
        doc_idxs_B = torch.randint(last_start, (num_rows,), generator=generator).to(device)
        positions_BS = self._starts_D[doc_idxs_B][:, None] + torch.arange(row_len, device=device)
        return Batch(
            self._tokens_T[positions_BS].long(),
            self._tokens_T[positions_BS + 1].long(),
            self._is_answer_T[positions_BS + 1],
        )


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine."""
    num_warmup = max(1, num_steps // 20)
    if step < num_warmup:
        return LEARNING_RATE * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return FINAL_LEARNING_RATE + (LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def _autocast(model: TinyModel) -> torch.autocast:
    """bf16 on a GPU; on CPUs small products are much slower in it."""
    kind = model.device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu")


class Trainer:
    def __init__(self, model: TinyModel) -> None:
        self.model = model.train()
        decayed = [param for param in model.parameters() if param.ndim >= 2]
        others = [param for param in model.parameters() if param.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=BETAS,
            fused=model.device.type == "cuda",
        )

    def step(self, batch: Batch, lr: float) -> Tensor:
        """One update; the cross-entropy on the tokens of answers, without the balance loss."""
        model = self.model
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with _autocast(model):
            output = forward(model, batch.input_BS)
            logits_NV = model.lm_head(output.hidden_BSD[batch.is_answer_BS])
        targets_N = batch.target_BS[batch.is_answer_BS]
        loss = total_loss = functional.cross_entropy(logits_NV.float(), targets_N)
        if output.router_logits:
            balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
            total_loss = loss + model.config.router_aux_loss_coef * balance
        total_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def steps_within(
    seconds: float, model: TinyModel, batches: Batches, shares: dict[int, float] = ROW_LEN_SHARES
) -> int:
    """The number of steps that take about `seconds`, measured on a copy of the model."""
    trainer = Trainer(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    step_seconds = 0.0
    for row_len, share in shares.items():
        for idx in range(NUM_UNTIMED + NUM_TIMED):
            loss = trainer.step(batches.draw(row_len, generator), FINAL_LEARNING_RATE)
            if idx == NUM_UNTIMED - 1:
                loss.item()  # waits for the device
                begin = time.perf_counter()
        loss.item()
        step_seconds += share * (time.perf_counter() - begin) / NUM_TIMED
    logger.info(
        "%.0f tokens/s, a step takes %.4f s", batches.batch_tokens / step_seconds, step_seconds
    )
    return max(1, int((seconds - (time.perf_counter() - started)) / step_seconds))


def train(
    model: TinyModel,
    batches: Batches,
    *,
    num_steps: int,
    seed: int,
    shares: dict[int, float] = ROW_LEN_SHARES,
) -> float:
    """Train the model in place; returns the mean loss of the last steps. `shares` are those of the
    steps by row length."""
    trainer = Trainer(model)
    generator = torch.Generator().manual_seed(seed)
    row_lens = list(shares)
    row_len_idxs = torch.multinomial(
        torch.tensor(list(shares.values())), num_steps, replacement=True, generator=generator
    ).tolist()
    recent: list[Tensor] = []
    with tqdm(
        total=num_steps * batches.batch_tokens,
        desc="training",
        unit="tok",
        unit_scale=True,
        mininterval=5,
    ) as progress:
        for step in range(num_steps):
            batch = batches.draw(row_lens[row_len_idxs[step]], generator)
            recent.append(trainer.step(batch, learning_rate(step, num_steps)))
            progress.update(batches.batch_tokens)
            if step % 100 == 99 or step == num_steps - 1:
                mean_loss = torch.stack(recent).mean().item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(f"the loss is {mean_loss} at step {step}")
                progress.set_postfix(step=step + 1, loss=f"{mean_loss:.4f}", refresh=False)
                recent.clear()
    return mean_loss


@torch.inference_mode()
def measure_expert_shares(model: TinyModel, batches: Batches) -> list[list[float]]:
    """[L][E]: the share of each expert in one batch of training data; [] for a dense model."""
    generator = torch.Generator().manual_seed(0)
    with _autocast(model):
        router_logits = forward(model, batches.draw(512, generator).input_BS).router_logits
    return expert_shares(router_logits, model.config.num_experts_per_tok) if router_logits else []
