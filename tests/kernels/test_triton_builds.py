"""Every Triton kernel compiles for the GPUs that we name and fits their shared memory.

No GPU is needed. `builds.py` has the table of GPUs, models and kernels, and compiles the kernels of
one GPU in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.builds import BETWEEN, FP8_TARGETS, TARGETS, fp8_models, is_of_segments

REPOSITORY = Path(__file__).parents[2]
NAMES = list(TARGETS)
Found = dict[str, dict[str, Any]]


def compile_all(target: str) -> Found:
    # an engine of another test stores kernels without the stages that these tests read
    unset = ("TRITON_INTERPRET", "TRITON_STORE_BINARY_ONLY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, str(Path(__file__).with_name("builds.py")), target]
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: Found = json.loads(done.stdout)
    return found


class Builds:
    """The kernels of one GPU; those of the next one are compiled at the same time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._futures: dict[str, Future[Found]] = {}

    def of(self, target: str) -> Found:
        following = NAMES[NAMES.index(target) :][:2]
        for name in following:
            if name not in self._futures:
                self._futures[name] = self._pool.submit(compile_all, name)
        return self._futures[target].result()


@pytest.fixture(scope="module")
def builds() -> Builds:
    return Builds()


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_and_fit_shared_memory(name: str, builds: Builds) -> None:
    target, found = TARGETS[name], builds.of(name)
    num_plain = len([kernel for kernel in found if not kernel.startswith("fp8 ")])
    assert num_plain >= (10 if name in BETWEEN else 20)
    too_large = {
        kernel: it["shared"] for kernel, it in found.items() if it["shared"] > target.shared_bytes
    }
    assert not too_large, f"more than {target.shared_bytes} bytes of shared memory: {too_large}"
    for kernel, it in found.items():
        marks = set(it["marks"])
        of_segments = is_of_segments(kernel)
        is_attention = ": decode" in kernel or ": prefill" in kernel or of_segments
        if (is_attention or ": group" in kernel) and "fp32" not in kernel:
            # a product that silently runs on the ordinary cores takes ten times as long
            assert bool(marks & {"mma.", "wgmma.", "mfma"}) == target.has_matrix_units, kernel
        assert not of_segments or not it.get("spills"), kernel
        assert ("wgmma." in marks) == (target.arch == 90) or not of_segments or "fp32" in kernel
        assert ("ex2.approx.ftz" in marks) == (
            target.backend == "cuda" and (is_attention or kernel.startswith("best_of_span"))
        )
        if target.arch == 75:
            assert not marks & {"bf16", "cp.async"}, kernel


@pytest.mark.parametrize("name", FP8_TARGETS)
def test_kernels_for_an_fp8_cache_convert_two_values_at_once_without_spills(
    name: str, builds: Builds
) -> None:
    found = {kernel: it for kernel, it in builds.of(name).items() if kernel.startswith("fp8 ")}
    assert len(found) == 3 * len(fp8_models(name)) + 2
    for kernel, it in found.items():
        is_fp32 = kernel.startswith("fp8 fp32")
        if ": prefill" not in kernel and not is_fp32:
            assert not it["spills"] and not it["byte loads"], (kernel, it)
        if ": decode" in kernel and not is_fp32:
            assert it["conversions"], (kernel, it)
