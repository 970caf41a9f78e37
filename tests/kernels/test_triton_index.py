"""kernels/README.md says what is registered and what can be launched."""

from __future__ import annotations

import torch

from nanovllm.kernels import ops
from nanovllm.platforms.mps import MpsPlatform
from tests.kernels import kernel_index


def test_the_index_is_what_the_registrations_give() -> None:
    assert kernel_index.PAGE.read_text(encoding="utf-8") == kernel_index.page()


def test_each_op_lists_the_kernels_that_its_function_launches() -> None:
    listed = {name: set(kernels) for name, kernels in kernel_index.CHOSEN.items()}
    found = {
        name: set(kernel_index.launched(kernel)) for name, kernel in kernel_index.TRITON.items()
    }
    assert listed == found


def test_every_kernel_is_launched_for_an_op() -> None:
    assert kernel_index.defined() == kernel_index.all_launched()


def test_the_tables_are_all_that_is_registered() -> None:
    tables = (kernel_index.TRITON, kernel_index.CPU, kernel_index.npu_kernels.IN_GRAPH)
    for table in tables:
        assert set(table) <= set(kernel_index.all_ops())
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in kernel_index.FOLDER.rglob("*.py")
    )
    assert source.count("ops.register_kernels(") == source.count(", KERNELS)") == 11


def test_passes_exist_and_name_their_ops() -> None:
    folder = kernel_index.FOLDER.parent / "compile" / "passes"
    fused = ("fused_linear", "fused_packed_linear", "fused_fp8_linear")
    products = {"linear_": ".in_place"} | dict.fromkeys(fused, ".fused")
    for name, file in kernel_index.PASSES.items():
        text = (folder / f"{file}.py").read_text(encoding="utf-8")
        assert products.get(name, f"ops.{name}") in text, name


def test_an_apple_gpu_runs_plain_torch() -> None:
    platform = MpsPlatform(torch.device("cpu"))
    assert platform.passes(True) == ()
    assert ops.kernel_of(ops.linear, "MPS") is None
