"""Tables of kernels from made-up events, bytes of real ops, and windows in a real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from nanovllm import LLM, SamplingParams
from nanovllm.tools.costs import cost
from nanovllm.tools.kernel_table import (
    MARK,
    Kernel,
    Launch,
    as_text,
    kernel_table,
    read_kernels,
    read_launches,
    short_name,
)
from nanovllm.tools.profile import OpBytes, profile_decode
from tests.engines import assert_all_free, random_prompts

STEP = [
    ("norm", 0.0, 2.0),
    ("linear", 2.0, 4.0),
    ("linear", 5.0, 8.0),
    ("norm", 14.0, 2.0),
    ("copy", 17.0, 1.0),
]
KNOWN = [
    Launch("norm", "rms_norm", 20),
    Launch("linear", "linear 4×8", 4000),
    Launch("linear", "linear 8×4", 16000),
    Launch("norm", "rms_norm", 20),
]


def steps(num: int, every_us: float = 20.0) -> list[Kernel]:
    return [
        Kernel(name, idx * every_us + start, length)
        for idx in range(num)
        for name, start, length in STEP
    ]


def test_the_table_is_per_step_and_by_op() -> None:
    table = kernel_table(steps(3), KNOWN, 3, bandwidth=4e9)
    rows = {(row["kernel"], row["op"]): row for row in table["kernels"]}
    assert list(rows) == [
        ("linear", "linear 8×4"),
        ("linear", "linear 4×8"),
        ("norm", "rms_norm"),
        ("copy", ""),
    ]
    assert [row["launches"] for row in table["kernels"]] == [1, 1, 2, 1]
    # the second product starts 1 µs before the first is over
    assert [row["us"] for row in table["kernels"]] == [7, 4, 4, 1]
    assert [row["duration_us"] for row in table["kernels"]] == [8, 4, 4, 1]
    assert [row["bytes"] for row in table["kernels"]] == [16000, 4000, 40, None]
    # 4e9 bytes a second are 4000 in a microsecond
    assert [row["bandwidth_share"] for row in table["kernels"]] == [
        round(4 / 7, 4),
        0.25,
        0.0025,
        None,
    ]
    assert rows["copy", ""]["share"] == pytest.approx(3 / 58, abs=1e-4)
    assert table["bytes"] == 20040 and table["steps"] == 3


def test_busy_time_counts_overlap_once_and_gaps_not_at_all() -> None:
    """A step of 18 µs is busy at 0-13, 14-16 and 17-18 µs; the products overlap by 1 µs."""
    table = kernel_table(steps(2), KNOWN, 2, bandwidth=1e9)
    assert table["span_us"] == 38 / 2
    assert table["busy_share"] == pytest.approx(2 * 16 / 38, abs=1e-4)
    assert table["largest_gap_us"] == 2.0
    within = [Kernel("long", 0.0, 10.0), Kernel("short", 2.0, 3.0), Kernel("next", 10.5, 1.0)]
    nested = kernel_table(within, [], 1, bandwidth=1e9)
    assert (
        nested["busy_share"] == pytest.approx(11 / 11.5, abs=1e-4)
        and nested["largest_gap_us"] == 0.5
    )
    assert {row["kernel"]: row["us"] for row in nested["kernels"]} == {
        "short": 5,
        "long": 5,
        "next": 1,
    }


def test_a_kernel_that_waits_for_the_one_before_it_is_given_the_time_after_that() -> None:
    """A kernel with programmatic dependent launch starts early and mostly waits."""
    chain = [
        Kernel("a", 0.0, 10.0),
        Kernel("b", 3.0, 9.0),
        Kernel("c", 11.0, 3.0),
        Kernel("d", 16.0, 2.0),
    ]
    table = kernel_table(chain, [Launch("b", "linear", 8000)], 1, bandwidth=4e9)
    rows = {row["kernel"]: row for row in table["kernels"]}
    assert {name: row["us"] for name, row in rows.items()} == {"a": 10, "b": 2, "c": 2, "d": 2}
    assert {name: row["duration_us"] for name, row in rows.items()} == {
        "a": 10,
        "b": 9,
        "c": 3,
        "d": 2,
    }
    assert rows["b"]["bandwidth_share"] == 1.0, "8000 bytes in 2 µs"
    assert sum(row["share"] for row in rows.values()) == pytest.approx(
        table["busy_share"], abs=1e-3
    )
    assert table["largest_gap_us"] == 2.0 and table["span_us"] == 18


def test_rows_and_idle_time_add_up_to_the_span() -> None:
    random = Random(7)
    for num in (1, 2, 19, 99):
        kernels = [
            Kernel(random.choice("abc"), random.randrange(2 * num), random.randint(1, 5))
            for _ in range(num)
        ]
        kernels.sort(key=lambda kernel: kernel.start_us)
        table = kernel_table(kernels, [], 1, bandwidth=1e9)
        busy = {
            us
            for kernel in kernels
            for us in range(int(kernel.start_us), int(kernel.start_us + kernel.duration_us))
        }
        assert sum(row["us"] for row in table["kernels"]) == len(busy)
        assert table["busy_share"] == round(len(busy) / table["span_us"], 4)


def test_bytes_are_left_out_where_the_launches_do_not_agree() -> None:
    more = sorted([*steps(2), Kernel("norm", 18.5, 1.0)], key=lambda kernel: kernel.start_us)
    rows = {
        row["kernel"]: row
        for row in kernel_table(more, KNOWN, 2, bandwidth=1e9)["kernels"]
        if row["op"] == ""
    }
    assert rows["norm"]["bytes"] is None and rows["norm"]["launches"] == 2.5
    with pytest.raises(ValueError, match="the trace has no kernels"):
        kernel_table([], KNOWN, 1, bandwidth=1e9)


def test_kernels_belong_to_the_op_that_launched_them() -> None:
    def mark(idx: int, start: float, end: float) -> dict[str, Any]:
        name = f"{MARK}{idx}"
        return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "args": {}}

    def launched(
        correlation: int, time_us: float, name: str, start: float, length: float
    ) -> list[dict[str, Any]]:
        args = {"correlation": correlation}
        return [
            {"cat": "kernel", "name": name, "ts": start, "dur": length, "args": args},
            {"cat": "driver", "name": "launch", "ts": time_us, "dur": 1.0, "args": args},
        ]

    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        mark(1, 20.0, 30.0),
        mark(0, 0.0, 10.0),
        {**mark(0, 100.0, 110.0), "cat": "gpu_user_annotation"},
        *launched(2, 21.0, "void at::native::reduce<float, 4>(float*)", 110.0, 2.0),
        *launched(1, 5.0, "split(int)", 100.0, 7.0),
        *launched(3, 25.0, "merge", 113.0, 5.0),
        *launched(4, 15.0, "triton_poi_fused_0", 119.0, 1.0),
    ]
    assert read_launches(events, [("one", 100), ("two", 200)]) == [
        Launch("split", "one", 100),
        Launch("native::reduce", "two", 0),
        Launch("merge", "two", 200),
    ]
    assert [kernel.name for kernel in read_kernels(events)] == [
        "split",
        "native::reduce",
        "merge",
        "triton_poi_fused_0",
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_split_kernel", "_split_kernel"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"),
        ("void at::native::(anonymous namespace)::copy<float, 4>(int, float*)", "native::copy"),
        (
            "std::enable_if<!(T7), void>::type internal::gemvx::kernel<int, bool>(int)",
            "gemvx::kernel",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop>(cutlass_80_tensorop::Params)",
            "cutlass::Kernel2",
        ),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_bytes_of_ops() -> None:
    """Rows with 5 and 30 tokens in blocks of 16; R 2, heads 4 and 2 of 8, fp32."""
    from nanovllm.kernels import ops

    cache = torch.zeros(2, 10, 16, 2, 8)
    table_RP, slot_R = torch.ones(2, 4, dtype=torch.int32), torch.tensor([16, 17])
    q_RNH, length_R, start_S = (
        torch.randn(2, 4, 8),
        torch.ones(2, dtype=torch.int32),
        torch.tensor([0, 1, 2]).int(),
    )
    attention = (q_RNH, cache[0], cache[1], table_RP, length_R, start_S, 1, 1.0)
    with OpBytes([5, 30]) as mode:
        ops.paged_attention(*attention, 0)
        ops.paged_attention(*attention, 16)
        ops.qk_norm_rope_store(
            torch.randn(2, 64),
            None,
            None,
            torch.randn(99, 8),
            slot_R,
            slot_R,
            cache[0],
            cache[1],
            4,
            0.0,
        )
        ops.linear(torch.randn(2, 64), torch.randn(32, 64), None)
        ops.linear_(torch.randn(2, 32), torch.randn(2, 64), torch.randn(32, 64), None)
        torch.randn(2, 64) @ torch.randn(64, 32)
        torch.nn.functional.embedding(slot_R, torch.randn(100, 64))
    found = {name: num for name, num in mode.ops if not name.startswith("randn")}
    both = [num for name, num in mode.ops if name == "paged_attention"]
    assert both == [2 * 35 * 2 * 8 * 4 + 2 * q_RNH.nbytes, 2 * 21 * 2 * 8 * 4 + 2 * q_RNH.nbytes]
    assert found["qk_norm_rope_store"] == 2 * 64 * 4 + 2 * 8 * 4 + 2 * 32 * 4 + 2 * 2 * 2 * 8 * 4
    assert found["linear 32×64"] == found["mm 64×32"] == 4 * (2 * 64 + 32 * 64 + 2 * 32)
    assert found["linear_ 32×64"] == 4 * (2 * 64 + 32 * 64 + 2 * 2 * 32), (
        "what is added onto is read and written"
    )
    assert found["embedding 100×64"] == 2 * 2 * 64 * 4


@pytest.fixture
def ops_as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops on the host stand for kernels on a device."""
    monkeypatch.setattr("nanovllm.tools.kernel_table.DEVICE_WORK", ("cpu_op",))


def test_windows_at_several_batch_sizes(
    make_llm: Callable[..., LLM], ops_as_kernels: None, tmp_path: Path
) -> None:
    llm = make_llm(graph_batch_sizes=(1, 4, 8), max_num_seqs=8)
    prompts = random_prompts([5, 19, 40, 7, 9, 11, 33, 99], seed=120)
    params = [
        SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
        for num in (20, 21, 22, 22, 23, 31, 32, 45)
    ]
    plain = llm.generate(prompts[-1], params[-1], use_tqdm=False)[0]["token_ids"]
    reports = profile_decode(
        llm.engine,
        prompts,
        params,
        tmp_path,
        activities=[ProfilerActivity.CPU],
        bandwidth=1e9,
        num_steps=4,
    )
    assert_all_free(llm)
    first, *reports = reports
    assert first["prompt_tokens"] == sum(map(len, prompts)) and first["steps"] == 1
    layers = [row for row in first["kernels"] if row["kernel"] == "nanovllm::paged_attention"]
    assert [row["launches"] for row in layers] == [2] and "prompts of 223 tokens" in as_text(first)
    assert json.loads((tmp_path / "kernels_prefill.json").read_text()) == first
    assert [report["rows"] for report in reports] == [8, 4, 1]
    for report in reports:
        assert report["steps"] == 4 and 0 < report["busy_share"] <= 1
        rows = report["rows"]
        attention = [
            row for row in report["kernels"] if row["kernel"] == "nanovllm::paged_attention"
        ]
        assert [row["launches"] for row in attention] == [2], "one for each layer"
        assert (tmp_path / f"trace_bs{rows}.json.gz").stat().st_size > 0
        assert json.loads((tmp_path / f"kernels_bs{rows}.json").read_text()) == report
        assert f"{rows} rows" in as_text(report) and "paged_attention" in as_text(report)
    assert llm.generate(prompts[-1], params[-1], use_tqdm=False)[0]["token_ids"] == plain


@pytest.mark.parametrize("takes_rows", [False, True])
def test_the_step_op_by_op_touches_no_request(
    takes_rows: bool, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm()
    (prompt,) = random_prompts([21], seed=121)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"]
    found: list[int] = []
    for piece in llm.stream(prompt, params):
        found += piece["token_ids"]
        mode = OpBytes([len(found)])
        rows = [request.row for request in llm.engine.scheduler.running if takes_rows]
        llm.engine.runner.decode_uncaptured(1, mode, rows)
        assert any(name == "paged_attention" for name, _ in mode.ops)
    assert found == expected


def test_bytes_of_packed_experts_are_those_of_the_chosen() -> None:
    """Codes, scales and offsets of two of four experts; flops are those of their numbers."""
    code, scale = torch.zeros(4, 32, 32, dtype=torch.uint8), torch.zeros(4, 32, 2)
    down, down_scale = torch.zeros(4, 64, 8, dtype=torch.uint8), torch.zeros(4, 64, 1)
    x, weight = torch.zeros(1, 64), torch.ones(1, 2)
    expert = torch.tensor([[3, 1]], dtype=torch.int32)
    args = (
        x, weight, expert, code, scale, scale.clone(), None, 4, 32,
        down, down_scale, None, None, 4, 16,
    )  # fmt: skip
    num_bytes, flops = cost(torch.ops.nanovllm.packed_experts.default, args, {}, x.clone())
    stacks = (code, scale, scale, down, down_scale)
    matrices = sum(2 * one[0].nbytes for one in stacks)
    assert num_bytes == matrices + 2 * x.nbytes + weight.nbytes + expert.nbytes
    assert flops == 2 * 2 * (32 * 64 + 64 * 16)
