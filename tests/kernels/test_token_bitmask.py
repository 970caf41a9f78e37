"""The kernels that apply masks of tokens agree with the mask, bit by bit, at odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import sample as cpu_sample
from nanovllm.kernels.triton import token_bitmask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
device = "cuda" if torch.cuda.is_available() else "cpu"
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_cpu(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    if not cpu_library.available()[0]:
        return reference.sample.apply_token_bitmask(logits_RV, allowed_SW, row_R)
    return cpu_sample.apply_token_bitmask(logits_RV, allowed_SW, row_R)


def on_gpu(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    inputs = (one.to(device) for one in (logits_RV, allowed_SW, row_R))
    return token_bitmask.apply_token_bitmask(*inputs).cpu()


def masks(num_rows: int, vocab_size: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """Which tokens each row allows, and the words of its mask. Bits behind the last token are
    set."""
    allowed_SV = rng.random((num_rows, vocab_size)) < rng.random((num_rows, 1))
    allowed_SV[0], allowed_SV[-1] = True, False
    padding = np.ones((num_rows, -vocab_size % 32), bool)
    bits_SV = np.concatenate((allowed_SV, padding), axis=1)
    words_SW = np.packbits(bits_SV, axis=1, bitorder="little").view(np.int32)
    return allowed_SV, torch.from_numpy(words_SW)


@pytest.mark.parametrize("kernel", [reference.sample.apply_token_bitmask, on_cpu, on_gpu])
@pytest.mark.parametrize("vocab_size", [1, 19, 32, 99, 640, 5001])
def test_only_tokens_with_a_bit_stay(kernel: Kernel, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    allowed_SV, words_SW = masks(7, vocab_size, rng)
    rows = [3, 0, 6, 3, 5]
    for dtype in DTYPES:
        logits_RV = torch.randn(len(rows), vocab_size + 3).to(dtype)[:, :vocab_size]  # strided
        before_RV = logits_RV.clone()
        kept_RV = kernel(logits_RV, words_SW, torch.tensor(rows))
        expected_RV = before_RV.masked_fill(~torch.from_numpy(allowed_SV[rows]), float("-inf"))
        assert kept_RV.dtype is dtype and torch.equal(kept_RV, expected_RV)
        assert torch.equal(logits_RV, before_RV), "log-probabilities need the model's logits"


@pytest.mark.parametrize("kernel", [reference.sample.apply_token_bitmask, on_cpu, on_gpu])
def test_what_a_mask_forbids_is_not_read(kernel: Kernel) -> None:
    """A NaN of a forbidden token does not stay; one of an allowed token does."""
    allowed_SV, words_SW = masks(3, 99, np.random.default_rng(0))
    logits_RV = torch.full((1, 99), float("nan"))
    kept_V = kernel(logits_RV, words_SW, torch.tensor([1]))[0]
    assert np.array_equal(kept_V.isnan().numpy(), allowed_SV[1])
    assert (kept_V[torch.from_numpy(~allowed_SV[1])] == float("-inf")).all()


@pytest.mark.parametrize("kernel", [reference.sample.apply_token_bitmask, on_cpu, on_gpu])
def test_there_may_be_no_rows(kernel: Kernel) -> None:
    none_R = torch.zeros(0, dtype=torch.int64)
    assert kernel(torch.zeros(0, 40), torch.zeros(2, 2, dtype=torch.int32), none_R).shape == (0, 40)


def test_the_op_has_the_shape_of_the_logits() -> None:
    logits_RV = torch.randn(2, 70)
    row_R, words_SW = torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.int32)
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = [mode.from_tensor(one) for one in (logits_RV, words_SW, row_R)]
        fake_RV = ops.apply_token_bitmask(*inputs)
    found_RV = ops.apply_token_bitmask(logits_RV, words_SW, row_R)
    assert fake_RV.shape == found_RV.shape and fake_RV.dtype is found_RV.dtype
