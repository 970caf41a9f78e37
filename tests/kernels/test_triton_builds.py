"""Every Triton kernel compiles for the GPUs we name, at its production constants, within their shared memory.

Needs no GPU. `builds.py` has the table of GPUs, models and kernels, and compiles one GPU's in a process of its own.
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

from tests.kernels.builds import TARGETS

REPOSITORY = Path(__file__).parents[2]
NAMES = list(TARGETS)
Found = dict[str, dict[str, Any]]


def compile_all(target: str) -> Found:
    # an engine that another test has made stores kernels without the stages that are looked at here
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
    """One GPU's kernels, while the next one's are compiled beside."""

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
    assert len(found) >= 20
    too_large = {
        kernel: it["shared"] for kernel, it in found.items() if it["shared"] > target.shared_bytes
    }
    assert not too_large, f"more than {target.shared_bytes} bytes of shared memory: {too_large}"
    for kernel, it in found.items():
        marks = set(it["marks"])
        is_attention = ": decode" in kernel or ": prefill" in kernel
        if is_attention and "fp32" not in kernel:
            # a product that silently falls to the ordinary cores costs ten times
            assert bool(marks & {"mma.", "wgmma.", "mfma"}) == target.has_matrix_units, kernel
        assert ("ex2.approx.ftz" in marks) == (
            target.backend == "cuda" and (is_attention or kernel == "best_of_span")
        )
        if target.arch == 75:
            assert not marks & {"bf16", "cp.async"}, kernel
