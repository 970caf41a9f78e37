"""Kernels of Mamba-2's recurrence equal the reference, token by token.

The rows and places are those of `test_gated_delta.Case`. States of new rows are NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels import ssd as chunked
from nanovllm.kernels.triton import causal_conv as triton_conv
from nanovllm.kernels.triton import ssd as triton_ssd
from nanovllm.kernels.triton import ssd_step as triton_step
from tests.kernels.test_gated_delta import DEVICE, FEW, MANY, Case, assert_close, kept

# groups, heads, state size, head size: the places of key heads, value heads, key and value sizes
SMALL, ODD, LARGE = (1, 2, 16, 16), (2, 6, 24, 40), (1, 2, 256, 64)
# Nemotron-H-8B, Falcon-H1 of 7B, 34B and 0.5B
NEMOTRON_8B, FALCON_7B = (8, 128, 128, 64), (1, 24, 256, 128)
FALCON_34B, FALCON_HALF_B = (2, 32, 256, 128), (1, 24, 128, 64)
WIDE = (1, 3, 8, 80)  # the smallest states, and heads of three programs


class SsdCase(Case):
    """The same rows, with time steps and decays."""

    def __init__(self, heads: tuple[int, int, int, int], tokens: list[int], **given: Any) -> None:
        super().__init__(heads, tokens, **given)
        groups, num_heads, *_ = heads
        self.channels_of_groups = groups * heads[2]
        self.dt = torch.rand(len(self.x), num_heads, device=self.x.device)
        # the first head keeps half of its state over a chunk, the last one nearly nothing
        rate = torch.logspace(-2, 0.5, num_heads, device=self.x.device)
        self.log_decay = -torch.rand_like(self.dt) * rate
        self.bias = torch.randn(self.channels, device=self.x.device).to(self.x.dtype)

    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.dt, self.log_decay, self.state.clone()

    def ssd_of(self, function: Any, each: bool = False) -> tuple[Tensor, Tensor]:
        *tokens, state = self.given()
        places = (self.q_start_S, self.from_R, self.is_new_R)
        return function(*tokens, state, *places, *self.to(each)), state

    def step_with(self, function: Any) -> tuple[Tensor, Tensor]:
        *tokens, state = self.given()
        return function(*tokens, state, self.from_R, self.is_new_R, self.to_R), state


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@pytest.mark.parametrize("heads", [SMALL, ODD, WIDE], ids=str)
@pytest.mark.parametrize("kernels", [chunked, triton_ssd], ids=["static", "triton"])
def test_the_recurrence_over_the_tokens_of_rows(kernels: Any, heads: Any, each: bool) -> None:
    device = DEVICE if kernels is triton_ssd else "cpu"
    tokens = FEW if each else MANY
    case = SsdCase(heads, tokens, num_places=4 if each else 1, pad=9, device=device)
    (y, state), expected = case.ssd_of(kernels.ssd, each), case.ssd_of(reference.ssd.ssd, each)
    assert not y[~case.is_real_T].any()
    assert_close((y, kept(case, state, each)), (expected[0], kept(case, expected[1], each)), 1e-5)


def test_states_too_large_for_the_kernels_take_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ssd, "ssd_chunks_kernel", None)
    case = SsdCase((1, 1, triton_ssd.MAX_STATE + 1, 16), [70, 3], device=DEVICE)
    (y, state), expected = case.ssd_of(triton_ssd.ssd), case.ssd_of(reference.ssd.ssd)
    found = (y, kept(case, state, False))
    assert_close(found, (expected[0], kept(case, expected[1], False)), 1e-5)


def test_a_prompt_in_parts_is_the_whole_prompt() -> None:
    """Its second part begins with the state that the first one stored in another place."""
    case = SsdCase(ODD, [150], device=DEVICE)
    case.is_new_R[:], rest = True, torch.tensor([False], device=DEVICE)
    whole, expected = case.ssd_of(triton_ssd.ssd)
    *tokens, state = case.given()
    places, found = (case.from_R, case.from_R + 1, case.to_R), []
    for part, (start, end) in enumerate(((0, 70), (70, 150))):
        q_start_S = torch.tensor([0, end - start], device=DEVICE).int()
        given = (*(one[start:end] for one in tokens), state, q_start_S, places[part])
        found.append(triton_ssd.ssd(*given, rest if part else case.is_new_R, places[part + 1]))
    assert_close((torch.cat(found), state[case.to_R]), (whole, expected[case.to_R]), 1e-5)


def test_chunks_in_bf16_agree_up_to_rounding() -> None:
    """The kernels round what they multiply, the reference nothing."""
    case = SsdCase(ODD, MANY, dtype=torch.bfloat16, pad=9, device=DEVICE)
    (y, state), expected = case.ssd_of(triton_ssd.ssd), case.ssd_of(reference.ssd.ssd)
    found = (y, kept(case, state, False))
    assert_close(found, (expected[0], kept(case, expected[1], False)), 2.0**-7)


def test_rows_are_copied_unless_their_addresses_are_aligned() -> None:
    """Of others Triton's code for sm_90 has been wrong: see docs/log.md."""
    for stride, first, is_same in ((48, 0, True), (48, 8, True), (40, 0, False), (48, 2, False)):
        rows = torch.arange(3 * stride).to(torch.bfloat16).view(3, stride)[:, first : first + 32]
        found = triton_ssd._aligned(rows)
        assert torch.equal(found, rows) and found.stride(0) % 16 == 0
        assert (found.data_ptr() == rows.data_ptr()) is is_same


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [NEMOTRON_8B, FALCON_7B, FALCON_34B, FALCON_HALF_B], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_the_sizes_of_models(heads: Any, dtype: torch.dtype) -> None:
    tokens = [1000, 0, 1, 64, 129, 2050]
    case = SsdCase(heads, tokens, dtype=dtype, pad=50, device="cuda")
    (y, state), expected = case.ssd_of(triton_ssd.ssd), case.ssd_of(chunked.ssd)
    assert not y[~case.is_real_T].any()
    found = (y, kept(case, state, False))
    assert_close(found, (expected[0], kept(case, expected[1], False)), 2.0**-7)


@pytest.mark.parametrize("num_places", [1, 3])
@pytest.mark.parametrize("heads", [SMALL, ODD, LARGE], ids=str)
def test_a_decode_step(heads: Any, num_places: int) -> None:
    case = SsdCase(heads, [1] * 5, num_places=num_places, device=DEVICE)
    expected = case.step_with(reference.ssd.ssd_step)
    assert_close(case.step_with(triton_step.ssd_step), expected, 1e-5)
    y, state = case.ssd_of(reference.ssd.ssd)
    assert_close((y, state[case.to_R]), (expected[0], expected[1][case.to_R]), 1e-5)


def test_a_decode_step_in_bf16_reads_the_same_numbers() -> None:
    given: dict[str, Any] = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}
    case = SsdCase(ODD, [1] * 3, **given, device=DEVICE)
    found, expected = (
        case.step_with(function) for function in (triton_step.ssd_step, reference.ssd.ssd_step)
    )
    assert_close(found[:1], expected[:1], 1e-5)
    assert_close(found[1:], expected[1:], 2.0**-7)  # a bf16 digit


def test_the_convolution_has_a_bias() -> None:
    case = SsdCase(ODD, MANY, pad=9, device=DEVICE)
    found = []
    for function in (triton_conv.causal_conv, reference.gated_delta.causal_conv):
        places = (case.seq_len_R, case.q_start_S, case.from_R)
        state = case.conv_state.clone()
        found.append(function(case.x, case.conv, state, *places, *case.to(False), case.bias))
    assert_close(found[:1], found[1:], 1e-6)
    assert (found[0] - case.conv_of(triton_conv)[0]).abs().max() > 0.1
