"""Kernels of the gated delta rule and its convolution equal the reference, token by token.

Rows have zero, one or many tokens, some are new, and the states of new rows are NaN. Padding rows
share the last place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import gated_delta as chunked
from nanovllm.kernels import reference
from nanovllm.kernels.cpu import gated_delta as cpu_delta
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.triton import causal_conv as triton_conv
from nanovllm.kernels.triton import gated_delta as triton_delta
from nanovllm.kernels.triton import gated_delta_step as triton_step

REFERENCE = reference.gated_delta
TRITON = SimpleNamespace(
    causal_conv=triton_conv.causal_conv,
    gated_delta=triton_delta.gated_delta,
    gated_delta_step=triton_step.gated_delta_step,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# key heads, value heads, key size, value size
SMALL, ODD, LARGE = (1, 2, 16, 16), (2, 6, 24, 40), (2, 4, 128, 128)


class Case:
    """Inputs of a step: rows with these tokens, the first of which are new."""

    def __init__(
        self,
        heads: tuple[int, int, int, int],
        num_tokens: list[int],
        *,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        num_places: int = 1,
        pad: int = 0,
        device: str = "cpu",
    ) -> None:
        num_k, num_v, key, value = heads
        self.channels = 2 * num_k * key + num_v * value
        num_rows, total = len(num_tokens), sum(num_tokens) + pad
        last = num_rows + 3
        self.pos_R = torch.randint(1, 99, (num_rows,))
        self.pos_R[::3] = 0
        self.num_R = torch.tensor(num_tokens)
        # rows without tokens are padding
        row_R = torch.where(self.num_R == 0, last, torch.randperm(num_rows))
        self.pos_R[self.num_R == 0] = 0

        def place(row: Tensor, pos: Tensor) -> Tensor:
            return row * num_places + (pos + num_places - 1) % num_places

        self.from_R, self.is_new_R = place(row_R, self.pos_R), self.pos_R == 0
        self.to_R = place(row_R, self.pos_R + self.num_R)
        self.seq_len_R = torch.where(self.num_R > 0, self.pos_R + self.num_R, 0).int()
        end_R = self.num_R.cumsum(0)
        self.q_start_S = torch.cat((torch.zeros(1), end_R)).int()
        token_T = torch.arange(total)
        row_T = (token_T[:, None] >= end_R).sum(1).clamp(max=num_rows - 1)
        is_real_T = token_T < end_R[-1]
        pos_T = self.pos_R[row_T] + token_T - (end_R - self.num_R)[row_T]
        self.to_T = torch.where(
            is_real_T, place(row_R[row_T], pos_T + 1), place(torch.tensor(last), torch.tensor(1))
        )
        self.is_real_T = is_real_T
        # parts of a wider product
        self.product = torch.randn(total, self.channels + 5).to(dtype)
        self.z = torch.randn(total, num_v * value + 3).to(dtype)[:, 1:-2]
        self.ba = torch.randn(total, 2 * num_v + 4).to(dtype)[:, 4:]
        self.conv = torch.randn(self.channels, 4).to(dtype)
        self.a_log, self.dt_bias = torch.randn(num_v), torch.randn(num_v)
        self.norm = torch.rand(value).to(dtype) + 0.5
        shape = ((last + 1) * num_places, num_v, key, value)
        self.state = torch.randn(shape).to(state_dtype)
        self.conv_state = torch.randn(shape[0], 4, self.channels).to(dtype)
        new_X = self.from_R[self.is_new_R]
        self.state[new_X], self.conv_state[new_X] = torch.nan, torch.nan
        for name, found in vars(self).items():
            if isinstance(found, Tensor):
                setattr(self, name, found.to(device))

    @property
    def x(self) -> Tensor:
        return self.product[:, : self.channels]

    def to(self, each: bool) -> tuple[Tensor | None, Tensor | None]:
        return (None, self.to_T) if each else (self.to_R, None)

    def conv_of(self, kernels: Any, each: bool = False) -> tuple[Tensor, Tensor]:
        state = self.conv_state.clone()
        y = kernels.causal_conv(
            self.x, self.conv, state, self.seq_len_R, self.q_start_S, self.from_R, *self.to(each)
        )
        return y, state

    def delta_of(self, kernels: Any, each: bool = False) -> tuple[Tensor, Tensor]:
        state = self.state.clone()
        y = kernels.gated_delta(
            self.x, self.ba, self.a_log, self.dt_bias, state, self.q_start_S, self.from_R,
            self.is_new_R, *self.to(each),
        )  # fmt: skip
        return y, state

    def step_of(self, kernels: Any) -> tuple[Tensor, Tensor, Tensor]:
        state, conv_state = self.state.clone(), self.conv_state.clone()
        y = kernels.gated_delta_step(
            self.x, self.z, self.ba, self.conv, self.a_log, self.dt_bias, self.norm, 1e-6,
            conv_state, state, self.seq_len_R, self.from_R, self.is_new_R, self.to_R,
        )  # fmt: skip
        return y, state, self.seen(conv_state)

    def seen(self, conv_state: Tensor) -> Tensor:
        """The inputs in the rows' places that a later step reads; others are zeroed."""
        result = torch.zeros_like(conv_state)
        for row, place in enumerate(self.to_R.tolist()):
            end = int(self.seq_len_R[row])
            for pos in range(max(0, end - 4), end):
                result[place, pos % 4] = conv_state[place, pos % 4]
        return result


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan())
        difference = (ours.float() - theirs.float()).nan_to_num(0.0).abs().max()
        assert difference <= bound * max(1.0, theirs.float().nan_to_num(0.0).abs().max())


MANY, FEW = [70, 0, 1, 130, 64, 3], [1, 4, 0, 2, 3]
STATIC = SimpleNamespace(gated_delta=chunked.gated_delta)
HOST = SimpleNamespace(gated_delta=chunked.gated_delta_cpu)
STEPS: dict[str, Any] = {"triton": TRITON} | (
    {"cpu": cpu_delta} if cpu_library.available()[0] else {}
)


def kept(case: Case, state: Tensor, each: bool) -> Tensor:
    """The states that a later step may read."""
    return state[case.to_T[case.is_real_T] if each else case.to_R[case.num_R > 0]]


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@pytest.mark.parametrize("heads", [SMALL, ODD], ids=str)
def test_the_convolution_of_a_step(heads: Any, each: bool) -> None:
    case = Case(heads, FEW if each else MANY, num_places=4 if each else 1, pad=9, device=DEVICE)
    (y, state), expected = case.conv_of(TRITON, each), case.conv_of(REFERENCE, each)
    assert_close((y, kept(case, state, each)), (expected[0], kept(case, expected[1], each)), 1e-6)


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@pytest.mark.parametrize("heads", [SMALL, ODD], ids=str)
@pytest.mark.parametrize("kernels", [TRITON, STATIC, HOST], ids=["triton", "static", "host"])
def test_the_rule_over_the_tokens_of_rows(kernels: Any, heads: Any, each: bool) -> None:
    device = DEVICE if kernels is TRITON else "cpu"
    case = Case(heads, FEW if each else MANY, num_places=4 if each else 1, pad=9, device=device)
    (y, state), expected = case.delta_of(kernels, each), case.delta_of(REFERENCE, each)
    assert not y[~case.is_real_T].any()
    assert_close((y, kept(case, state, each)), (expected[0], kept(case, expected[1], each)), 1e-5)


def test_equal_keys_that_replace_each_other_do_not_lose_digits() -> None:
    """The inverse of a chunk's matrix is then that of ones: powers of it have 18 digits."""
    case = Case(SMALL, [64], device=DEVICE)
    case.product[:] = case.product[:1]
    case.ba[:, :2], case.a_log[:] = 30.0, -30.0
    for kernels in (TRITON, HOST) if DEVICE == "cpu" else (TRITON,):
        assert_close(case.delta_of(kernels), case.delta_of(REFERENCE), 1e-5)


@pytest.mark.parametrize("num_places", [1, 3])
@pytest.mark.parametrize("heads", [SMALL, ODD, LARGE], ids=str)
@pytest.mark.parametrize("kernels", STEPS)
def test_a_decode_step_in_one_pass(kernels: str, heads: Any, num_places: int) -> None:
    num_rows, device = 2 if heads is LARGE else 7, DEVICE if kernels == "triton" else "cpu"
    case = Case(heads, [1] * num_rows, num_places=num_places, device=device)
    assert_close(case.step_of(STEPS[kernels]), case.step_of(REFERENCE), 1e-5)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_agrees_up_to_rounding(state_dtype: torch.dtype) -> None:
    """The reference rounds results alone, the kernels of chunks the inputs of products too."""
    given: dict[str, Any] = {"dtype": torch.bfloat16, "state_dtype": state_dtype, "device": DEVICE}
    case = Case(SMALL, MANY, **given)
    assert_close(case.conv_of(TRITON)[:1], case.conv_of(REFERENCE)[:1], 2.0**-6)
    (y, state), (expected, state_after) = case.delta_of(TRITON), case.delta_of(REFERENCE)
    found = (y, kept(case, state, False))
    assert_close(found, (expected, kept(case, state_after, False)), 2.0**-6)
    for name, kernels in STEPS.items():
        case = Case(LARGE, [1] * 2, **given | {"device": DEVICE if name == "triton" else "cpu"})
        (y, *states), (expected, *after) = case.step_of(kernels), case.step_of(REFERENCE)
        assert_close(tuple(states), tuple(after), 2.0**-6)
        # the norm enlarges small results
        assert (y - expected).float().square().mean() <= 2.0**-12 * expected.float().var()


@pytest.mark.parametrize("kernels", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_steps_of_single_tokens_are_those_of_a_prompt(kernels: Any) -> None:
    """From zeros, over the places of three tokens, with what is stored elsewhere NaN."""
    num, case = 9, Case(SMALL, [9], num_places=3, device=DEVICE)
    case.state[:], case.conv_state[:] = torch.nan, torch.nan
    case.conv_state[:], case.seq_len_R[:] = torch.nan, num
    mixed, _ = case.conv_of(REFERENCE)
    case_of_mixed = case.product.clone()
    case_of_mixed[:, : case.channels] = mixed
    x, case.product = case.x.clone(), case_of_mixed
    o, _ = case.delta_of(REFERENCE)
    expected = REFERENCE.gated_norm(o, case.z, case.norm, 1e-6)
    state, conv_state = case.state.clone(), case.conv_state.clone()
    for pos in range(num):
        one = slice(pos, pos + 1)
        place, before = torch.tensor([pos % 3], device=DEVICE), torch.tensor([(pos + 2) % 3])
        y = kernels.gated_delta_step(
            x[one], case.z[one], case.ba[one], case.conv, case.a_log, case.dt_bias, case.norm,
            1e-6, conv_state, state, torch.tensor([pos + 1], device=DEVICE).int(),
            before.to(DEVICE), torch.tensor([pos == 0], device=DEVICE), place,
        )  # fmt: skip
        assert_close((y,), (expected[one],), 1e-5)
