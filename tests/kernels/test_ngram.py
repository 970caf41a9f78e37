"""`ngram_propose`: its reference against a search in plain Python, its kernels against it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.triton import step as triton_step

IMPLEMENTATIONS = [cpu_step, triton_step] if cpu_library.available()[0] else [triton_step]
# positions, vocabulary (small ones repeat), tokens of each row, K, min_n, max_n, padding rows
CASES = [
    (64, 2, [1, 2, 3, 19, 63, 64], 3, 1, 1, 0),
    (99, 3, [5, 40, 98, 99, 7], 5, 2, 4, 3),
    (99, 3, [5, 40, 98, 99, 7], 1, 1, 3, 1),
    (989, 4, [900, 1, 500, 989], 8, 3, 6, 0),
    (256, 5000, [200, 256], 4, 1, 2, 2),
    (5000, 6, [4999, 4500, 4096, 4097], 19, 2, 9, 1),
]


def drafted(tokens: list[int], num: int, min_n: int, max_n: int) -> list[int]:
    """The drafts after these tokens, 0 without an occurrence."""
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == tokens[-n:]:
                following = tokens[start + n :]
                return [following[i % len(following)] for i in range(num)]
    return [0] * num


def made(case: int) -> tuple[list[list[int]], Tensor, Tensor, Tensor, Tensor]:
    """Rows' tokens, and their history (arbitrary after them), newest tokens, positions, indices."""
    num_positions, vocab, lengths, *_, num_padding = CASES[case]
    rows = [torch.randint(1, 1 + vocab, (length,)).tolist() for length in lengths]
    order = torch.randperm(len(rows) + 2)[: len(rows)]  # two rows are not in the step
    history_SM = torch.randint(1, 1 + vocab, (len(rows) + 3, num_positions), dtype=torch.int32)
    token_S, pos_S = torch.zeros(len(rows) + 3).long(), torch.zeros(len(rows) + 3).long()
    for row, tokens in zip(order.tolist(), rows):
        history_SM[row, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.int32)
        token_S[row], pos_S[row] = tokens[-1], len(tokens) - 1
    padding = torch.full((num_padding,), len(rows) + 2)
    return rows, history_SM, token_S, pos_S, torch.cat((order, padding))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_drafts_are_those_after_the_first_longest_occurrence(case: int) -> None:
    num_positions, *_, num, min_n, max_n, num_padding = CASES[case]
    rows, history_SM, token_S, pos_S, row_idx_R = made(case)
    before, draft_SK = history_SM.clone(), torch.full((len(history_SM), num), 7)
    reference.step.ngram_propose(history_SM, draft_SK, token_S, pos_S, row_idx_R, min_n, max_n)
    for row, tokens in zip(row_idx_R.tolist(), rows):
        expected = drafted(tokens, num, min_n, max_n)
        assert draft_SK[row].tolist() == expected
        kept = (tokens + expected)[:num_positions]
        assert history_SM[row].tolist() == kept + before[row, len(kept) :].tolist()
    others = torch.ones(len(history_SM), dtype=torch.bool).index_fill_(0, row_idx_R, False)
    assert torch.equal(history_SM[others], before[others]) and (draft_SK[others] == 7).all()
    assert not num_padding or (draft_SK[-1] == 0).all()


def made_past(case: int) -> tuple[list[list[int]], Tensor]:
    """Earlier texts, and the past that they are in, with room at its end."""
    _, vocab, lengths, *_ = CASES[case]
    texts = [torch.randint(1, 1 + vocab, (length,)).tolist() for length in lengths]
    past = [token for text in texts for token in (*text, -1)]
    return texts, torch.tensor([*past, -1, -1], dtype=torch.int32)


def of_past(texts: list[list[int]], tokens: list[int], n: int) -> list[int] | None:
    """The tokens after the first occurrence of the last n tokens in the texts."""
    for text in texts:
        for start in range(len(text) - n + 1):
            if text[start : start + n] == tokens[-n:]:
                return text[start + n :]
    return None


@pytest.mark.parametrize("case", range(len(CASES)))
def test_longer_occurrences_in_earlier_texts_come_first(case: int) -> None:
    *_, num, min_n, max_n, _ = CASES[case]
    rows, history_SM, token_S, pos_S, row_idx_R = made(case)
    texts, past_C = made_past(case)
    draft_SK = torch.zeros(len(history_SM), num).long()
    rest = token_S, pos_S, row_idx_R, min_n, max_n, past_C
    reference.step.ngram_propose(history_SM, draft_SK, *rest)
    for row, tokens in zip(row_idx_R.tolist(), rows):
        expected = [0] * num
        for n in range(min(max_n, len(tokens)), min_n - 1, -1):
            own = drafted(tokens, num, n, n)
            if any(own):  # tokens are not 0
                expected = own
                break
            if (found := of_past(texts, tokens, n)) is not None:
                expected = (found + [0] * num)[:num]
                break
        assert draft_SK[row].tolist() == expected


@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, ids=lambda kernels: kernels.__name__)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_equal_the_reference(kernels: ModuleType, case: int, with_past: bool) -> None:
    device = "cuda" if kernels is triton_step and torch.cuda.is_available() else "cpu"
    *_, num, min_n, max_n, _ = CASES[case]
    _, *given = made(case)
    history_SM, token_S, pos_S, row_idx_R = (one.to(device) for one in given)
    pos_S[int(row_idx_R[0])] = history_SM.shape[1] + 2  # steps that ran beyond the answer's end
    draft_SK = torch.full((len(history_SM), num), 7, device=device)
    ours, theirs = (history_SM.clone(), draft_SK.clone()), (history_SM, draft_SK)
    past_C = made_past(case)[1].to(device) if with_past else None
    rest = token_S, pos_S, row_idx_R, min_n, max_n, past_C
    kernels.ngram_propose(*ours, *rest)
    reference.step.ngram_propose(*theirs, *rest)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert (ours[1][row_idx_R[0]] == 0).all()
