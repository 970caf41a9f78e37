"""Recorded steps run the same kernels on the same memory, and what is not known is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import ops, recorded
from nanovllm.kernels.cpu import ggml, library, packed, recording, register
from nanovllm.kernels.cpu.recording import RecordedStep, Unrecordable
from nanovllm.platforms.regions import HostRegion
from tests.engines import make_llm as make_llm

register.register()
packed.register()
ggml.register()


class Norm:
    """A step: two kernels, with a copy to another dtype between them and one at the end."""

    def __init__(self, x_TD: Tensor) -> None:
        self.x_TD, self.weight_D = x_TD, torch.rand(x_TD.shape[1])
        self.out_TD = torch.zeros(x_TD.shape[0], x_TD.shape[1] // 2)

    def result(self) -> Tensor:
        normed_TD = ops.rms_norm(self.x_TD, self.weight_D, 1e-6)
        return ops.silu_mul(normed_TD.to(torch.bfloat16)).float()

    def __call__(self) -> None:
        self.out_TD.copy_(self.result())


def test_a_recorded_step_follows_its_inputs() -> None:
    step = Norm(torch.randn(3, 64))
    replay = RecordedStep(step)
    assert not step.out_TD.any()  # nothing runs while it is recorded
    for _ in range(2):
        step.x_TD.copy_(torch.randn(3, 64))
        replay()
        assert torch.equal(step.out_TD, step.result())


def test_memory_that_moved_is_found_again() -> None:
    region = HostRegion()
    step = Norm(region.place(torch.randn(3, 64)))
    replay = RecordedStep(step)
    region.drop(keep=False)
    in_the_way = [torch.empty_like(step.out_TD) for _ in range(50)]
    region.take_back()
    step.x_TD.copy_(torch.randn(3, 64))
    replay()
    assert torch.equal(step.out_TD, step.result()) and in_the_way


def test_calls_of_other_threads_are_not_recorded() -> None:
    one, other = Norm(torch.randn(3, 64)), Norm(torch.randn(3, 64))

    def step() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        one()

    replay = RecordedStep(step)
    assert torch.equal(other.out_TD, other.result())
    other.out_TD.zero_()
    replay()
    assert torch.equal(one.out_TD, one.result()) and not other.out_TD.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_copies_are_calls_of_the_library(dtype: torch.dtype) -> None:
    """Joins, look-ups and writes of rows: no part of such a step is torch's."""
    x_TD = torch.arange(19 * 8).to(dtype).view(19, 8)  # rows with gaps, where six columns are read
    row_R, to_R = torch.tensor([3, 0, 18]), torch.tensor([1, 4, 0])
    out_SD, column_T = torch.zeros(5, 12, dtype=dtype), torch.zeros(19, dtype=dtype)

    def step() -> None:
        rows_RD = x_TD[:, :6].index_select(0, row_R)
        both_RJ = torch.cat((rows_RD, x_TD[2:5, 2:]), 1)
        out_SD.index_copy_(0, to_R, both_RJ)
        out_SD[2:4, 3:9].copy_(torch.cat((rows_RD[:1], x_TD[7:8, 1:7].clone())))
        column_T.copy_(torch.stack((x_TD[:, 1], x_TD[:, 2]), 1)[:, 1])

    replay = RecordedStep(step)
    assert not out_SD.any() and not column_T.any()
    assert [type(part).__name__ for part in replay._parts] == ["_Calls"]
    for _ in range(2):
        x_TD += 1
        replay()
        found = out_SD.clone(), column_T.clone()
        out_SD.zero_(), column_T.zero_()
        step()
        assert torch.equal(found[0], out_SD) and torch.equal(found[1], column_T)
    for index in (row_R, to_R):
        index += 17
        with pytest.raises(IndexError, match="nanovllm_copy_rows refuses its arguments"):
            replay()
        index -= 17
    replay()


def test_copies_to_other_dtypes_and_shapes_are_torch_s() -> None:
    x_TD, out_TD = torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)
    gaps_TDE = torch.zeros(3, 4, 2)

    def step() -> None:
        out_TD.copy_(x_TD)
        gaps_TDE[:, :, 1].copy_(x_TD)
        gaps_TDE[:, :2].copy_(x_TD[0, 0])

    replay = RecordedStep(step)
    replay()
    assert torch.equal(out_TD, x_TD.bfloat16()) and torch.equal(gaps_TDE[:, 2:, 1], x_TD[:, 2:])
    assert (gaps_TDE[:, :2] == x_TD[0, 0]).all()


def of_inductor() -> None:
    recorded.refuse("a program of Inductor")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x_TD: x_TD.softmax(-1), "aten._softmax.default is not a kernel of ours"),
        (lambda x_TD: int(x_TD[0, 0]), "_local_scalar_dense.default is not"),
        (lambda _: of_inductor(), "a program of Inductor"),
        (lambda _: torch.empty(recording.MAX_BYTES), "it takes more than 16 MiB"),
    ],
)
def test_what_cannot_be_recorded_is_refused(what: Callable[[Tensor], Any], message: str) -> None:
    x_TD = torch.ones(2, 2)
    with pytest.raises(Unrecordable, match=message):
        RecordedStep(lambda: what(x_TD))
    of_inductor()  # no step is recorded now
    assert library.load().nanovllm_rms_norm.argtypes is not None  # the library is as before


def test_a_kernel_s_refusal_is_an_error() -> None:
    code_VC = torch.zeros((4, 32), dtype=torch.uint8)
    row_T, scale_VG = torch.zeros(1, dtype=torch.int32), torch.ones(4, 1)

    def step() -> None:
        ops.packed_lookup(row_T, code_VC, scale_VG, None, None, 8, 32, 32, torch.float32)

    step()  # loads the library
    replay = RecordedStep(step)
    replay()
    row_T += 4
    with pytest.raises(IndexError, match="nanovllm_packed_lookup refuses its arguments"):
        replay()


def test_a_look_up_in_blocks_of_a_gguf_file_is_recorded() -> None:
    """Without it a step of a model whose table is in Q6_K was not."""
    block_VB = torch.zeros((4, 210), dtype=torch.uint8)
    block_VB[:, 208:] = torch.arange(4).half().view(4, 1).view(torch.uint8)
    block_VB[:, 192:208] = 1
    row_T, out_TD = torch.zeros(1, dtype=torch.int32), torch.empty(1, 256)

    def step() -> None:
        out_TD.copy_(ops.ggml_lookup(row_T, block_VB, 14, torch.float32))

    step()
    replay = RecordedStep(step)
    row_T += 3
    replay()
    assert (out_TD == -32 * 3).all()


def test_decode_steps_of_graphs_are_recorded(make_llm: Any) -> None:
    """Their answers are those of the same programs, called one by one; other samplers as well."""
    llm: LLM = make_llm(enforce_eager=False, graph_batch_sizes=[2])
    step = llm.engine.runner.buckets.decode(2)
    assert isinstance(step.replay, RecordedStep)
    for change in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 1, "top_k": 5}):
        params = SamplingParams(max_tokens=12, ignore_eos=True, **change)
        answers = []
        for _ in range(2):
            outputs = llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
            answers.append([output["token_ids"] for output in outputs])
            step.replay = step.launch if step.replay is not step.launch else step.replay
        assert answers[0] == answers[1]
    llm.close()
