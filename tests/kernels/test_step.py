"""Kernels for a step's index arithmetic equal the reference exactly, including padding."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.compile.trace import trace
from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.triton import step as triton_step

BLOCK_SIZE = 16
IMPLEMENTATIONS = [cpu_step, triton_step] if cpu_library.available()[0] else [triton_step]
STATE = ("token", "pos", "rope_offset", "table")


def device_of(kernels: ModuleType) -> str:
    return "cuda" if kernels is triton_step and torch.cuda.is_available() else "cpu"


def state(num_rows: int, num_blocks: int, device: str) -> dict[str, Tensor]:
    """A state of num_rows rows; the padding row's block table and settings may hold anything."""
    rows = num_rows + 1
    made = {
        "token": torch.randint(1, 10**6, (rows,)),
        "pos": torch.randint(0, num_blocks * BLOCK_SIZE // 2 + 1, (rows,)),
        "rope_offset": torch.randint(-9, 9, (rows,)),
        "table": torch.randint(0, 2**31 - 1, (rows, num_blocks), dtype=torch.int32),
        "sampling": torch.rand(rows, 7),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,)),
    }
    for name in STATE:
        made[name][-1] = 0
    made["sampling"][-1] = float("nan")
    return {name: tensor.to(device) for name, tensor in made.items()}


def assert_equal(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))


def assert_advances(
    kernels: ModuleType, s: dict[str, Tensor], row_idx_R: Tensor, token_R: Tensor, *num_R: Tensor
) -> None:
    token_R[::3] = reference.sample.NO_TOKEN
    ours, theirs = (s["token"].clone(), s["pos"].clone()), (s["token"].clone(), s["pos"].clone())
    kernels.advance(*ours, row_idx_R, token_R, *num_R)
    reference.step.advance(*theirs, row_idx_R, token_R, *num_R)
    assert_equal(ours, theirs)
    assert ours[0][-1] == 0 and ours[1][-1] == 0
    assert (ours[0][row_idx_R[::3]] == 0).all()


CASES = [(1, 1, 1), (3, 3, 5), (19, 16, 99), (256, 1, 640), (99, 256, 2500)]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, ids=lambda kernels: kernels.__name__)
@pytest.mark.parametrize(("num_state_rows", "num_rows", "num_blocks"), CASES)
def test_decode_kernels_equal_the_reference(
    kernels: ModuleType, num_state_rows: int, num_rows: int, num_blocks: int
) -> None:
    device = device_of(kernels)
    s = state(num_state_rows, num_blocks, device)
    row_idx_R = torch.full((num_rows,), num_state_rows, device=device)
    real = min(num_state_rows, num_rows - num_rows // 3)
    row_idx_R[:real] = torch.randperm(num_state_rows)[:real].to(device)
    given = (*(s[name] for name in STATE), row_idx_R, BLOCK_SIZE)
    assert_equal(kernels.decode_inputs(*given), reference.step.decode_inputs(*given))
    given = (s["pos"], s["sampling"], s["seed"], row_idx_R)
    assert_equal(kernels.sampling_inputs(*given), reference.step.sampling_inputs(*given))
    assert_advances(kernels, s, row_idx_R, torch.randint(1, 10**6, (num_rows,), device=device))


# rows with their numbers of tokens, 0 for padding rows; the bucket's tokens; blocks per row
SPANS: list[tuple[list[int], int, int]] = [
    ([0, 0, 0], 19, 3),
    ([1], 1, 1),
    ([5, 1, 7, 0], 19, 4),
    ([1] * 16, 99, 99),
    ([700, 1, 19, 99, 0, 0], 989, 100),
    ([4] * 250 + [0] * 6, 1024, 8),
]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, ids=lambda kernels: kernels.__name__)
@pytest.mark.parametrize("case", range(len(SPANS)))
def test_span_kernels_equal_the_reference(kernels: ModuleType, case: int) -> None:
    nums, num_tokens, num_blocks = SPANS[case]
    device, num_state_rows = device_of(kernels), len(nums) + 3
    s = state(num_state_rows, num_blocks, device)
    row_idx_R = torch.randperm(num_state_rows)[: len(nums)].to(device)
    num_R = torch.tensor(nums, device=device)
    row_idx_R[num_R == 0] = num_state_rows
    s["pos"] = s["pos"].clamp(max=num_blocks * BLOCK_SIZE - max(nums))
    draft_SK = torch.randint(0, 10**6, (num_state_rows + 1, 3), device=device)
    given_T = torch.randint(-2 if case % 2 else -1, 3, (num_tokens,), device=device)
    given_T[sum(nums) :] = 0
    drafts = (draft_SK,) if case % 2 else ()
    given = (*(s[name] for name in STATE), row_idx_R, num_R, given_T, BLOCK_SIZE, *drafts)
    expected = reference.step.span_inputs(*given)
    assert_equal(kernels.span_inputs(*given), expected)
    theirs = reference.step.span_inputs(*given, each=True)
    assert_equal(kernels.span_inputs(*given, each=True), theirs)
    assert_equal(theirs[:3] + theirs[6:], expected[:3] + expected[6:])
    row_T, num_T = expected[6:8]
    given = (s["pos"], s["sampling"], s["seed"], row_T, num_T)
    assert_equal(kernels.sampling_inputs(*given), reference.step.sampling_inputs(*given))
    assert_advances(kernels, s, row_idx_R, torch.randint_like(row_idx_R, 1, 10**6), num_R)


def test_spans_are_packed_one_after_another() -> None:
    token_S, pos_S = torch.tensor([70, 71, 72, 0]), torch.tensor([0, 4, 9, 0])
    rope_offset_S = torch.tensor([0, 0, -3, 0])
    table_SP = torch.tensor([[7, 2, 0], [4, 8, 3], [5, 6, 9], [0, 0, 0]], dtype=torch.int32)
    row_R, num_R = torch.tensor([2, 1, 3]), torch.tensor([2, 6, 0])
    given_T = torch.tensor([-1, 50, 1, 2, 3, 4, 5, 6, 0, 0])
    token_T, pos_T, slot_T, table_RP, seq_len_R, q_start, row_T, num_T, last_R = (
        tensor.tolist()
        for tensor in reference.step.span_inputs(
            token_S, pos_S, rope_offset_S, table_SP, row_R, num_R, given_T, 4
        )
    )
    assert token_T == [72, 50, 1, 2, 3, 4, 5, 6, 0, 0]
    assert pos_T == [6, 7, 4, 5, 6, 7, 8, 9, 0, 0]
    assert slot_T == [37, 38, 32, 33, 34, 35, 12, 13, 0, 1]
    assert table_RP == [[5, 6, 9], [4, 8, 3], [0, 0, 0]]
    assert seq_len_R == [11, 10, 0] and q_start == [0, 2, 8, 8] and last_R == [1, 7, 7]
    assert row_T == [2, 2, 1, 1, 1, 1, 1, 1, 3, 3] and num_T == [1, 2, 1, 2, 3, 4, 5, 6, 1, 1]


def test_the_ops_trace_with_their_shapes() -> None:
    s = state(3, 5, "cpu")

    def region(row: Tensor, num: Tensor, given: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        token, pos, offset, table, sampling, seed = rest
        out = (
            *ops.decode_inputs(token, pos, offset, table, row, BLOCK_SIZE),
            *ops.span_inputs(token, pos, offset, table, row, num, given, BLOCK_SIZE),
            *ops.sampling_inputs(pos, sampling, seed, row, num),
            *ops.accept(given, given, num, row, token, pos, 4),
            *ops.next_tokens(token, pos, row, given, num.int(), torch.tensor([0, 4, 5]).int()),
            *ops.draft_inputs(token, pos, offset, table, row, 3, 0, 7, BLOCK_SIZE, 70),
        )
        ops.advance(token, pos, row, out[0], num)
        return out

    inputs = [
        torch.tensor([0, 3]),
        torch.tensor([4, 0]),
        torch.tensor([-1, 1, 2, 3, 0]),
        *s.values(),
    ]
    _, _, fakes = trace(region, {f"input{i}": tensor for i, tensor in enumerate(inputs)})
    real = region(*(tensor.clone() for tensor in inputs))
    assert isinstance(fakes, tuple)
    assert [(fake.shape, fake.dtype) for fake in fakes] == [(one.shape, one.dtype) for one in real]
