"""The fused product matches the formula in fp64 at odd sizes and rounds as the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
EPS = 1e-6


def fused_linear(*args: object) -> Tensor:
    from nanovllm.kernels.triton import linear as triton_linear

    return triton_linear.fused_linear(*args)


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm())


def check(
    num_rows: int,
    num_outs: int,
    depth: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    bias: bool = False,
    silu: bool = False,
    residual: bool = False,
    run: Callable[..., Tensor] = fused_linear,
) -> None:
    """y = silu_mul(rms_norm(x) · weightᵀ + bias) + residual in fp64."""
    x_TD = torch.randn(num_rows, depth, device=device).to(dtype)
    norm_D = (torch.rand(depth, device=device) + 0.5).to(dtype) if norm else None
    rows = 2 * num_outs if silu else num_outs
    weight_OD = (torch.randn(rows, depth, device=device) / depth**0.5).to(dtype)
    bias_O = torch.randn(rows, device=device).to(dtype) if bias else None
    residual_TO = torch.randn(num_rows, num_outs, device=device).to(dtype) if residual else None
    y_TO = run(x_TD, norm_D, weight_OD, bias_O, residual_TO, EPS, silu)
    exact_TD = x_TD.double()
    if norm_D is not None:
        exact_TD = (
            exact_TD * torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + EPS) * norm_D.double()
        )
    exact_TO = exact_TD @ weight_OD.double().T + (0 if bias_O is None else bias_O.double())
    exact_TO = reference.norm_act.silu_mul(exact_TO) if silu else exact_TO
    exact_TO = exact_TO if residual_TO is None else exact_TO + residual_TO.double()
    expected_TO = reference.linear.fused_linear(
        x_TD, norm_D, weight_OD, bias_O, residual_TO, EPS, silu
    )
    assert y_TO.dtype == dtype
    # A rounding is off by at most half a unit in the last place. The interpreter truncates bf16
    # instead, which is off by as much on average, but always to the same side: at the norm, the
    # norm's weight, the result and the sum, and with silu at three more places.
    half_unit = torch.finfo(dtype).eps / 2
    places = (7 if silu else 4) if device == "cpu" and dtype is torch.bfloat16 else 2
    allowed = places * half_unit
    assert error(y_TO, exact_TO) < max(allowed, 1.3 * error(expected_TO, exact_TO))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 13, 16, 17, 33, 99, 256])
@pytest.mark.parametrize("silu", [False, True])
def test_each_number_of_rows_matches_the_formula(num_rows: int, silu: bool) -> None:
    check(num_rows, 48, 320, torch.bfloat16, norm=num_rows <= 16, bias=True, silu=silu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 19])
@pytest.mark.parametrize(
    ("num_outs", "depth"), [(1, 8), (19, 99), (99, 989), (33, 1024), (70, 1288)]
)
def test_odd_sizes_match_the_formula(
    num_rows: int, num_outs: int, depth: int, dtype: torch.dtype
) -> None:
    check(num_rows, num_outs, depth, dtype, norm=num_rows <= 16, residual=True)
    check(num_rows, num_outs, depth, dtype, bias=True, silu=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 4, 20])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", ["", "silu", "residual"])
def test_each_combination_matches_the_formula(
    num_rows: int, norm: bool, bias: bool, after: str, dtype: torch.dtype
) -> None:
    check(
        num_rows,
        24,
        200,
        dtype,
        norm=norm,
        bias=bias,
        silu=after == "silu",
        residual=after == "residual",
    )


TILES = {
    "plain": (64, 32, 32, 1, 3, 4),
    "split": (64, 32, 32, 3, 2, 4),
    "wide": (32, 64, 64, 1, 2, 4),
    "prefetched": (64, 32, 32, 2, 2, 4, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("num_rows", "num_outs", "depth"), [(19, 99, 96), (99, 64, 192), (70, 200, 104), (17, 33, 24)]
)
def test_each_tile_of_many_rows_matches_the_formula(
    num_rows: int, num_outs: int, depth: int, tile: str, dtype: torch.dtype
) -> None:
    run = with_tile(tile)
    check(num_rows, num_outs, depth, dtype, bias=True, residual=True, run=run)
    check(num_rows, num_outs, depth, dtype, silu=True, run=run)


def with_tile(tile: str) -> Callable[..., Tensor]:
    from nanovllm.kernels.triton.split_k_gemm import SplitKTile, split_k_gemm

    def run(
        x: Tensor,
        norm: None,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        eps: float,
        silu: bool,
    ) -> Tensor:
        return split_k_gemm(x, weight, bias, residual, silu, launch=SplitKTile(*TILES[tile]))

    return run


GATED_TILES = {
    "one product": (16, 64, 0, 64, 3, 4),
    "two products": (64, 128, 64, 32, 3, 4),
    "tall": (128, 64, 64, 32, 2, 8),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", GATED_TILES)
@pytest.mark.parametrize(
    ("num_rows", "num_outs", "depth"), [(1, 192, 64), (19, 192, 192), (64, 576, 64), (99, 192, 128)]
)
def test_each_tile_of_gated_products_matches_the_formula(
    num_rows: int, num_outs: int, depth: int, tile: str, dtype: torch.dtype
) -> None:
    from nanovllm.kernels.triton.gated_gemm import GatedTile, gated_gemm

    def run(
        x: Tensor, norm: None, weight: Tensor, bias: Tensor, residual: None, eps: float, silu: bool
    ) -> Tensor:
        return gated_gemm(x, weight, bias, launch=GatedTile(*GATED_TILES[tile]))

    check(num_rows, num_outs, depth, dtype, silu=True, run=run)
    check(num_rows, num_outs, depth, dtype, silu=True, bias=True, run=run)


def test_a_gated_product_reads_no_rows_beyond_its_own() -> None:
    from nanovllm.kernels.triton.gated_gemm import GatedTile, gated_gemm

    x_TD = torch.randn(40, 64, device=device).half()
    x_TD[19:] = float("nan")
    weight_OD = torch.randn(128, 64, device=device).half()
    y_TO = gated_gemm(x_TD[:19], weight_OD, None, launch=GatedTile(32, 64, 0, 32, 2, 4))
    assert y_TO.shape == (19, 64) and not y_TO.isnan().any()


@pytest.mark.parametrize(
    ("num_rows", "num_outs", "depth", "shared_kb", "expected"),
    [
        (8, 12288, 4096, 227, (16, 64, 0)),
        (32, 12288, 4096, 227, (32, 64, 0)),
        (33, 12288, 4096, 227, (64, 128, 64)),
        (65, 12288, 4096, 227, None),
        (128, 12288, 4096, 227, (128, 128, 64)),
        (129, 12288, 4096, 227, None),
        (209, 12288, 4096, 227, (256, 128, 64)),
        (257, 12288, 4096, 227, None),
        (128, 12288, 4096, 99, None),  # too little shared memory
        (128, 14336, 4096, 227, None),  # 28672 is no multiple of 192
        (32, 14336, 4096, 227, None),  # 448 programs, of which 396 run at once
        (32, 12288, 4080, 227, None),
    ],
)
def test_gated_tiles_divide_the_shape_and_fill_the_device(
    num_rows: int, num_outs: int, depth: int, shared_kb: int, expected: tuple[int, int, int] | None
) -> None:
    from nanovllm.kernels.triton.gated_gemm import gated_tile

    tile = gated_tile(num_rows, num_outs, depth, shared_kb << 10, 132)
    assert (tile and tuple(tile[:3])) == expected


def test_large_weights_use_our_kernels_up_to_a_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of Qwen3-8B on a device of the size of an H200."""
    from nanovllm.kernels.triton import gated_gemm
    from nanovllm.kernels.triton import linear as triton_linear

    monkeypatch.setattr(gated_gemm, "shared_memory_bytes", lambda device: 227 << 10)
    monkeypatch.setattr(gated_gemm, "num_multiprocessors", lambda device: 132)
    shapes = {
        "qkv": (6144, 4096),
        "out": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
    }

    def taken(name: str, has_norm: bool = False) -> list[int]:
        weight = torch.empty(shapes[name], device="meta", dtype=torch.bfloat16)
        rows = (1, 2, 8, 16, 17, 64, 65, 97, 128, 129, 208, 209, 256, 257)
        x = torch.empty(rows[-1], weight.shape[1], device="meta")
        return [
            num for num in rows if triton_linear.takes(x[:num], weight, has_norm, name == "gate_up")
        ]

    assert taken("qkv") == taken("out") == [1, 2, 8, 16, 17, 64]
    assert taken("down") == [1, 2, 8, 16, 17, 64, 65, 97, 128]
    assert taken("gate_up") == [1, 2, 8, 16, 17, 64, 97, 128, 209, 256]
    assert taken("qkv", has_norm=True) == taken("gate_up", has_norm=True) == [1]


@pytest.mark.parametrize("silu", [False, True])
def test_splitting_the_depth_gives_the_same_bits_every_time(silu: bool) -> None:
    x_TD = torch.randn(130, 384, device=device).to(torch.bfloat16)
    weight_OD = torch.randn(256, 384, device=device).to(torch.bfloat16)
    num_runs = 5 if device == "cuda" else 2  # the interpreter has no order of threads
    first, *others = (
        with_tile("split")(x_TD, None, weight_OD, None, None, EPS, silu) for _ in range(num_runs)
    )
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("num_rows", [1, 2, 20])
def test_large_values_do_not_overflow_in_half_precision(num_rows: int) -> None:
    x_TD = torch.full((num_rows, 64), 3.0e4, device=device, dtype=torch.float16)
    norm_D = torch.full((64,), 2.0, device=device, dtype=torch.float16)
    weight_OD = torch.eye(64, device=device, dtype=torch.float16)
    y_TO = fused_linear(x_TD, norm_D, weight_OD, None, None, EPS, False)
    assert torch.allclose(y_TO.float(), torch.full_like(y_TO, 2.0).float(), rtol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3, 18])
def test_views_are_read_without_the_memory_around_them(num_rows: int) -> None:
    x = torch.full((num_rows + 2, 300), float("nan"), device=device, dtype=torch.bfloat16)
    weight = torch.full((70, 300), float("nan"), device=device, dtype=torch.bfloat16)
    x[1 : 1 + num_rows, 50:139], weight[:41, 7:96] = torch.randn(num_rows, 89), torch.randn(41, 89)
    x_TD, weight_OD = x[1 : 1 + num_rows, 50:139], weight[:41, 7:96]
    y_TO = fused_linear(x_TD, None, weight_OD, None, None, EPS, False)
    assert error(y_TO, x_TD.double() @ weight_OD.double().T) < 2e-2


@pytest.mark.parametrize("num_rows", [6, 70])
@pytest.mark.parametrize("norm", [False, True])
def test_a_row_of_nan_stays_in_its_row(num_rows: int, norm: bool) -> None:
    x_TD = torch.randn(num_rows, 96, device=device).to(torch.bfloat16)
    weight_OD = torch.randn(40, 96, device=device).to(torch.bfloat16)
    norm_D = torch.ones(96, device=device, dtype=torch.bfloat16) if norm else None
    clean_TO = fused_linear(x_TD, norm_D, weight_OD, None, None, EPS, False)
    x_TD[4] = float("nan")
    y_TO = fused_linear(x_TD, norm_D, weight_OD, None, None, EPS, False)
    keep = [row for row in range(num_rows) if row != 4]
    assert torch.equal(y_TO[keep], clean_TO[keep]) and bool(y_TO[4].isnan().all())


def test_cases_that_the_kernels_do_not_cover_go_to_the_reference() -> None:
    for rows, dtype in ((257, torch.bfloat16), (3, torch.float32)):
        x_TD, weight_OD = (
            torch.randn(rows, 32, device=device).to(dtype),
            torch.randn(8, 32, device=device).to(dtype),
        )
        y_TO = fused_linear(x_TD, None, weight_OD, None, None, EPS, False)
        assert torch.equal(y_TO, torch.nn.functional.linear(x_TD, weight_OD))
    assert fused_linear(x_TD[:0].half(), None, weight_OD.half(), None, None, EPS, False).shape == (
        0,
        8,
    )


@pytest.mark.parametrize("bias", [False, True])
def test_cublas_adds_the_residual(bias: bool) -> None:
    from nanovllm.kernels.triton import linear as triton_linear

    x_TD, weight_OD, residual_TO = (
        torch.randn(*s, device=device).half() for s in ((300, 64), (48, 64), (300, 48))
    )
    bias_O = torch.randn(48, device=device).half() if bias else None
    exact_TO = x_TD.double() @ weight_OD.double().T + residual_TO.double()
    triton_linear.linear_(residual_TO, x_TD, weight_OD, bias_O)
    assert error(residual_TO, exact_TO if bias_O is None else exact_TO + bias_O.double()) < 1e-3


def test_the_op_traces_with_its_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        x_TD, norm_D, weight_OD = torch.empty(3, 32), torch.empty(32), torch.empty(20, 32)
        for silu, outs in ((False, 20), (True, 10)):
            assert ops.fused_linear(x_TD, norm_D, weight_OD, None, None, EPS, silu).shape == (
                3,
                outs,
            )
