"""Tasks run in order, every kernel is compiled once, and no worker waits for one that died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm import EngineConfig
from nanovllm.startup.compile_farm.farm import CompileFarm, WorkerFailed
from nanovllm.startup.compile_farm.tasks import Bucket, BuildOutcome, Task, TaskQueue
from nanovllm.startup.compile_farm.worker_handle import ANSWER, WorkerProcess

ROOT = Path(__file__).parents[2]


def test_tasks_are_taken_in_order_and_end_once_nothing_can_follow() -> None:
    tasks = TaskQueue([Task((0, 1), "dry_run", "b"), Task((0, 0), "dry_run", "a")])
    first, second = tasks.take(), tasks.take()
    assert first and second and (first.what, second.what) == ("a", "b")
    late: list[Task | None] = []
    waiting = threading.Thread(target=lambda: late.extend([tasks.take(), tasks.take()]))
    waiting.start()
    tasks.done(first)
    waiting.join(0.05)
    assert waiting.is_alive(), "the second worker may still add tasks"
    tasks.done(second, Task((1, -5), "compile", "short"), Task((1, -9), "compile", "long"))
    waiting.join(60)
    assert [task and task.what for task in late] == ["long", "short"]
    assert tasks.take() is None, "a free worker does not wait for kernels that others compile"


# A process that prints its requests to stderr, finds kernels in buckets, and dies on "deadly". It
# hangs on a bucket of 99 rows and cannot dry-run one of 13. Its imports print as well.
STUB = f"""
import json, os, sys, time
print("Welcome to an import!")
print("{ANSWER}" + json.dumps({{"imports": 0.5}}), flush=True)
for line in sys.stdin:
    verb, what = json.loads(line)
    print("ASKED", line.strip(), file=sys.stderr, flush=True)
    if what == "deadly":
        print("no memory", file=sys.stderr, flush=True)
        os._exit(1)
    if what[1] == 99:
        time.sleep(600)
    kernels = {{"shared": 7, f"own of {{what[1]}}": what[1]}}
    if what[1] == 32:
        kernels["deadly"] = 99
    problem = "TypeError: no call list" if what[1] == 13 else None
    found = {{"numbers": [4, 0, 0, 0.2], "kernels": kernels, "problem": problem}}
    found["has_run"] = verb == "run" or what[1] == 13
    answer = 0.1 if verb == "compile" else found
    print("{ANSWER}" + json.dumps(answer), flush=True)
"""


def stub() -> WorkerProcess:
    pipe = subprocess.PIPE
    started: Any = subprocess.Popen(
        [sys.executable, "-c", STUB], stdin=pipe, stdout=pipe, stderr=pipe
    )
    ends = [started.stdin, started.stdout, started.stderr]
    process = WorkerProcess(started, *(os.dup(end.fileno()) for end in ends))
    for end in ends:
        end.close()
    return process


def farm_of(
    workers: list[WorkerProcess], buckets: list[Bucket], count: int, *, dry_run: bool = False
) -> CompileFarm:
    """A farm at work, in which `workers` were started early."""
    farm = CompileFarm(EngineConfig("tiny-qwen3"))
    farm._workers += workers
    farm.build(buckets, count, dry_run=dry_run)
    return farm


def asked(caplog: pytest.LogCaptureFixture, count: int) -> list[Any]:
    """The requests that stubs printed: at least `count`, whose last lines come with a delay."""
    deadline = time.monotonic() + 60
    while True:
        lines = [line for line in caplog.text.splitlines() if "ASKED" in line]
        if len(lines) >= count or time.monotonic() > deadline:
            return [json.loads(line.partition("ASKED ")[2]) for line in lines]
        time.sleep(0.01)


def test_every_kernel_is_compiled_once_the_longest_first(caplog: pytest.LogCaptureFixture) -> None:
    processes = [stub()]
    buckets = [("decode", 4), ("decode", 1), ("prefill", 16)]
    with caplog.at_level("DEBUG", "nanovllm.startup.compile_farm.farm"):
        farm = farm_of(processes, buckets, 1, dry_run=True)
        outcomes = farm.wait(lambda outcome: None)
        farm.close()
    assert outcomes == [BuildOutcome(bucket, 4, 0, 0, 0.2) for bucket in buckets]
    kernels = ["own of 16", "shared", "own of 4", "own of 1"]
    expected = [["dry_run", list(bucket)] for bucket in buckets] + [
        ["compile", kernel] for kernel in kernels
    ]
    assert asked(caplog, len(expected)) == expected


def test_one_that_dies_costs_its_task_alone(caplog: pytest.LogCaptureFixture) -> None:
    processes = [stub() for _ in range(3)]
    buckets = [("decode", size) for size in (32, 16, 8, 4, 2, 1)]
    with caplog.at_level("DEBUG", "nanovllm.startup.compile_farm.farm"):
        farm = farm_of(processes, buckets, 3, dry_run=True)
        with pytest.raises(WorkerFailed, match="no memory"):
            farm.wait(lambda outcome: None)
        farm.close()
    count = 2 * len(buckets) + len(["shared", "deadly"])
    compiled = [what for verb, what in asked(caplog, count) if verb == "compile"]
    assert sorted(compiled) == sorted(
        ["shared", "deadly", *(f"own of {size}" for _, size in buckets)]
    )


def test_what_cannot_be_dry_run_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    buckets = [("decode", size) for size in (13, 13, 4)]
    with caplog.at_level("WARNING", "nanovllm.startup.compile_farm.farm"):
        farm = farm_of([stub(), stub()], buckets, 2, dry_run=True)
        farm.wait(lambda outcome: None)
        farm.close()
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and "decode 13 cannot be dry-run and is run: TypeError: no call list" in caplog.text
    )


@pytest.mark.parametrize(
    ("rows", "dry_run", "waits"), [(4, True, False), (13, True, True), (4, False, True)]
)
def test_the_end_of_a_process_is_waited_for_where_it_used_the_device(
    rows: int, dry_run: bool, waits: bool
) -> None:
    process = stub()
    farm = farm_of([process], [("decode", rows)], 1, dry_run=dry_run)
    farm.wait(lambda outcome: None)
    assert (process.parent.returncode == 0) == waits
    farm.close()
    assert process.parent.returncode is not None


def test_one_that_never_answers_is_given_up_and_what_it_did_is_named() -> None:
    processes = [stub(), stub()]
    farm = farm_of(processes, [("decode", 99), ("decode", 1)], 2, dry_run=True)
    with pytest.raises(WorkerFailed, match=r"no answer; still at work: dry_run decode 99$"):
        farm.wait(lambda outcome: None, patience_s=8)  # for the other one to start
    assert all(process.parent.returncode is not None for process in processes)


def test_without_dry_runs_buckets_are_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "nanovllm.startup.compile_farm.farm"):
        farm = farm_of([stub()], [("decode", 4)], 1)
        farm.wait(lambda outcome: None)
        farm.close()
    assert asked(caplog, 1)[0] == ["run", ["decode", 4]]


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What dry_runs.py found for each case."""
    folder = tmp_path_factory.mktemp("dry_runs")
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(ROOT),
        "NANOVLLM_CACHE": str(folder / "other"),
    }
    script = Path(__file__).with_name("dry_runs.py")
    done = subprocess.run(
        [
            sys.executable,
            script,
            folder,
            "qwen3_vl",
            "mixtral",
            "mixtral:2",
            "mixtral:int4",
            "mixtral:ordered",
            "qwen3:adapters",
            "qwen3:ngram",
            "qwen3:eagle3",
            "qwen3:dflash",
            "qwen3:gguf",
            "qwen3:pools",
            "bert:pools",
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
@pytest.mark.parametrize(
    ("architecture", "num_programs", "own_kernels"),
    [("qwen3_vl", [7, 5, 3, 4, 4, 4], {"prefill_hopper_kernel"}),
     ("mixtral", [5, 4, 4],
      {"norm_router_topk_kernel", "topk_softmax_kernel", "sort_pairs_kernel",
       "grouped_gemm_kernel"})],
)  # fmt: skip
def test_launches_of_a_dry_run_ask_for_the_kernels_that_real_ones_need(
    architecture: str, num_programs: list[int], own_kernels: set[str], dry_runs: dict[str, Any]
) -> None:
    """Prefill steps with images have two programs more: one for embeddings and positions, and one
    that adds features."""
    found = dry_runs[architecture]
    assert isinstance(found, dict), found
    assert found["problems"] == [None] * len(num_programs)
    # five programs for each prefill bucket, four for each decode bucket. The first three of six
    # share the head for 48 rows, the first two the sampler of rows that have fed several tokens.
    assert [programs for programs, *_ in found["numbers"]] == num_programs
    assert all(kernels == 0 for *_, kernels in found["numbers"]) and found["compiled_before"] == 0
    assert set(found["names"]) >= {
        "decode_kernel", "prefill_kernel", "skinny_gemm_kernel", "split_k_gemm_kernel",
        "advance_kernel", "best_of_span_kernel", "qk_norm_rope_store_kernel",
        "apply_top_k_top_p_kernel",
        *own_kernels,
    }  # fmt: skip
    has_images = "prefill_hopper_kernel" in found["names"]
    longest = "prefill_hopper_kernel" if has_images else "apply_top_k_top_p_kernel"
    assert found["longest"] == longest, (
        "these kernels are short, but the functions that they inline or hand to warps are long"
    )
    assert found["files"] == [".cubin", ".json", ".source"], (
        "the other stages, which only people read, are not stored"
    )
    assert found["assembled"] == ["advance_kernel"], "dry_runs.py shortens the other compiles"
    assert found["compiled"] == found["requests"], "no two requests name one kernel"
    assert found["launchers"] == found["requests"], "launchers are built in advance as well"
    assert found["compiled_after_launches"] == found["compiled"] < found["launches"], (
        "launches find their kernels"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
def test_launches_of_offloaded_experts_are_found_by_a_dry_run(dry_runs: dict[str, Any]) -> None:
    found = dry_runs["mixtral:2"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    assert set(found["names"]) >= {
        "fetch_plan_kernel", "stream_plan_kernel", "copy_kernel", "grouped_gemm_kernel",
        "moe_gemv_gate_up_kernel", "moe_gemv_down_kernel",
    }  # fmt: skip
    assert found["compiled_after_launches"] == found["compiled"] == found["requests"]


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
def test_products_of_quantized_weights_are_found_by_a_dry_run(dry_runs: dict[str, Any]) -> None:
    found = dry_runs["mixtral:int4"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    assert {"packed_linear.cu", "packed_wgmma.cu", "gather_kernel"} <= set(found["names"])
    assert found["in_cuda"] == found["requests"] - found["compiled"] > 3


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
def test_a_packed_table_of_tokens_needs_no_inductor(dry_runs: dict[str, Any]) -> None:
    """A program of Inductor cannot be dry-run, so each bucket would be run, at each start."""
    found = dry_runs["qwen3:gguf"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    assert "packed_lookup_kernel" in found["names"]
    assert found["compiled_after_launches"] == found["compiled"]


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
def test_launches_of_deterministic_engines_are_found_by_a_dry_run(dry_runs: dict[str, Any]) -> None:
    found = dry_runs["mixtral:ordered"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    ordered = {"ordered_gemm_kernel", "ordered_attention_kernel"}
    plain = {"decode_kernel", "prefill_kernel", "skinny_gemm_kernel", "moe_gemv_down_kernel"}
    assert set(found["names"]) & (ordered | plain) == ordered
    assert found["compiled_after_launches"] == found["compiled"] == found["requests"]


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
def test_steps_with_adapters_are_dry_run_with_and_without_slots(dry_runs: dict[str, Any]) -> None:
    found = dry_runs["qwen3:adapters"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    assert set(found["names"]) >= {"lora_row_kernel", "lora_expand_kernel", "gemv_kernel"}
    assert found["compiled_after_launches"] == found["compiled"] == found["requests"]


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
@pytest.mark.parametrize(
    ("method", "num_programs", "kernels"),
    [("ngram", 5, {"ngram_propose_kernel"}),
     ("eagle3", 9, {"next_tokens_kernel", "draft_inputs_kernel", "rms_norm_each_kernel"}),
     ("dflash", 8, {"draft_inputs_kernel"})],
)  # fmt: skip
def test_steps_with_drafts_are_dry_run(
    method: str, num_programs: int, kernels: set[str], dry_runs: dict[str, Any]
) -> None:
    """So no program of theirs needs Inductor. A prompt's step with a head has more programs: the
    places of what it has fed, and what stores that in the head's cache."""
    found = dry_runs[f"qwen3:{method}"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None, None, None]
    assert found["numbers"][0][0] == num_programs
    (plan,) = found["plans"]  # of the decode step as one kernel
    assert (plan["num_rows"], plan["num_heads"], plan["codes"]) == (1, 4, None)
    assert set(found["names"]) >= {"span_inputs_kernel", "accept_kernel", *kernels}
    assert found["compiled_after_launches"] == found["compiled"] == found["requests"]


@pytest.mark.skipif(sys.platform != "linux", reason="as Triton")
@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [("qwen3", {"prefill_hopper_kernel", "qk_norm_rope_store_kernel", "rms_norm_kernel"}),
     ("bert", {"varlen_attention_kernel", "layer_norm_kernel"})],
)  # fmt: skip
def test_steps_of_models_that_pool_are_dry_run(
    architecture: str, kernels: set[str], dry_runs: dict[str, Any]
) -> None:
    found = dry_runs[f"{architecture}:pools"]
    assert isinstance(found, dict), found
    assert found["problems"] == [None] and set(found["names"]) >= kernels
    assert found["compiled_after_launches"] == found["compiled"] == found["requests"]
