"""Products with some rows against fp64, and the same bits in every run."""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton_gemm import GemmTile, gemm

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
PLAIN, SPLIT = GemmTile(64, 32, 32, 1, 3, 4), GemmTile(64, 32, 32, 3, 2, 4)
SWAPPED, SWAPPED_SPLIT = GemmTile(32, 64, 32, 1, 3, 4, True), GemmTile(32, 64, 32, 2, 2, 4, True)


def inputs(num_rows: int, num_outs: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = torch.randn(num_rows, depth, device=device).to(dtype)
    weight_OD = (torch.randn(num_outs, depth, device=device) / depth**0.5).to(dtype)
    return x_TD, weight_OD, torch.randn(num_outs, device=device).to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [PLAIN, SPLIT, SWAPPED, SWAPPED_SPLIT], ids=["plain", "split", "swapped", "both"])
@pytest.mark.parametrize(("num_rows", "num_outs", "depth"), [(19, 99, 96), (99, 64, 192), (70, 200, 100), (1, 33, 19)])
def test_product_and_silu_are_those_of_fp64(
    num_rows: int, num_outs: int, depth: int, tile: GemmTile, dtype: torch.dtype
) -> None:
    x_TD, weight_OD, bias_O = inputs(num_rows, 2 * num_outs, depth, dtype)
    exact_TO = x_TD.double() @ weight_OD.double().T
    assert error(gemm(x_TD, weight_OD, None, False, tile), exact_TO) < 1e-2
    assert error(gemm(x_TD, weight_OD, bias_O, False, tile), exact_TO + bias_O.double()) < 1e-2
    # the interpreter cuts bf16 off instead of rounding, three times in a row
    limit = 1e-2 if device == "cuda" or dtype is torch.float16 else 2e-2
    assert error(gemm(x_TD, weight_OD, None, True, tile), reference.silu_mul(exact_TO)) < limit
    assert error(gemm(x_TD, weight_OD, bias_O, True, tile), reference.silu_mul(exact_TO + bias_O.double())) < limit


@pytest.mark.parametrize("silu_mul", [False, True])
def test_parts_of_the_depth_give_the_same_bits_again(silu_mul: bool) -> None:
    x_TD, weight_OD, _ = inputs(130, 256, 384, torch.bfloat16)
    first = gemm(x_TD, weight_OD, None, silu_mul, SPLIT)
    assert all(torch.equal(gemm(x_TD, weight_OD, None, silu_mul, SPLIT), first) for _ in range(5))


def test_a_row_depends_on_no_other_row_and_on_no_padding() -> None:
    x_TD, weight_OD, _ = inputs(70, 64, 128, torch.bfloat16)
    alone_TO = gemm(x_TD, weight_OD, None, False, PLAIN)
    x_TD[1:] = float("nan")
    poisoned_TO = gemm(x_TD, weight_OD, None, False, PLAIN)
    assert torch.equal(poisoned_TO[0], alone_TO[0])
    assert bool(poisoned_TO[1:].isnan().all())


def test_strided_rows_are_read_where_they_lie() -> None:
    storage, weight_OD, _ = inputs(2 * 33, 40, 64, torch.float16)
    assert torch.equal(
        gemm(storage[::2], weight_OD, None, False, PLAIN),
        gemm(storage[::2].contiguous(), weight_OD, None, False, PLAIN),
    )
