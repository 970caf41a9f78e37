"""Products, norms and SiLU on a CPU agree with `reference/` at odd sizes and read only memory that
they own; their library loads, and they are the kernels of the ops."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import attention as cpu_attention
from nanovllm.kernels.cpu import build as cpp_build
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import linear as cpu_linear
from nanovllm.kernels.cpu import norm_act as cpu_norm_act
from nanovllm.kernels.cpu import register as cpu_register
from tests.kernels.cpu_cases import (
    DTYPES,
    NEEDS_COMPILER,
    assert_close_to_reference,
    assert_matches,
    attention_case,
    one_thread,
)

__all__ = ["one_thread"]  # a fixture
pytestmark = NEEDS_COMPILER


def test_an_uncovered_dtype_goes_to_the_reference() -> None:
    case = attention_case([19], [1], dtype=torch.float64)
    assert torch.equal(
        cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case)
    )
    x_TD, weight_OD = (
        torch.randn(3, 19, dtype=torch.float64),
        torch.randn(5, 19, dtype=torch.float64),
    )
    assert torch.equal(cpu_linear.linear(x_TD, weight_OD, None), x_TD @ weight_OD.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (19, 99), (99, 19), (989, 131), (64, 128), (300, 1024)], ids=str
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.usefixtures("one_thread")
def test_linear_matches_reference_at_every_number_of_tokens(
    dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    num_outputs, depth = shape
    weight_OD = torch.randn(num_outputs, depth, generator=generator).to(dtype)
    bias_O = torch.randn(num_outputs, generator=generator).to(dtype) if has_bias else None
    for num_tokens in (*range(18), 31, 33, 48, 65, 131):
        x_TD = torch.randn(num_tokens, depth, generator=generator).to(dtype)
        out_TO = cpu_linear.linear(x_TD, weight_OD, bias_O)
        expected = torch.nn.functional.linear(
            x_TD.double(), weight_OD.double(), None if bias_O is None else bias_O.double()
        )
        if num_tokens == 0:
            assert out_TO.shape == (0, num_outputs)
        else:
            assert_matches(out_TO, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (19, 99), (99, 19), (989, 131), (64, 128), (300, 1024)], ids=str
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.usefixtures("one_thread")
def test_linear_int8_matches_reference_at_every_number_of_tokens(
    dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    num_outputs, depth = shape
    weight_OD = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    weight_OD[0, 0], weight_OD[-1, -1] = 127, -127
    scale_O = torch.rand(num_outputs, generator=generator) / 100
    bias_O = torch.randn(num_outputs, generator=generator).to(dtype) if has_bias else None
    for num_tokens in (*range(1, 18), 24, 25, 32, 33, 48, 65, 131):
        x_TD = torch.randn(num_tokens, depth, generator=generator).to(dtype)
        residual_TO = torch.randn(num_tokens, num_outputs, generator=generator).to(dtype)
        expected = (x_TD.double() @ weight_OD.double().T) * scale_O
        expected = (expected if bias_O is None else expected + bias_O.double()).to(dtype)
        assert_matches(reference.linear.linear_int8(x_TD, weight_OD, scale_O, bias_O), expected)
        out_TO = cpu_linear.linear_int8(x_TD, weight_OD, scale_O, bias_O)
        assert_matches(out_TO, expected)
        total_TO = out_TO + residual_TO
        assert torch.equal(
            cpu_linear.linear_int8(x_TD, weight_OD, scale_O, bias_O, residual_TO), total_TO
        )
    empty = cpu_linear.linear_int8(torch.empty(0, depth, dtype=dtype), weight_OD, scale_O, bias_O)
    assert empty.shape == (0, num_outputs) and empty.dtype is dtype


def test_linear_int8_takes_views_and_is_the_same_on_any_number_of_threads() -> None:
    num_threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (1, 16, 40):
            wide_TD = torch.full((num_tokens + 1, 300), float("nan"))
            wide_TD[:num_tokens, 1:278] = torch.randn(num_tokens, 277)
            x_TD, weight_OD = (
                wide_TD.to(dtype)[:num_tokens, 1:278],
                torch.randint(-127, 128, (992, 300)),
            )
            weight_OD, scale_O = weight_OD.to(torch.int8)[1:990, 5:282], torch.rand(989) / 100
            expected = reference.linear.linear_int8(x_TD, weight_OD, scale_O, None)
            results = []
            try:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(cpu_linear.linear_int8(x_TD, weight_OD, scale_O, None))
            finally:
                torch.set_num_threads(num_threads)
            assert_matches(results[0], expected)
            assert all(torch.equal(results[0], other) for other in results[1:])
            transposed_DO = weight_OD.T.contiguous()
            assert_matches(cpu_linear.linear_int8(x_TD, transposed_DO.T, scale_O, None), expected)
            transposed_DT = x_TD.T.contiguous()
            assert_matches(
                cpu_linear.linear_int8(transposed_DT.T, weight_OD, scale_O, None), expected
            )
    half = torch.randn(3, 277, dtype=torch.float16)
    out_TO = cpu_linear.linear_int8(half, weight_OD, scale_O, None)
    assert torch.equal(out_TO, reference.linear.linear_int8(half, weight_OD, scale_O, None))


def test_linear_and_the_row_kernels_give_the_same_on_any_number_of_threads() -> None:
    weight_OD, gate_up_TG, weight_D = torch.randn(989, 200), torch.randn(300, 400), torch.randn(400)
    num_threads = torch.get_num_threads()
    for num_tokens in (1, 16, 99):
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                x_TD = gate_up_TG[:num_tokens, :200]
                results.append(
                    (
                        cpu_linear.linear(x_TD, weight_OD, None),
                        cpu_norm_act.silu_mul(gate_up_TG),
                        cpu_norm_act.rms_norm(gate_up_TG, weight_D, 1e-6),
                    )
                )
        finally:
            torch.set_num_threads(num_threads)
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others))


def test_linear_takes_views_and_never_reads_beyond_them() -> None:
    nan = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (3, 40):
            x_TD, weight_OD = torch.full((num_tokens + 1, 99), nan), torch.full((30, 99), nan)
            x_TD[:num_tokens, :77], weight_OD[1:20, :77] = (
                torch.randn(num_tokens, 77),
                torch.randn(19, 77),
            )
            x_TD, weight_OD = x_TD.to(dtype)[:num_tokens, :77], weight_OD.to(dtype)[1:20, :77]
            expected = torch.nn.functional.linear(x_TD.double(), weight_OD.double()).to(dtype)
            assert_matches(cpu_linear.linear(x_TD, weight_OD, None), expected)
            transposed_DT = x_TD.T.contiguous()
            assert_matches(cpu_linear.linear(transposed_DT.T, weight_OD, None), expected)
            assert_matches(cpu_linear.linear(x_TD, weight_OD.T.contiguous().T, None), expected)


def test_nan_and_infinity_pass_through_linear() -> None:
    weight_OD = torch.randn(7, 33)
    weight_OD[2, 5], weight_OD[4, 32] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (1, 5, 40):
            out_TO = cpu_linear.linear(
                torch.ones(num_tokens, 33, dtype=dtype), weight_OD.to(dtype), None
            )
            assert out_TO[:, 2].isnan().all() and out_TO[:, 4].isposinf().all()
            assert out_TO[:, [0, 1, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (19, 99), (99, 1024), (3, 2, 989), (0, 64)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_norms_and_silu_match_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x_TD, residual_TD = (torch.randn(2, *shape, generator=generator) * 3).to(dtype)
    weight_D = torch.randn(shape[-1], generator=generator).to(dtype)
    assert_close_to_reference(
        cpu_norm_act.rms_norm(x_TD, weight_D, 1e-6),
        reference.norm_act.rms_norm(x_TD, weight_D, 1e-6),
    )
    out, expected = (
        m.add_rms_norm(x_TD, residual_TD, weight_D, 1e-6)
        for m in (cpu_norm_act, reference.norm_act)
    )
    assert_close_to_reference(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    gate_up_TG = torch.cat((x_TD * 10, residual_TD), dim=-1)
    assert_close_to_reference(
        cpu_norm_act.silu_mul(gate_up_TG), reference.norm_act.silu_mul(gate_up_TG)
    )
    strided_TG = torch.cat((gate_up_TG, gate_up_TG), dim=-1)[..., : 2 * shape[-1]]
    assert_close_to_reference(
        cpu_norm_act.silu_mul(strided_TG), reference.norm_act.silu_mul(gate_up_TG)
    )
    transposed_TD = x_TD.transpose(0, -1).contiguous().transpose(0, -1)
    assert_close_to_reference(
        cpu_norm_act.rms_norm(transposed_TD, weight_D, 1e-6),
        reference.norm_act.rms_norm(x_TD, weight_D, 1e-6),
    )


@pytest.mark.parametrize("x", [-1e30, -200.0, -90.0, 0.0, 90.0, 1e30])
def test_silu_of_extreme_values_is_finite(x: float) -> None:
    gate_up_TG = torch.full((1, 34), x)
    gate_up_TG[:, 17:] = 1.0
    torch.testing.assert_close(
        cpu_norm_act.silu_mul(gate_up_TG),
        reference.norm_act.silu_mul(gate_up_TG),
        rtol=1e-5,
        atol=1e-8,
    )


def test_without_a_compiler_available_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        cpp_build._LibraryState, "settings", cpp_build.LibraryOptions(tmp_path, "no-such-compiler")
    )
    monkeypatch.setattr(cpu_library, "load", cpu_library.load.__wrapped__)
    is_available, reason = cpu_library.available.__wrapped__()
    assert not is_available
    assert reason == (
        "RuntimeError: kernels.cpp cannot be compiled: no C++ compiler is found (no-such-compiler)"
    )


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ("void* out; const float* x; int64_t num_rows; double eps;", ""),
        ("void* x; void* out; int64_t num_rows; double eps;", "packs Args::out as P at byte 0"),
        ("void* out; int64_t x; int64_t num_rows; double eps;", "packs Args::x as P at byte 8"),
        ("void* out; void* x; int32_t num_rows; double eps;", "packs Args::num_rows as q"),
        ("void* out; void* x; int64_t num_rows; float eps;", "packs Args::eps as d at byte 24"),
        ("void* out; void* x; int64_t num_rows; double eps; int64_t n;", "Python packs 32 bytes"),
        ("void* out; void* x; int64_t num_tokens; double eps;", "num_rows"),
    ],
)
def test_a_library_loads_only_if_its_structs_have_the_fields_that_python_packs(
    fields: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpp_build._LibraryState, "settings", cpp_build.LibraryOptions(tmp_path))
    source = tmp_path / "source.cpp"
    source.write_text(f"#include <cstdint>\nnamespace {{ struct Args {{ {fields} }}; }}\n")
    args = cpp_build.ArgumentStruct("Args", pointers="out x", integers="num_rows", floats="eps")
    assert args.pack(1, 2, 3, 0.5) == struct.pack("@2P q d", 1, 2, 3, 0.5)
    if error:
        with pytest.raises(RuntimeError, match=error):
            cpp_build.load(source, [args])
    else:
        cpp_build.load(source, [args])


def test_registering_makes_them_the_kernels_of_the_ops_and_may_be_repeated() -> None:
    cpu_register.register()
    cpu_register.register()
    case = attention_case([19, 99], [1, 1])
    assert torch.equal(ops.paged_attention(*case), cpu_attention.paged_attention(*case))
    x_TD, weight_OD = torch.randn(3, 99), torch.randn(19, 99)
    assert torch.equal(ops.linear(x_TD, weight_OD, None), cpu_linear.linear(x_TD, weight_OD, None))


def test_linear_traces_with_its_shape() -> None:
    def forward(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        return ops.linear(x_TD, weight_OD, None) + 1

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    x_TD, weight_OD = torch.randn(3, 99), torch.randn(19, 99)
    assert_matches(compiled(x_TD, weight_OD), forward(x_TD, weight_OD))
