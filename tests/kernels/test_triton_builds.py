"""Every Triton kernel compiles for the GPUs that we name and fits their shared memory.

No GPU is needed. `builds.py` has the table of GPUs, models and kernels, and `compile_builds.py`
compiles them in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.builds import (
    BETWEEN,
    FP8_TARGETS,
    TARGETS,
    WHOLE,
    fp8_cases,
    is_of_hopper,
    is_of_latents,
    is_of_segments,
    is_ordered,
    is_packed,
)

REPOSITORY = Path(__file__).parents[2]
Found = dict[str, dict[str, Any]]


class Builds:
    """The kernels of each GPU, from a process that goes on to the next one meanwhile."""

    def __init__(self) -> None:
        # an engine of another test stores kernels without the stages that these tests read
        unset = ("TRITON_INTERPRET", "TRITON_STORE_BINARY_ONLY")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment["PYTHONPATH"] = str(REPOSITORY)
        command = [sys.executable, str(Path(__file__).with_name("compile_builds.py")), *TARGETS]
        self._process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        self._found: dict[str, Found | str] = {}

    def of(self, target: str) -> Found:
        assert self._process.stdout is not None
        while target not in self._found:
            name, found = json.loads(self._process.stdout.readline())
            self._found[name] = found
        found = self._found[target]
        assert not isinstance(found, str), found
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    builds = Builds()
    yield builds
    builds.close()


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_and_fit_shared_memory(name: str, builds: Builds) -> None:
    target, found = TARGETS[name], builds.of(name)
    num_plain = len([kernel for kernel in found if not kernel.startswith("fp8 ")])
    assert num_plain >= (9 if name in BETWEEN else 20)
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
        assert not (of_segments or is_of_latents(kernel)) or not it.get("stack bytes"), kernel
        assert ("wgmma." in marks) == (target.arch == 90) or not of_segments or "fp32" in kernel
        assert ("ex2.approx.ftz" in marks) == (
            target.backend == "cuda"
            and (is_attention or ": merge" in kernel or kernel.startswith("best_of_span"))
        )
        if target.arch == 75:
            assert not marks & {"bf16", "cp.async"}, kernel


def test_the_prefill_kernel_for_hopper_overlaps_products_without_spills(builds: Builds) -> None:
    found = {kernel: it for kernel, it in builds.of(WHOLE).items() if is_of_hopper(kernel)}
    assert len(found) == 3
    for kernel, it in found.items():
        assert {"wgmma.", "cp.async"} <= set(it["marks"]), kernel
        assert not it["stack bytes"], kernel
        # each of the two groups of warps has six: at its first and last tile, and two a loop
        assert it["waits"] == 12, kernel


@pytest.mark.parametrize("name", FP8_TARGETS)
def test_kernels_for_an_fp8_cache_convert_two_values_at_once_without_spills(
    name: str, builds: Builds
) -> None:
    found = {kernel: it for kernel, it in builds.of(name).items() if kernel.startswith("fp8 ")}
    cases = [sizes for several in fp8_cases(name).values() for sizes in several]
    assert len(found) == sum(map(len, cases)) + 2
    for kernel, it in found.items():
        is_fp32 = kernel.startswith("fp8 fp32")
        if ": prefill" not in kernel and not is_fp32:
            assert not it["stack bytes"] and not it["byte loads"], (kernel, it)
        if ": decode" in kernel and not is_fp32:
            assert it["conversions"], (kernel, it)


@pytest.mark.parametrize("name", ["t4", "a100", WHOLE, "b200", "mi300"])
def test_products_with_packed_weights_use_the_matrix_units_without_spills(
    name: str, builds: Builds
) -> None:
    found = {kernel: it for kernel, it in builds.of(name).items() if is_packed(kernel)}
    assert len(found) == (11 if name == WHOLE else 4 if TARGETS[name].has_matrix_units else 1)
    for kernel, it in found.items():
        has_rows = " 1x" not in kernel and "dequantize" not in kernel
        assert bool(set(it["marks"]) & {"mma.", "wgmma.", "mfma", "tcgen05"}) == has_rows, kernel
        # the sums of 256 rows take the registers, and what follows the loop uses the stack
        assert it.get("stack bytes", 0) <= (64 if " 256x" in kernel else 0), (kernel, it)
        assert not it.get("byte loads"), (kernel, it)


def test_ordered_kernels_have_one_kind_of_product_and_no_spills(builds: Builds) -> None:
    """Every tile multiplies by warpgroups: one row and many have the same instruction."""
    found = {kernel: it for kernel, it in builds.of(WHOLE).items() if is_ordered(kernel)}
    assert len(found) == 13
    for kernel, it in found.items():
        assert {"wgmma.", "cp.async"} <= set(it["marks"]) - {"mma.sync"} == set(it["marks"]), kernel
        assert not it["stack bytes"], kernel
