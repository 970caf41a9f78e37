"""The persistent decode step: its arithmetic and its words on a CPU, compiled, and on a GPU."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.backends import nvidia

from nanovllm import LLM, SamplingParams
from nanovllm.compile.lower.persistent import schedule as schedules
from nanovllm.compile.lower.persistent import step as steps
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.lower.persistent.step import Step
from nanovllm.kernels.cuda import nvrtc, persistent
from nanovllm.kernels.cuda.persistent import CodeFormat, Experts
from nanovllm.tools.shapes import CONFIGS
from tests.compile.persistent_cases import (
    FP8_BLOCKS,
    FP8_EXPERTS,
    FP8_ROWS,
    INT4,
    QWEN2,
    SMALL,
    SMALL_EXPERTS,
    Case,
    Shape,
    case,
    error,
)
from tests.kernels import cuda_on_host
from tests.kernels.test_cuda_packed import folder

__all__ = ["folder"]  # a fixture
LIMIT = 2e-2  # of bf16
IN_INTEGERS = CodeFormat(4, torch.float16, has_offset=True)
IN_FP8 = CodeFormat(8, torch.bfloat16, 128)
DISASSEMBLER = Path(nvidia.__file__).parent / "bin" / "nvdisasm"


def built(one: Case, num_programs: int, **options: int) -> Step:
    schedule = schedules.build(one.plan, num_programs)
    return steps.build(one.weights, schedule, one.given.h_RD.device, **options)


def run_on_host(step: Step, one: Case, folder: Path) -> None:
    arguments = persistent.packed_arguments(step.buffers, one.given, step.numbers)
    cuda_on_host.run(step.sizes.function, arguments, len(step.buffers.steps), folder)


def compared(one: Case, before: list[Tensor]) -> None:
    """The logits of a step, and the keys and values of the first and the last layer and the hidden
    states after it, are as near to those in fp32 as those of the regions."""
    some = [0, 1, -2, -1]

    def results(case: Case) -> list[Tensor]:
        """Of the regions."""
        logits_RV, states = case.expected(), case.states()
        return [logits_RV, *(case.caches()[idx] for idx in some), states[0], states[-1]]

    caches = [one.caches()[idx].clone() for idx in some]
    found = [one.given.logits_RV, *caches, *one.weights.kept.values()]
    found += [found[-1]] * (len(one.weights.kept) == 1)  # of a single layer
    for cache, old in zip(one.caches(), before, strict=True):
        cache.copy_(old)
    exact, expected = results(one.exact()), results(one)
    errors = [
        (error(a.cpu(), c), error(b.cpu(), c))
        for a, b, c in zip(found, expected, exact, strict=True)
    ]
    assert all(own <= max(LIMIT, 1.2 * usual) for own, usual in errors), errors


@pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")
@pytest.mark.parametrize(
    "lens, shape, num_steps",
    [
        ((70,), Shape(layers=1), 2), ((1, 37), Shape(layers=1, heads=4), 1),
        ((40,), Shape(layers=1, heads=3, hidden=192), 1),
        ((3, 1, 9, 2, 35), Shape(layers=1, heads=1, hidden=64, ffn=3072), 1),
        ((40,), SMALL_EXPERTS._replace(heads=8), 1),
        ((3, 1, 20), SMALL_EXPERTS._replace(layers=1, experts=Experts(128, 3, 64, False)), 1),
        (((36, 37, 38), 39, (1, 2)), Shape(layers=2, heads=4, hidden=256), 1), ((40, 7), QWEN2, 1),
        ((40, 7), FP8_BLOCKS, 1), ((40,), FP8_ROWS._replace(layers=1), 1),
        ((40, 7), INT4, 1),
        ((1, 40), FP8_EXPERTS, 1), ((40,), INT4._replace(ffn=3072), 1),
        ((3, 40), FP8_BLOCKS._replace(layers=1, hidden=256, ffn=4608), 1),
    ],
)  # fmt: skip
def test_the_kernel_is_right_on_a_cpu(
    lens: tuple[int | tuple[int, ...], ...], shape: Shape, num_steps: int, tmp_path: Path
) -> None:
    """One row in two parts, in two steps: the words of the first are still there in the second. Two
    rows of one part each, with four queries a key. Three queries a key. Five rows with one query a
    key, whose MLP is wider than the columns that fit registers, by a part. Experts, of one row with
    eight queries a key, in two layers; and of three rows, whose weights do not sum to one. Several
    tokens of two requests, one of which has no earlier ones, and another request between them. A
    bias, without norms of queries and keys. Weights in fp8, in integers of 4 bits, and experts in
    fp8. Codes of an MLP of several chunks of columns, whose x is fetched once."""
    one = case(lens, shape)
    before = [cache.clone() for cache in one.caches()]
    step = built(one, 2)
    for _ in range(num_steps):
        one.given.logits_RV.zero_()
        run_on_host(step, one, tmp_path)
        step.check()
    compared(one, before)
    assert step.buffers.steps.tolist() == [num_steps] * 2


@pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")
def test_a_lost_result_ends_the_step_and_is_named(tmp_path: Path) -> None:
    """Later steps do nothing until the failure is cleared. On a busy machine results that are not
    lost may be waited for as long, and be named first: then again with more polls."""
    one = case((9,), Shape(layers=1))
    for max_polls in (8000, 40_000, 200_000):
        step = without_a_task(one, 2, max_polls=max_polls)
        run_on_host(step, one, tmp_path)
        with pytest.raises(steps.Stuck) as found:
            step.check()
        if is_named := "for inner of layer 0" in str(found.value):
            break
    assert is_named and "'product down of layer 0 " in str(found.value)
    ended = step.buffers.steps.clone()
    run_on_host(step, one, tmp_path)
    assert torch.equal(step.buffers.steps, ended)
    step.reset()
    step.check()


@pytest.mark.parametrize(
    "num_rows, hidden, heads, kv_heads, ffn, experts, codes",
    [
        (1, 1024, 16, 8, 3072, None, None), (4, 1024, 16, 8, 3072, None, None),
        (4, 2048, 16, 8, 6144, None, None), (1, 2560, 32, 8, 9728, None, None),
        (4, 2560, 32, 8, 9728, None, None), (4, 4096, 32, 8, 12288, None, None),
        (8, 4096, 32, 8, 12288, None, None), (4, 5120, 64, 8, 25600, None, None),
        (1, 2048, 32, 4, 6144, Experts(128, 8, 768, True), None),
        (4, 4096, 32, 8, 12288, None, IN_INTEGERS), (4, 4096, 32, 8, 12288, None, IN_FP8),
    ],
)  # fmt: skip
def test_the_kernel_compiles_and_its_numbers_fit_registers(
    num_rows: int, hidden: int, heads: int, kv_heads: int, ffn: int, experts: Experts | None,
    codes: CodeFormat | None, folder: Path,
) -> None:  # fmt: skip
    """Registers that do not fit are in local memory, which took a tenth of a step."""
    sizes = num_rows, hidden, heads, kv_heads, ffn, 151936, 28
    plan = Plan(*sizes, 1e-6, 0.1, {}, {}, experts)._replace(codes=codes)
    program = nvrtc.compile_function(schedules.build(plan, 132).sizes.function, (9, 0))
    assert program.startswith(b"\x7fELF") and b"persistent" in program
    (folder / "program.cubin").write_bytes(program)
    command = [str(DISASSEMBLER), "-c", str(folder / "program.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text.count("HMMA") > 20  # products
    assert len(re.findall(r"\bLDL\b", text)) <= 4


def without_a_task(one: Case, num_programs: int, max_polls: int) -> Step:
    """A step of which a program lacks its part of the MLP's first product."""
    schedule = schedules.build(one.plan, num_programs)
    programs = [list(tasks) for tasks in schedule.programs]
    del programs[1][[task.inputs[:1] for task in programs[1]].index(("gate_up",))]
    schedule = schedule._replace(programs=programs)
    return steps.build(one.weights, schedule, one.given.h_RD.device, max_polls=max_polls)


# on a GPU ---------------------------------------------------------------------------------------

QWEN3_06B = Shape(1024, 16, 8, 3072, 151936, 8)
QWEN3_8B = Shape(4096, 32, 8, 12288, 151936, 4)
QWEN25_7B = Shape(3584, 28, 4, 18944, 152064, 4, is_qwen2=True)
QWEN3_30B_A3B = Shape(2048, 32, 4, 6144, 151936, 4, Experts(128, 8, 768, True))


@pytest.fixture
def num_programs() -> int:
    try:
        return steps.num_programs(torch.device("cuda"))
    except Unfit as why:
        pytest.skip(str(why))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, lens",
    [
        (SMALL, (100,)), (SMALL, (1, 37, 2000)), (SMALL, (5,) * 8),
        (QWEN3_06B, (777,)), (QWEN3_06B, (1, 2, 40, 64, 65, 500, 1000, 1500)),
        (QWEN3_8B, (300,)), (QWEN3_8B, (1, 33, 1000, 70)),
        (QWEN3_30B_A3B, (300,)), (QWEN3_30B_A3B, (1, 500, 65, 70)),
        (QWEN3_06B, ((777, 778, 779, 780),)), (QWEN3_8B, (tuple(range(1000, 1008)),)),
        (QWEN3_8B, ((1, 2, 3, 4), (64, 65, 66, 67))),
        (QWEN25_7B, (300,)), (QWEN25_7B, (1, 65, 700)),
        (QWEN3_8B._replace(stored=FP8_BLOCKS.stored), (1, 33, 1000)),
        (QWEN3_8B._replace(stored=FP8_ROWS.stored), (300,)),
        (QWEN3_8B._replace(stored=INT4.stored), (300,)),
        (QWEN3_8B._replace(stored=INT4.stored), (1, 33, 1000, 70)),
        (QWEN3_30B_A3B._replace(stored=FP8_BLOCKS.stored), (300,)),
        (QWEN3_30B_A3B._replace(stored=FP8_BLOCKS.stored), (1, 500, 65, 70)),
    ],
)  # fmt: skip
def test_a_step_on_a_gpu_is_that_of_the_regions(
    shape: Shape, lens: tuple[int | tuple[int, ...], ...], num_programs: int
) -> None:
    """Logits, caches and what is kept; equal bits when the step is replayed."""
    one = case(lens, shape, "cuda")
    before = [cache.clone() for cache in one.caches()]
    step = built(one, num_programs)
    step.run(one.given)
    step.check()
    first = one.given.logits_RV.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(one.given)
    for _ in range(200):
        one.given.logits_RV.zero_()
        graph.replay()
        assert torch.equal(one.given.logits_RV, first)
    step.check()
    compared(one, before)


@pytest.mark.gpu
def test_a_lost_result_on_a_gpu_ends_the_step(num_programs: int) -> None:
    one = case((100,), SMALL, "cuda")
    step = without_a_task(one, 4, max_polls=1 << 16)
    step.run(one.given)
    with pytest.raises(steps.Stuck, match="inner of layer 0"):
        step.check()


@pytest.mark.gpu
def test_an_engine_with_the_option_answers(
    num_programs: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first tokens are those without it; later ones may differ, since sums are rounded."""
    changed = {"num_hidden_layers": 3, "vocab_size": 512, "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["Qwen3-0.6B"], **changed}))
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    caplog.set_level("INFO", "nanovllm.runner.persistent")
    answers = []
    for is_on in (False, True):
        llm = LLM(
            str(tmp_path), random_weights=True, skip_tokenizer_init=True, max_num_seqs=2,
            graph_batch_sizes=[2], max_model_len=256, max_num_batched_tokens=256,
            gpu_memory_utilization=0.3, tuning={"persistent_step": is_on},
        )  # fmt: skip
        with closing(llm):
            made = llm.generate(
                [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9]}], greedy
            )
        answers.append([one.outputs[0].token_ids for one in made])
    assert "a decode step of 2 row(s) is one kernel" in caplog.text
    assert [len(one) for one in answers[1]] == [64, 64]
    assert [one[:3] for one in answers[0]] == [one[:3] for one in answers[1]]
