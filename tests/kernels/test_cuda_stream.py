"""Products whose packed weights stream through shared memory: the formula, and compiled."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import nvrtc, packed_stream
from nanovllm.kernels.cuda.packed_stream import Form, _Operands
from tests.kernels import cuda_on_host
from tests.kernels.test_cuda_packed import (
    DTYPE,
    EPS,
    KINDS,
    LIMIT,
    error,
    folder,
    random_codes,
    real,
)

__all__ = ["folder"]  # a fixture
# tiles for several turns of each program, and depths that end within a stage and a warp's part
SIZES = ((4864, 4096), (48, 2304), (8448, 2048), (320, 12288))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("kind, group, dtype", [one for one in KINDS if one[1] in (0, 128)])
def test_each_form_of_codes_matches_the_formula(
    kind: str, group: int, dtype: torch.dtype, num_rows: int
) -> None:
    """With and without the neighbours, and equal bits when it is repeated."""
    if not packed_stream.is_supported(torch.device("cuda")):
        pytest.skip("the copy unit is that of sm_90 on")
    taken = 0
    for num_lines, depth in SIZES:
        codes = random_codes(kind, group, dtype, (num_lines, depth), "cuda")
        x_TD = torch.randn(num_rows, depth + 8, device="cuda").to(DTYPE)[:, :depth]
        if not packed_stream.fits(x_TD, codes):
            continue
        taken += 1
        bias_O = torch.randn(num_lines, device="cuda").to(DTYPE)
        weight_OD = real(codes, depth)
        silu, norm = bool(taken % 2), bool((taken + num_rows) % 3)
        num_outs = num_lines // 2 if silu else num_lines
        residual_TO = torch.randn(num_rows, num_outs, device="cuda").to(DTYPE)
        norm_D = (torch.rand(depth, device="cuda") + 0.5).to(DTYPE) if norm else None
        given = {
            "norm_D": norm_D, "eps": EPS, "bias_O": bias_O, "residual_TO": residual_TO,
            "silu_mul": silu,
        }  # fmt: skip
        y_TO = packed_stream.packed_stream(x_TD, codes, **given)
        exact_TD = x_TD.double()
        if norm_D is not None:
            exact_TD *= torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + EPS)
            exact_TD *= norm_D.double()
        exact_TO = exact_TD @ weight_OD.T + bias_O.double()
        exact_TO = reference.norm_act.silu_mul(exact_TO) if silu else exact_TO
        assert error(y_TO, exact_TO + residual_TO.double()) < LIMIT
        assert torch.equal(packed_stream.packed_stream(x_TD, codes, **given), y_TO)
    assert taken >= 2


@pytest.mark.gpu
def test_a_chain_of_products_waits_for_each_result() -> None:
    """Programs of the next product start before the last one has ended."""
    if not packed_stream.is_supported(torch.device("cuda")):
        pytest.skip("the copy unit is that of sm_90 on")
    chain = [random_codes(*KINDS[0], (2048, 2048), "cuda") for _ in range(8)]
    first = torch.randn(1, 2048, device="cuda").to(DTYPE)
    norm_D = torch.ones(2048, device="cuda", dtype=DTYPE)

    def run(waits: bool) -> torch.Tensor:
        x = first
        for codes in chain:
            x = packed_stream.packed_stream(x, codes, norm_D=norm_D, eps=EPS, residual_TO=x)
            if waits:
                torch.cuda.synchronize()
        return x

    expected = run(True)
    assert all(torch.equal(run(False), expected) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("kind, group, dtype", [KINDS[0], KINDS[-2], KINDS[-1]])
def test_the_experts_of_a_token_match_the_formula(
    kind: str, group: int, dtype: torch.dtype
) -> None:
    num_experts, size, hidden, top_k = 16, 1536, 2048, 6
    if not packed_stream.is_supported(torch.device("cuda")):
        pytest.skip("the copy unit is that of sm_90 on")
    gate_up = random_codes(kind, group, dtype, (num_experts, 2 * size, hidden), "cuda")
    down = random_codes(kind, group, dtype, (num_experts, hidden, size), "cuda")
    logits = torch.randn(1, num_experts, device="cuda")
    weight_1K, expert_1K = reference.experts.topk_softmax(logits, top_k, True)
    x_1D, residual_1D = torch.randn(2, 1, hidden, device="cuda").to(DTYPE)
    assert packed_stream.fits_experts(x_1D, 1, gate_up)
    assert packed_stream.fits_experts(x_1D, top_k, down)
    inner_KF = packed_stream.packed_stream_experts(x_1D, gate_up, expert_1K, silu_mul=True)
    chosen = real(gate_up, hidden)[expert_1K[0].long()]
    exact = reference.norm_act.silu_mul(torch.einsum("d,kod->ko", x_1D[0].double(), chosen))
    assert error(inner_KF, exact) < LIMIT
    y_1D = packed_stream.packed_stream_experts(
        inner_KF, down, expert_1K, factor_1K=weight_1K, residual_1O=residual_1D
    )
    exact = torch.einsum("kf,kof->ko", inner_KF.double(), real(down, size)[expert_1K[0].long()])
    exact = (exact * weight_1K.double().T).sum(0, keepdim=True) + residual_1D.double()
    assert error(y_1D, exact) < LIMIT


def run_on_host(form: Form, operands: _Operands, folder: Path) -> None:
    code = operands.codes.code
    num_bytes = code.shape[-1]
    code_map = struct.pack("3Q104x", code.data_ptr(), num_bytes, code.numel() // num_bytes)
    arguments = packed_stream.arguments(form, operands, code_map)
    cuda_on_host.run(packed_stream.function_of(form, operands), arguments, 2, folder)


@pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")
@pytest.mark.parametrize("i", [0, 1, 2])
def test_the_arithmetic_is_right_on_a_cpu(i: int, tmp_path: Path) -> None:
    """One row with its norm and SiLU; three with a bias and a residual, in fp8 by rows, whose
    depth ends within a stage; and nine with their norms, of two tiles in fp16."""
    kind, group, dtype = (KINDS[0], KINDS[-1], KINDS[0])[i]
    depth, num_rows, num_lines = ((2048, 1, 64), (1152, 3, 64), (2048, 9, 32))[i]
    codes = random_codes(kind, group, dtype, (num_lines, depth), "cpu")
    x_TD = torch.randn(num_rows, depth + 8).to(DTYPE)[:, :depth]
    exact_TD = x_TD.double()
    if i != 1:
        norm_D = (torch.rand(depth) + 0.5).to(DTYPE)
        out_TO = torch.empty(num_rows, num_lines // 2, dtype=DTYPE)
        operands = _Operands(x_TD, codes, out_TO, norm_D, eps=EPS, silu_mul=True)
        exact_TD = exact_TD * torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + EPS)
        exact_TO = reference.norm_act.silu_mul((exact_TD * norm_D.double()) @ real(codes, depth).T)
    else:
        bias_O, residual_TO = torch.randn(64).to(DTYPE), torch.randn(3, 64).to(DTYPE)
        out_TO = torch.empty(3, 64, dtype=DTYPE)
        operands = _Operands(x_TD, codes, out_TO, bias=bias_O, residual=residual_TO)
        exact_TO = exact_TD @ real(codes, depth).T + bias_O.double() + residual_TO.double()
    run_on_host(packed_stream.form_of(num_rows, codes), operands, tmp_path)
    assert error(out_TO, exact_TO) < LIMIT


@pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no g++")
@pytest.mark.parametrize("kind, group, dtype", [KINDS[0], KINDS[-2]])
def test_the_arithmetic_of_experts_is_right_on_a_cpu(
    kind: str, group: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The sum over two experts of four; fp8 in blocks has scales between pieces of 16 bytes."""
    down = random_codes(kind, group, dtype, (4, 128, 768), "cpu")
    inner_KF, residual_1D = torch.randn(2, 768).to(DTYPE), torch.randn(1, 128).to(DTYPE)
    expert_1K, weight_1K = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([[0.75, 0.25]])
    out_1D = torch.empty(1, 128, dtype=DTYPE)
    operands = _Operands(
        inner_KF, down, out_1D, residual=residual_1D, expert=expert_1K, factor=weight_1K, top_k=2
    )
    run_on_host(Form(2, 2, down.is_fp8), operands, tmp_path)
    products = torch.einsum("kf,kof->ko", inner_KF.double(), real(down, 768)[[3, 1]])
    exact_1D = (products * weight_1K.double().T).sum(0, keepdim=True) + residual_1D.double()
    assert error(out_1D, exact_1D) < LIMIT


@pytest.mark.parametrize("i", range(4))
def test_the_kernel_compiles(i: int, folder: Path) -> None:
    """With a program of the next kernel beside it, so within half of the registers."""
    kind, group, dtype = (KINDS[0], KINDS[3], KINDS[4], KINDS[-2])[i]
    codes = random_codes(kind, group, dtype, (256, 2048), "meta")
    x_1D = torch.empty(1, 2048, dtype=DTYPE)
    operands = _Operands(x_1D, codes, x_1D, norm=x_1D[0] if i < 2 else None, silu_mul=i % 2 == 0)
    function = packed_stream.function_of(packed_stream.form_of(1, codes), operands)
    program = nvrtc.compile_function(function, (9, 0))
    assert program.startswith(b"\x7fELF") and b"packed_stream" in program


def test_rings_fit_half_of_the_shared_memory() -> None:
    for kind, num_lines, depth in (("4", 24576, 4096), ("8", 4096, 12288), ("fp8", 6144, 4096)):
        codes = random_codes(kind, 128, torch.float32, (num_lines, depth), "meta")
        ring = packed_stream.rings(packed_stream.form_of(1, codes), codes)
        assert packed_stream.MIN_STAGES <= ring.num_stages <= packed_stream.MAX_STAGES
        assert ring.num_stages * packed_stream.STAGE_BYTES < ring.shared_bytes
        assert ring.shared_bytes <= packed_stream.HALF_SHARED_BYTES
    deep = random_codes("4", 32, torch.float32, (4096, 65536), "meta")
    assert packed_stream.rings(packed_stream.form_of(1, deep), deep).num_stages == 0
