"""The kernels of a step's index arithmetic give exactly what the ops mean, with padding rows among the rows."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import step
from nanovllm.kernels.cpu import kernels as cpu_kernels
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.triton import step as triton_step

BLOCK_SIZE = 16
IMPLEMENTATIONS = [cpu_step, triton_step] if cpu_kernels.available()[0] else [triton_step]


def device_of(kernels: ModuleType) -> str:
    return "cuda" if kernels is triton_step and torch.cuda.is_available() else "cpu"


def state(num_rows: int, num_blocks: int, device: str) -> dict[str, Tensor]:
    """Of num_rows rows and a last one for padding, which is at token 0 of position 0 and may hold any other rubbish."""
    rows = num_rows + 1
    made = {
        "token": torch.randint(1, 10**6, (rows,)),
        "pos": torch.randint(0, num_blocks * BLOCK_SIZE, (rows,)),
        "table": torch.randint(0, 2**31 - 1, (rows, num_blocks), dtype=torch.int32),
        "sampling": torch.rand(rows, 4),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,)),
    }
    made["token"][-1] = made["pos"][-1] = made["table"][-1] = 0
    made["sampling"][-1] = float("nan")
    return {name: tensor.to(device) for name, tensor in made.items()}


CASES = [(1, 1, 1), (3, 3, 5), (19, 16, 99), (256, 1, 640), (99, 256, 2500)]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS, ids=lambda kernels: kernels.__name__)
@pytest.mark.parametrize(("num_state_rows", "num_rows", "num_blocks"), CASES)
def test_kernels_are_the_meaning(
    kernels: ModuleType, num_state_rows: int, num_rows: int, num_blocks: int
) -> None:
    device = device_of(kernels)
    s = state(num_state_rows, num_blocks, device)
    row_idx_R = torch.full((num_rows,), num_state_rows, device=device)
    real = min(num_state_rows, num_rows - num_rows // 3)
    row_idx_R[:real] = torch.randperm(num_state_rows)[:real].to(device)
    found = kernels.decode_inputs(s["token"], s["pos"], s["table"], row_idx_R, BLOCK_SIZE)
    expected = step.decode_inputs_meaning(s["token"], s["pos"], s["table"], row_idx_R, BLOCK_SIZE)
    found += kernels.sampling_inputs(s["pos"], s["sampling"], s["seed"], row_idx_R)
    expected += step.sampling_inputs_meaning(s["pos"], s["sampling"], s["seed"], row_idx_R)
    for ours, theirs in zip(found, expected):
        assert ours.dtype is theirs.dtype and torch.equal(
            ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0)
        )
    new_token_R = torch.randint(1, 10**6, (num_rows,), device=device)
    ours, theirs = (s["token"].clone(), s["pos"].clone()), (s["token"].clone(), s["pos"].clone())
    kernels.advance(*ours, row_idx_R, new_token_R)
    step.advance_meaning(*theirs, row_idx_R, new_token_R)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert ours[0][-1] == 0 and ours[1][-1] == 0


def test_the_ops_trace_with_their_shapes() -> None:
    from nanovllm.compile.trace import trace

    s = state(3, 5, "cpu")

    def region(
        token: Tensor, pos: Tensor, table: Tensor, sampling: Tensor, seed: Tensor, row: Tensor
    ) -> tuple[Tensor, ...]:
        out = (
            *step.decode_inputs(token, pos, table, row, BLOCK_SIZE),
            *step.sampling_inputs(pos, sampling, seed, row),
        )
        step.advance(token, pos, row, out[0])
        return out

    row_idx_R = torch.tensor([0, 3])
    inputs = {name: s[name] for name in ("token", "pos", "table", "sampling", "seed")}
    _, _, fakes = trace(region, {**inputs, "row": row_idx_R})
    real = region(*(tensor.clone() for tensor in inputs.values()), row_idx_R)
    assert isinstance(fakes, tuple)
    assert [(fake.shape, fake.dtype) for fake in fakes] == [
        (tensor.shape, tensor.dtype) for tensor in real
    ]
