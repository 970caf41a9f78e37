"""Drawing tokens, and masks of tokens: kernels of `sample.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import collectives, reference
from nanovllm.kernels.cpu.library import DTYPE_CODES, SAMPLE, TOKEN_BITMASK, load


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """`reference.sample.sample` in one pass over the logits; an integer test avoids most
    logarithms."""
    if logits_RV.dtype not in DTYPE_CODES:
        return reference.sample.sample(logits_RV, temperature_R, seed_R, pos_R)
    return _sample(logits_RV, temperature_R, seed_R, pos_R)


def sample_of(
    logits_RX: Tensor,
    token_X: Tensor,
    vocab_size: int,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
) -> Tensor:
    """`reference.drafts.sample_of`."""
    inputs = temperature_R, seed_R, pos_R
    if logits_RX.dtype not in DTYPE_CODES:
        return reference.drafts.sample_of(logits_RX, token_X, vocab_size, *inputs)
    return _sample(logits_RX, *inputs, token_X=token_X.long().contiguous())


def sample_columns(
    logits_RW: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, num_columns: int
) -> Tensor:
    """`collectives.sample_columns`; each rank does with its columns what `sample` does."""
    inputs = temperature_R, seed_R, pos_R
    if logits_RW.dtype not in DTYPE_CODES:
        return collectives.sample_columns(logits_RW, *inputs, num_columns)
    first, num = collectives.own_columns(logits_RW.shape[1], num_columns)
    best_R = torch.empty(logits_RW.shape[0])
    token_R = _sample(logits_RW[:, :num], *inputs, first_token=first, best_R=best_R)
    return collectives.best_of_ranks(collectives.ordered(best_R, token_R))


def _sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    seed_R: Tensor,
    pos_R: Tensor,
    *,
    first_token: int = 0,
    token_X: Tensor | None = None,
    best_R: Tensor | None = None,
) -> Tensor:
    """The best tokens of the columns of `first_token` and following ones, or of token_X. best_R
    gets their scores in fp32."""
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    temperature_R, seed_R, pos_R = (
        temperature_R.float().contiguous(),
        seed_R.contiguous(),
        pos_R.long().contiguous(),
    )
    token_R = torch.empty(logits_RV.shape[0], dtype=torch.int64)
    load().nanovllm_sample(
        SAMPLE.pack(
            logits_RV.data_ptr(),
            temperature_R.data_ptr(),
            seed_R.data_ptr(),
            pos_R.data_ptr(),
            token_R.data_ptr(),
            0 if best_R is None else best_R.data_ptr(),
            0 if token_X is None else token_X.data_ptr(),
            *logits_RV.shape,
            logits_RV.stride(0),
            first_token,
            DTYPE_CODES[logits_RV.dtype],
            torch.get_num_threads(),
        )
    )
    return token_R


def apply_token_bitmask(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    """`reference.sample.apply_token_bitmask`."""
    if logits_RV.dtype not in DTYPE_CODES or allowed_SW.dtype is not torch.int32:
        return reference.sample.apply_token_bitmask(logits_RV, allowed_SW, row_R)
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    allowed_SW, row_R = allowed_SW.contiguous(), row_R.long().contiguous()
    out_RV = torch.empty(logits_RV.shape, dtype=logits_RV.dtype)
    load().nanovllm_apply_token_bitmask(
        TOKEN_BITMASK.pack(
            out_RV.data_ptr(),
            logits_RV.data_ptr(),
            allowed_SW.data_ptr(),
            row_R.data_ptr(),
            *logits_RV.shape,
            logits_RV.stride(0),
            allowed_SW.shape[1],
            DTYPE_CODES[logits_RV.dtype],
            torch.get_num_threads(),
        )
    )
    return out_RV
