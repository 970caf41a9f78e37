"""Kernels for drafting and verifying equal the reference exactly, including padding."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import norm_act as cpu_norm_act
from nanovllm.kernels.cpu import sample as cpu_sample
from nanovllm.kernels.triton import drafts as triton_drafts
from nanovllm.kernels.triton import sample as triton_sample
from tests.kernels.test_step import IMPLEMENTATIONS, STATE, assert_equal, device_of, state
from tests.kernels.test_step import triton_step as triton

KERNELS = [triton_drafts if one is triton else one for one in IMPLEMENTATIONS]
kernels_of = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.__name__)


def where(kernels: ModuleType) -> str:
    return device_of(triton if kernels in (triton_drafts, triton_sample) else kernels)


def test_tokens_hold_up_to_the_first_that_was_not_chosen() -> None:
    fed = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 9, 9, 5, 0, 0])
    chosen = torch.tensor([2, 3, 4, 2, 7, 3, 8, 2, 1, 9, 6, 0, 0])
    # rows of three tokens: both proposals right; the second wrong; the first wrong. Then rows of
    # one token (the next row's first token is not a proposal) and a padding row.
    num_R, rows = torch.tensor([3, 3, 3, 1, 1, 0]), torch.tensor([4, 2, 0, 1, 3, 5])
    token_S, pos_S = torch.arange(6) * 100, torch.tensor([9, 8, 7, 6, 5, 0])
    token_RK, count_R = reference.drafts.accept(fed, chosen, num_R, rows, token_S, pos_S, 3)
    assert count_R.tolist() == [3, 2, 1, 1, 1, 1]
    kept = [row[:count] for row, count in zip(token_RK.tolist(), count_R.tolist())]
    assert kept[:5] == [[2, 3, 4], [2, 7], [8], [9], [6]]
    assert token_S.tolist() == [8, 9, 7, 6, 4, 0]
    assert pos_S.tolist() == [10, 9, 9, 7, 8, 0]


def test_the_token_after_each_and_the_last_accepted_one() -> None:
    # row 2 has fed three tokens from 7 on and kept two; row 0 one; then a padding row
    token_S, pos_S = torch.tensor([50, 0, 52, 0]), torch.tensor([5, 0, 9, 0])
    rows, q_start = torch.tensor([2, 0, 3]), torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    fed = torch.tensor([10, 11, 12, 13, 0])
    seq_len = torch.tensor([10, 5, 0], dtype=torch.int32)
    next_T, last_R = reference.drafts.next_tokens(token_S, pos_S, rows, fed, seq_len, q_start)
    assert last_R.tolist()[:2] == [1, 3] and next_T.tolist()[:2] == [11, 52] and next_T[3] == 50


def test_blocks_see_their_own_end() -> None:
    token_S, pos_S = torch.tensor([70, 71, 0]), torch.tensor([6, 10, 0])
    offset_S = torch.tensor([0, -3, 0])
    table_SP = torch.tensor([[7, 2, 0], [4, 8, 3], [0, 0, 0]], dtype=torch.int32)
    token_X, pos_X, slot_X, table_XP, seq_len_X, q_start, row_X, ahead_X = (
        one.tolist()
        for one in reference.drafts.draft_inputs(
            token_S, pos_S, offset_S, table_SP, torch.tensor([1, 0]), 3, 0, 99, 4, 11
        )
    )
    assert token_X == [71, 99, 99, 70, 99, 99] and pos_X == [7, 8, 8, 6, 7, 8]
    assert slot_X == [14, 15, 15, 10, 11, 0] and seq_len_X == [12, 12, 12, 9, 9, 9]
    assert table_XP == [[4, 8, 3]] * 3 + [[7, 2, 0]] * 3 and q_start == list(range(7))
    assert row_X == [1, 1, 1, 0, 0, 0] and ahead_X == [0, 1, 2] * 2


# rows with their numbers of tokens, 0 for padding rows; tokens of the bucket; K
CASES = [([1], 1, 1), ([4, 2, 4, 0, 0], 20, 4), ([6] * 30 + [0] * 2, 192, 6)]


def spans(nums: list[int], device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A state, rows and their numbers of tokens."""
    s = state(len(nums) + 3, 8, device)
    num_R = torch.tensor(nums, device=device)
    row_idx_R = torch.randperm(len(nums) + 3)[: len(nums)].to(device)
    row_idx_R[num_R == 0] = len(nums) + 3
    return s, row_idx_R, num_R


@kernels_of
@pytest.mark.parametrize("rate", [None, 0, 2**30, 2**31])
@pytest.mark.parametrize(("nums", "num_tokens", "num"), CASES)
def test_acceptance_equals_the_reference(
    kernels: ModuleType, nums: list[int], num_tokens: int, num: int, rate: int | None
) -> None:
    s, row_idx_R, num_R = spans(nums, where(kernels))
    fed_T = torch.randint(0, 2, (num_tokens,), device=num_R.device)
    chosen_T = torch.randint(0, 2, (num_tokens,), device=num_R.device)
    chosen_T[::7] = reference.sample.NO_TOKEN
    random = () if rate is None else (s["seed"], rate)
    moved: list[tuple[Tensor, ...]] = []
    for one in (kernels, reference.drafts):
        token_S, pos_S = s["token"].clone(), s["pos"].clone()
        given = fed_T, chosen_T, num_R, row_idx_R, token_S, pos_S, num, *random
        token_RK, count_R = one.accept(*given)
        real_R = num_R > 0
        moved.append((token_RK[real_R], count_R, token_S, pos_S))
    assert_equal(*moved)
    count_R = moved[0][1]
    if rate in (0, 2**31):
        assert count_R.tolist() == [1 if rate == 0 else max(n, 1) for n in nums]


@kernels_of
@pytest.mark.parametrize(("nums", "num_tokens", "num"), [*CASES, ([1500, 3], 1600, 1)])
def test_next_tokens_equal_the_reference(
    kernels: ModuleType, nums: list[int], num_tokens: int, num: int
) -> None:
    s, row_idx_R, num_R = spans(nums, where(kernels))
    fed_T = torch.randint(1, 10**6, (num_tokens,), device=num_R.device)
    q_start = torch.cat((num_R[:1] * 0, num_R.cumsum(0))).int()
    kept_R = (num_R - torch.arange(len(nums), device=num_R.device) % 2).clamp(min=1)
    seq_len_R = torch.where(num_R > 0, s["pos"][row_idx_R] - kept_R + num_R, 0).int()
    given = s["token"], s["pos"], row_idx_R, fed_T, seq_len_R, q_start
    assert_equal(kernels.next_tokens(*given), reference.drafts.next_tokens(*given))


@kernels_of
@pytest.mark.parametrize(("num", "shift"), [(1, -1), (8, 0)])
def test_draft_inputs_equal_the_reference(kernels: ModuleType, num: int, shift: int) -> None:
    s, row_idx_R, _ = spans([1, 1, 1, 0], where(kernels))
    given = (*(s[name] for name in STATE), row_idx_R, num, shift, 321, 16, 70)
    assert_equal(kernels.draft_inputs(*given), reference.drafts.draft_inputs(*given))


@pytest.mark.parametrize("kernels", [triton_drafts, cpu_norm_act], ids=["triton", "cpu"])
@pytest.mark.parametrize(("rows", "parts", "dim"), [(1, 2, 64), (5, 3, 100)])
def test_norms_of_parts_equal_the_reference(
    kernels: ModuleType, rows: int, parts: int, dim: int
) -> None:
    x_TD = torch.randn(rows, parts * dim, device=where(kernels))
    weight_PE = torch.rand(parts, dim, device=x_TD.device)
    found = kernels.rms_norm_each(x_TD, weight_PE, 1e-6)
    torch.testing.assert_close(found, reference.drafts.rms_norm_each(x_TD, weight_PE, 1e-6))


@pytest.mark.parametrize("kernels", [triton_sample, cpu_sample], ids=["triton", "cpu"])
@pytest.mark.parametrize(("rows", "num", "vocab_size"), [(1, 70, 512), (3, 1500, 4000)])
def test_tokens_of_a_part_of_the_vocabulary_are_those_of_all(
    kernels: ModuleType, rows: int, num: int, vocab_size: int
) -> None:
    device = where(kernels)
    logits_RX = torch.randn(rows, num, device=device)
    logits_RX[-1, num // 2 :] = float("nan")
    token_X = torch.randperm(vocab_size)[:num].sort()[0].to(device)
    temperature_R = torch.tensor([0.0, 1.3, 0.6][:rows], device=device)
    inputs = temperature_R, torch.arange(rows, device=device) - 1, token_X[:rows]
    given = logits_RX, token_X, vocab_size, *inputs
    assert_equal([kernels.sample_of(*given)], [reference.drafts.sample_of(*given)])
    logits_RX.fill_(float("-inf"))
    assert (kernels.sample_of(*given) == reference.sample.NO_TOKEN).all()
