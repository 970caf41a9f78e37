"""A second start compiles nothing and imports no compiler; a damaged store gives right tokens."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanovllm import LLM, EngineConfig
from nanovllm.compile.program import CompileRequired
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.startup.compile_farm import farm as compile_farm
from nanovllm.startup.compile_farm.farm import CompileFarm, WorkerFailed
from nanovllm.startup.compile_farm.tasks import BuildOutcome
from tests.conftest import save_tiny
from tests.engines import copy_kernels
from tests.startup.starts import Ended, Starts, one_anew

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_model_len": 64, "max_num_seqs": 4, "graph_batch_sizes": [1, 4],
    "num_kvcache_blocks": 20, "max_num_batched_tokens": 64,
}  # fmt: skip


class Filled(NamedTuple):
    """A store after a cold start, and the result of that start."""

    folder: Path
    cold: dict[str, Any]


def variables(compiler: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHINDUCTOR", "TRITON"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CXX": str(compiler)}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C++ compiler that does not optimise: it takes a quarter of the time."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    script.chmod(0o700)
    return script


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, compiler: Path) -> Iterator[Starts]:
    starts = Starts(tmp_path_factory.mktemp("starts"), variables(compiler))
    yield starts
    starts.close()


def arguments(model: Path, store: Path | None, **options: Any) -> list[str]:
    chosen = {**OPTIONS, **options, **({"compile_cache": str(store)} if store else {})}
    return [str(model), json.dumps(chosen)]


def read(ended: Ended) -> tuple[dict[str, Any], str]:
    assert ended.returncode == 0, ended.err
    return json.loads(ended.out), ended.err


def start(
    starts: Starts,
    model: Path,
    store: Path | None,
    environment: dict[str, str] | None = None,
    *,
    compiles: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """The result of a start, and what it said. With `compiles` the compilers are imported."""
    chosen = arguments(model, store, **options)
    return read(starts.wait(starts.begin(chosen, environment or {}, compiles=compiles)))


def start_anew(
    model: Path, store: Path, compiler: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The result of a start in a process that has imported nothing."""
    return read(one_anew(arguments(model, store), {**variables(compiler), **(environment or {})}))[
        0
    ]


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_qwen3: Path,
    compiler: Path,
    instruction_sets: Path,
) -> Filled:
    folder = tmp_path_factory.mktemp("warm") / "store"
    folder.mkdir(mode=0o700)
    shutil.copytree(instruction_sets, folder / "inductor")
    cold = start_anew(tiny_qwen3, folder, compiler)
    assert cold["compiled"] > 0 and cold["loaded"] == 0 and cold["kernels"] == ["kernels", "step"]
    return Filled(folder, cold)


@pytest.fixture
def store(filled: Filled, cpu_kernels: Path, tmp_path: Path) -> Path:
    """A copy of the filled store for a test to damage. It also has the kernels as the compiler of
    this process makes them."""
    folder = tmp_path / "store"
    shutil.copytree(filled.folder, folder)
    copy_kernels(cpu_kernels, folder)
    return folder


def assert_warm(warm: dict[str, Any], cold: dict[str, Any]) -> None:
    assert warm["tokens"] == cold["tokens"]
    assert (warm["compiled"], warm["loaded"]) == (0, cold["compiled"])
    assert warm["kernels"] == [] and warm["counters"] == {}
    assert warm["modules"] == []


def test_a_warm_start_compiles_nothing_and_gives_the_same_tokens(
    filled: Filled, tiny_qwen3: Path, tmp_path: Path, compiler: Path, starts: Starts
) -> None:
    folder, cold = filled
    # another home, another folder, other variables
    environment = {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "NOISE": "1",
        "OMP_NUM_THREADS": "2",
    }
    assert_warm(start_anew(tiny_qwen3, folder, compiler, environment), cold)
    environment = {"NANOVLLM_CACHE": str(folder)}
    assert_warm(start(starts, tiny_qwen3, None, environment, compile_cache_mode="require")[0], cold)


def test_another_checkpoint_of_the_same_shape_is_warm(
    filled: Filled, tmp_path: Path, starts: Starts
) -> None:
    folder, cold = filled
    other = save_tiny(
        tmp_path / "other", num_hidden_layers=3, rope_theta=5000.0, max_position_embeddings=256
    )
    warm, _ = start(starts, other, folder, compile_cache_mode="require")
    assert (warm["compiled"], warm["kernels"]) == (0, []) and warm["tokens"] != cold["tokens"]
    assert warm["loaded"] == cold["compiled"]


def spoil(paths: Iterator[Path]) -> None:
    for path in paths:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("part", ["entries", "objects", "cpp"])
def test_with_a_truncated_store_tokens_are_right_and_it_is_mended(
    store: Path, filled: Filled, tiny_qwen3: Path, part: str, starts: Starts
) -> None:
    spoil((store / part).iterdir())
    again, err = start(starts, tiny_qwen3, store, compiles=part != "cpp")
    assert again["tokens"] == filled.cold["tokens"]
    assert "again" in err and "Traceback" not in err
    assert_warm(start(starts, tiny_qwen3, store)[0], filled.cold)


def test_two_starts_may_fill_a_store_at_once(
    store: Path, filled: Filled, tiny_qwen3: Path, starts: Starts
) -> None:
    for part in ("entries", "objects"):
        shutil.rmtree(store / part)
    both = [starts.begin(arguments(tiny_qwen3, store), {}, compiles=True) for _ in range(2)]
    for begun in both:
        assert read(starts.wait(begun))[0]["tokens"] == filled.cold["tokens"]
    assert_warm(start(starts, tiny_qwen3, store)[0], filled.cold)


def test_where_nothing_can_be_written_the_engine_runs(
    filled: Filled, tiny_qwen3: Path, starts: Starts
) -> None:
    nowhere = Path("/proc/nowhere")
    cold, err = start(starts, tiny_qwen3, nowhere, compiles=True, graph_batch_sizes=[4])
    assert cold["tokens"] == filled.cold["tokens"]
    assert err.count("compiled code is not kept") == 1 and "compile_cache" in err


# In "require" mode --------------------------------------------------------------------------------


def test_require_lists_every_program_that_is_missing(store: Path, tiny_qwen3: Path) -> None:
    options = {**OPTIONS, "graph_batch_sizes": [1, 3, 4]}
    with pytest.raises(
        CompileRequired,
        match=r"(?s)4 program\(s\) are not in .*begin_3: .*layer_decode_3_3_window0: ",
    ):
        LLM(str(tiny_qwen3), **options, compile_cache=store, compile_cache_mode="require")


def test_require_names_the_ingredient_that_differs(
    store: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(CompileRequired, match=r"begin_1: torch: 9\.9\.9 is wanted, .* is stored"):
        LLM(str(tiny_qwen3), **OPTIONS, compile_cache=store, compile_cache_mode="require")


def test_require_needs_a_store_and_graphs(tmp_path: Path, tiny_qwen3: Path, store: Path) -> None:
    with pytest.raises(ValueError, match=f"'require', but {tmp_path}/none is not a store"):
        LLM(
            str(tiny_qwen3),
            **OPTIONS,
            compile_cache=tmp_path / "none",
            compile_cache_mode="require",
        )
    with pytest.raises(ValueError, match="'require' needs enforce_eager=False"):
        LLM(
            str(tiny_qwen3),
            **OPTIONS,
            compile_cache=store,
            compile_cache_mode="require",
            enforce_eager=True,
        )
    with pytest.raises(
        ValueError, match="compile_cache_mode is 'always': it must be one of auto, require"
    ):
        EngineConfig("tiny-qwen3", compile_cache_mode="always")
    with pytest.raises(ValueError, match="compile_cache is 3: it must be a folder's path"):
        EngineConfig("tiny-qwen3", compile_cache=3)  # type: ignore[arg-type]


def test_require_does_not_compile_libraries_either(
    store: Path, tiny_qwen3: Path, starts: Starts
) -> None:
    shutil.rmtree(store / "cpp")
    chosen = arguments(tiny_qwen3, store, compile_cache_mode="require")
    ended = starts.wait(starts.begin(chosen, {}))
    assert ended.returncode and "CompileRequired" in ended.err
    assert "kernels.cpp has no usable library" in ended.err and not list(store.glob("cpp/*"))


def test_a_store_that_others_can_write_is_refused(store: Path, tiny_qwen3: Path) -> None:
    (store / "objects").chmod(0o777)
    with pytest.raises(ValueError, match=r"objects is for compiled code, .* its mode is 777"):
        LLM(str(tiny_qwen3), **OPTIONS, compile_cache=store)


# Filling a store in advance -----------------------------------------------------------------------


# the compiler with which `bare_store` was made
USUAL = {"CXX": os.environ.get("CXX", "")}


def precompile(starts: Starts, model: Path, folder: Path, bare: Path, batch_sizes: str) -> Ended:
    """Fill the store `folder` with `bare` as the model: a copy of the model without weights."""
    bare.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", bare)
    command = [
        "scripts/precompile.py", "--model", str(bare), "--bs", *batch_sizes.split(),
        "--out", str(folder), "--jobs", "2", "--device", "cpu", "--max-model-len", "64",
        "--max-num-seqs", "4", "--max-num-batched-tokens", "64",
    ]  # fmt: skip
    return starts.wait(starts.begin(command, USUAL))


def test_precompile_reads_no_weights_and_leaves_nothing_to_compile(
    filled: Filled, bare_store: Path, tiny_qwen3: Path, tmp_path: Path, starts: Starts
) -> None:
    done = precompile(starts, tiny_qwen3, bare_store, tmp_path / "bare", "1 4")
    assert done.returncode == 0, done.err
    assert "3 buckets, " in done.out
    warm, _ = start(starts, tiny_qwen3, bare_store, USUAL, compile_cache_mode="require")
    assert_warm(warm, filled.cold)
    refused = precompile(starts, tiny_qwen3, bare_store, tmp_path / "bare", "0 4")
    assert refused.returncode == 2 and "graph_batch_sizes is [0, 4]" in refused.err


def test_a_model_with_sparse_and_dense_layers_starts_warm(
    bare_store: Path, tmp_path: Path, starts: Starts
) -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = save_tiny(
        tmp_path / "moe", "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1], **sizes
    )
    done = precompile(starts, model, bare_store, tmp_path / "bare", "1 4")
    assert done.returncode == 0, done.err
    # each bucket has programs for layers of both kinds
    warm, _ = start(starts, model, bare_store, USUAL, compile_cache_mode="require")
    assert (warm["compiled"], warm["kernels"], warm["modules"]) == (0, [], [])
    assert warm["loaded"] > 0
    eager, _ = start(starts, model, bare_store, USUAL, enforce_eager=True)
    assert warm["tokens"] == eager["tokens"] and eager["loaded"] == 0


def test_a_worker_that_fails_is_reported_with_what_it_said(
    bare_store: Path, tiny_qwen3: Path
) -> None:
    config = EngineConfig(str(tiny_qwen3), **OPTIONS, compile_cache=bare_store)
    farm = CompileFarm(config)
    farm.build([("decode", -1)], 1)
    with pytest.raises(WorkerFailed, match="Error"):
        farm.wait(lambda outcome: None)
    farm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_worker_that_is_killed_is_missed_but_not_waited_for(
    store: Path, tiny_qwen3: Path
) -> None:
    config = EngineConfig(str(tiny_qwen3), **OPTIONS, compile_cache=store)
    farm = CompileFarm(config)
    farm.start_workers(3)
    forked = farm._workers
    assert len(forked) == 3
    parent = forked[0].parent
    assert {process.parent for process in forked} == {parent}
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while len(forks := children.read_text().split()) < 3:
        assert parent.poll() is None
        time.sleep(0.05)
    forked[1].next_answer()  # it is ready; it dies before it gets a bucket
    os.kill(int(forks[1]), signal.SIGKILL)
    farm.build([("decode", 4), ("prefill", 64)], 2)
    outcomes: list[BuildOutcome] = []
    with pytest.raises(WorkerFailed, match="it exited without output"):
        farm.wait(outcomes.append)
    assert {outcome.bucket for outcome in outcomes} == {("decode", 4), ("prefill", 64)}, (
        "the other one did both"
    )
    assert parent.returncode == 0, "the third was not needed, and all have ended"
    idle = CompileFarm(config)
    idle.start_workers(2)
    idle.close()
    assert idle._workers[0].parent.returncode == -signal.SIGKILL


def test_the_log_says_what_workers_did_and_how_long_it_took(
    store: Path, tiny_qwen3: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG")
    for part in ("entries", "objects"):
        shutil.rmtree(store / part)
    config = EngineConfig(str(tiny_qwen3), **OPTIONS, compile_cache=store)
    with caplog.at_level(logging.DEBUG, "nanovllm.startup.compile_farm.farm"):
        farm = CompileFarm(config)
        farm.build([("decode", 4), ("decode", 1)], 1)
        outcomes = farm.wait(lambda outcome: None)
    farm.close()
    assert [outcome.bucket for outcome in outcomes] == [("decode", 4), ("decode", 1)]
    assert all(0 < outcome.seconds < 300 for outcome in outcomes)
    text = caplog.text
    assert re.search(r"worker 0, [\d.]+ s: is ready: imports [\d.]+, device [\d.]+ s\n", text)
    assert re.search(r"worker 0, .*Outcome\(bucket=\('decode', 4\), .*seconds=", text)
    assert re.search(r"worker 0, .*compiled begin_4 in ", text), "what the process wrote itself"


def test_a_cold_start_with_workers_builds_nothing_itself(
    filled: Filled, tiny_qwen3: Path, bare_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes fill the store while this one reads weights, as on a GPU."""
    asked: list[tuple[int, int]] = []

    def two(self: Any, bytes_each: int, bytes_own: int) -> int:
        asked.append((bytes_each, bytes_own))
        return 2

    monkeypatch.setattr(CpuPlatform, "compile_workers", two)
    for num_starts in (1, 2):
        llm = LLM(str(tiny_qwen3), **OPTIONS, compile_cache=bare_store)
        compiler = llm.engine.runner.compiler
        assert (compiler.num_compiled, compiler.num_loaded) == (0, filled.cold["compiled"])
        # with an empty store twice: before the model's size is known, and after
        assert len(asked) == num_starts + 1
    assert asked[0] == (0, 0) and asked[1][0] > 1 << 30
    # the second start finds everything and starts no process
    for name in ("ForkServer", "spawn"):
        monkeypatch.setattr(compile_farm, name, lambda *_: pytest.fail("a process was started"))
    LLM(str(tiny_qwen3), **OPTIONS, compile_cache=bare_store)
    assert len(asked) == 4
