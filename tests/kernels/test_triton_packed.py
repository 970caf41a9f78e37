"""Products with packed weights in Triton against the formula in fp64, at odd sizes and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from nanovllm.kernels import dequantized, ops, reference
from nanovllm.kernels.reference.packed import pack
from nanovllm.kernels.triton import (
    packed_codes,
    packed_dequantize,
    packed_experts,
    packed_gemm,
    packed_gemv,
    packed_lookup,
)
from nanovllm.kernels.triton import packed_linear as packed
from nanovllm.kernels.triton.packed_tiles import PackedGemmTile, PackedGemvTile
from nanovllm.models import formats
from nanovllm.models.formats.fp8 import Fp8Weight
from nanovllm.models.formats.packed_weight import PackedWeight

device = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# Half a unit in the last place for each place that rounds: the norm, the weight, the result, and
# SiLU·up twice. The interpreter truncates bf16, which is off by as much on average.
ROUNDED = 0.04  # where x is rounded to fp8, too
LIMIT = {dtype: 5 * torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}


def packed_weight(
    num_outs: int, depth: int, bits: int, group: int, form: str, outer: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    """The arguments of a packed weight: with an offset, or with a table."""
    num_groups = -(-depth // group)
    code = torch.randint(2**bits, (*outer, num_outs, depth), device=device, dtype=torch.uint8)
    scale = torch.rand(*outer, num_outs, num_groups, device=device) / depth**0.5 / 2**bits
    offset = -scale * 2 ** (bits - 1) if "offset" in form else None
    table = torch.randn(2**bits, device=device) * 2 ** (bits - 1) if "table" in form else None
    table = reference.packed.e2m1_table(device) if "e2m1" in form else table
    if "narrow" in form:  # scales of 16 bits
        scale = scale.half()
        offset = None if offset is None else offset.half()
    return pack(code, bits), scale, offset, table, bits, group


def fp8_weight(
    num_outs: int, depth: int, rows: int, columns: int, outer: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    weight = torch.randn(*outer, num_outs, depth, device=device).to(torch.float8_e4m3fn)
    num_scales = (*outer, -(-num_outs // rows), -(-depth // columns))
    return weight, torch.rand(num_scales, device=device) / depth**0.5, rows, columns


def real(weight: tuple[Any, ...], depth: int) -> Tensor:
    if weight[0].dtype is torch.float8_e4m3fn:
        return reference.packed.of_fp8(*weight).double()
    return reference.packed.unpacked(*weight, depth).double()


def codes_of(weight: tuple[Any, ...]) -> packed_codes.Codes:
    is_fp8 = weight[0].dtype is torch.float8_e4m3fn
    return packed_codes.of_fp8(*weight) if is_fp8 else packed_codes.of_packed(*weight)


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm())


def check(
    weight: tuple[Any, ...],
    num_rows: int,
    depth: int,
    dtype: torch.dtype = torch.float16,
    *,
    norm: bool = False,
    bias: bool = False,
    silu: bool = False,
    residual: bool = False,
) -> None:
    """y = silu_mul(rms_norm(x) · weightᵀ + bias) + residual."""
    num_lines = weight[0].shape[0]
    num_outs = num_lines // 2 if silu else num_lines
    around = torch.full((num_rows + 2, depth + 16), torch.nan, device=device, dtype=dtype)
    around[1:-1, 8:-8] = torch.randn(num_rows, depth, device=device)
    x_TD = around[1:-1, 8:-8]
    norm_D = (torch.rand(depth, device=device) + 0.5).to(dtype) if norm else None
    bias_O = torch.randn(num_lines, device=device).to(dtype) if bias else None
    residual_TO = torch.randn(num_rows, num_outs, device=device).to(dtype) if residual else None
    is_fp8 = weight[0].dtype is torch.float8_e4m3fn
    run = packed.fused_fp8_linear if is_fp8 else packed.fused_packed_linear
    y_TO = run(x_TD, norm_D, *weight, bias_O, residual_TO, EPS, silu)
    assert y_TO.dtype == dtype
    exact_TD = x_TD.double()
    if norm_D is not None:
        exact_TD *= torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + EPS) * norm_D.double()
    exact_TO = exact_TD @ real(weight, depth).T + (0 if bias_O is None else bias_O.double())
    exact_TO = reference.norm_act.silu_mul(exact_TO) if silu else exact_TO
    exact_TO = exact_TO if residual_TO is None else exact_TO + residual_TO.double()
    is_rounded = device == "cuda" and packed._is_by_fp8(x_TD, codes_of(weight))
    assert error(y_TO, exact_TO) < (ROUNDED if is_rounded else LIMIT[dtype])


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("bits, group, form", [
    (4, 16, "offset"), (4, 16, "table"), (4, 32, "plain"), (4, 32, "table"),
    (4, 64, "offset table"), (4, 128, "offset narrow"), (4, 320, "offset"),
    (4, 32, "e2m1"), (4, 16, "e2m1"), (4, 64, "offset e2m1"),
    (8, 16, "offset"), (8, 32, "offset narrow"), (8, 64, "table"), (8, 128, "plain"),
    (8, 320, "offset"),
])  # fmt: skip
def test_each_form_of_weights_matches_the_formula(
    bits: int, group: int, form: str, num_rows: int
) -> None:
    check(packed_weight(19, 320, bits, group, form), num_rows, 320)


@pytest.mark.parametrize("num_rows, silu", [(1, True), (5, False), (5, True)])
@pytest.mark.parametrize("rows, columns", [(1, 128), (8, 64), (64, 128), (16, 32)])
def test_each_block_of_fp8_matches_the_formula(
    rows: int, columns: int, num_rows: int, silu: bool
) -> None:
    check(fp8_weight(36, 128, rows, min(columns, 128)), num_rows, 128, silu=silu)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 70])
def test_each_number_of_rows_matches_the_formula(num_rows: int) -> None:
    check(packed_weight(38, 64, 4, 32, "offset"), num_rows, 64, bias=True, silu=num_rows % 2 == 0)


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("after", ["", "silu", "residual"])
@pytest.mark.parametrize("kind, dtype", [("int4", torch.bfloat16), ("fp8", torch.float16)])
def test_each_combination_matches_the_formula(
    num_rows: int, norm: bool, after: str, kind: str, dtype: torch.dtype
) -> None:
    weight = fp8_weight(20, 64, 4, 32) if kind == "fp8" else packed_weight(20, 64, 4, 32, "offset")
    check(
        weight,
        num_rows,
        64,
        dtype,
        norm=norm,
        bias=True,
        silu=after == "silu",
        residual=after == "residual",
    )


@pytest.mark.parametrize("depth", [32, 96, 352])
def test_depths_that_no_chunk_divides_match_the_formula(depth: int) -> None:
    for num_rows in (1, 2):
        check(packed_weight(5, depth, 4, 32, "offset"), num_rows, depth, norm=True)
        check(packed_weight(5, depth, 8, depth, "plain"), num_rows, depth)


@pytest.mark.parametrize("tile", [(2, 1, 1, 3), (4, 2, 2, 1), (8, 1, 4, 2)])
def test_each_tile_of_one_row_matches_the_formula(tile: tuple[int, ...]) -> None:
    weight, x_TD = packed_weight(21, 1312, 4, 32, "offset"), torch.randn(1, 1312, device=device)
    y_TO = packed_gemv.packed_gemv(x_TD.half(), codes_of(weight), launch=PackedGemvTile(*tile))
    assert error(y_TO, x_TD.half().double() @ real(weight, 1312).T) < LIMIT[torch.float16]


TILES = {
    "split": (16, 64, 32, 1, 4, 3, 4),
    "steps of two chunks": (32, 64, 32, 2, 2, 2, 4),
    "wide": (64, 128, 64, 1, 1, 2, 8),
}


@pytest.mark.parametrize("tile, form", [*((tile, "offset") for tile in TILES), ("split", "fp8")])
def test_each_tile_of_some_rows_matches_the_formula(tile: str, form: str) -> None:
    weight = fp8_weight(80, 256, 8, 64) if form == "fp8" else packed_weight(80, 256, 4, 64, form)
    x_TD = torch.randn(17, 256, device=device).half()
    launch = PackedGemmTile(*TILES[tile])
    exact_TO = x_TD.double() @ real(weight, 256).T
    runs = [
        packed_gemm.packed_gemm(x_TD, codes_of(weight), None, None, False, launch) for _ in "ab"
    ]
    assert error(runs[0], exact_TO) < LIMIT[torch.float16]
    assert torch.equal(*runs)
    y_TO = packed_gemm.packed_gemm(x_TD, codes_of(weight), None, None, True, launch)
    assert error(y_TO, reference.norm_act.silu_mul(exact_TO)) < LIMIT[torch.float16]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 64, 160])
def test_dequantized_weights_are_the_real_ones(bits: int, group: int) -> None:
    weight = packed_weight(70, 160, bits, group, "offset")
    found = packed_dequantize.dequantize(codes_of(weight), 160, torch.float16)
    assert error(found, real(weight, 160)) < LIMIT[torch.float16]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_many_rows_are_multiplied_by_parts_of_the_weight(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "DEQUANTIZED_BYTES", 128 * 64 * 2)
    weight = (
        fp8_weight(300, 64, 64, 32) if kind == "fp8" else packed_weight(300, 64, 4, 32, "offset")
    )
    check(weight, 257, 64, bias=True, residual=True)


def test_what_no_kernel_takes_goes_to_the_reference() -> None:
    """Rows that are no whole blocks of 16 bytes, groups of 24, and fp32."""
    for weight, depth, dtype in (
        (packed_weight(7, 99, 8, 32, "plain"), 99, torch.float16),
        (packed_weight(7, 96, 4, 24, "offset"), 96, torch.float16),
        (packed_weight(7, 96, 4, 32, "offset"), 96, torch.float32),
    ):
        x_TD = torch.randn(3, depth, device=device).to(dtype)
        y_TO = packed.packed_linear(x_TD, *weight, None)
        assert torch.equal(y_TO, dequantized.packed_linear(x_TD, *weight, None))
        assert error(y_TO, x_TD.double() @ real(weight, depth).T) < LIMIT[torch.float16]
    weight = packed_weight(7, 64, 4, 32, "plain")
    empty = torch.empty(0, 64, device=device).half()
    assert packed.packed_linear(empty, *weight, None).shape == (0, 7)


def test_experts_whose_weights_no_kernel_takes_read_no_routing_on_the_host() -> None:
    """A captured graph cannot: fake tensors refuse it as well."""
    packed_parts = (
        packed_weight(14, 40, 8, 8, "offset", (3,)),
        packed_weight(40, 7, 8, 7, "offset", (3,)),
    )
    fp8_parts = fp8_weight(14, 40, 8, 8, (3,)), fp8_weight(40, 7, 8, 7, (3,))
    x_TD, weight_TK = torch.randn(6, 40, device=device).half(), torch.rand(6, 2, device=device)
    expert_TK = torch.randint(3, (6, 2), device=device, dtype=torch.int32)
    calls: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (packed_experts.packed_expert_linear, reference.packed.packed_expert_linear,
         (x_TD, expert_TK, *packed_parts[0])),
        (packed_experts.fp8_expert_linear, reference.packed.fp8_expert_linear,
         (x_TD, expert_TK, *fp8_parts[0])),
        (packed_experts.packed_experts, reference.packed.packed_experts,
         (x_TD, weight_TK, expert_TK, *packed_parts[0], *packed_parts[1])),
        (packed_experts.fp8_experts, reference.packed.fp8_experts,
         (x_TD, weight_TK, expert_TK, *fp8_parts[0], *fp8_parts[1])),
    ]  # fmt: skip
    for function, meaning, arguments in calls:
        assert error(function(*arguments), meaning(*arguments).double()) < LIMIT[torch.float16]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in arguments]
            function(*fakes)


def test_a_row_of_nan_stays_in_its_row() -> None:
    weight = packed_weight(40, 64, 4, 32, "offset")
    x_TD = torch.randn(6, 64, device=device).half()
    clean_TO = packed.packed_linear(x_TD, *weight, None)
    x_TD[4] = torch.nan
    y_TO = packed.packed_linear(x_TD, *weight, None)
    keep = [0, 1, 2, 3, 5]
    assert torch.equal(y_TO[keep], clean_TO[keep]) and bool(y_TO[4].isnan().all())


def test_all_values_of_fp8_are_exact() -> None:
    """All codes but NaN, those below the smallest normal number too."""
    code = torch.arange(256, device=device, dtype=torch.uint8)
    code = code[(code & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    weight_OD = torch.zeros(len(code), 32, device=device).to(torch.float8_e4m3fn)
    weight_OD[:, 3] = code
    scale = torch.ones(1, 1, device=device)
    for num_rows in (1, 2):
        x_TD = torch.zeros(num_rows, 32, device=device, dtype=torch.bfloat16)
        x_TD[:, 3] = 1.0
        y_TO = packed.fp8_linear(x_TD, weight_OD, scale, 512, 32, None)
        assert torch.equal(y_TO.float(), code.float().expand(num_rows, -1))


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_all_codes_are_exact_for_large_and_small_inputs(bits: int, num_rows: int) -> None:
    code = torch.arange(0, 2**bits, 1 if bits == 4 else 17, device=device)
    code = code.unsqueeze(1).expand(-1, 32)
    scale = torch.ones(len(code), 1, device=device)
    for size in (2.0**-40, 2.0**40):
        for column in (0, 5, 26):
            x_TD = torch.zeros(num_rows, 32, device=device, dtype=torch.bfloat16)
            x_TD[:, column] = size
            y_TO = packed.packed_linear(x_TD, pack(code, bits), scale, None, None, bits, 32, None)
            assert torch.equal(y_TO.float() / size, code[:, 0].float().expand(num_rows, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_levels_of_e2m1_are_exact(dtype: torch.dtype) -> None:
    """For one row, for some, and dequantized; with the scales of MXFP4, from small to large."""
    code_OD = torch.arange(16, device=device).expand(64, 16).T
    table = reference.packed.e2m1_table(device)
    for power in (-9, 0, 7):
        scale = torch.full((16, 2), 2.0**power, device=device).bfloat16()
        scale[:, 1] *= 4
        weight = pack(code_OD, 4), scale, None, table, 4, 32
        wanted = 2.0**power * table.float()
        found = packed_dequantize.dequantize(packed_codes.of_packed(*weight), 64, dtype).float()
        assert torch.equal(found[:, :32], wanted.unsqueeze(1).expand(-1, 32))
        assert torch.equal(found[:, 32:], 4 * found[:, :32])
        for num_rows in (1, 2, 9):
            for column, factor in ((2, 1.0), (21, 1.0), (37, 4.0), (63, 4.0)):
                x_TD = torch.zeros(num_rows, 64, device=device, dtype=dtype)
                x_TD[:, column] = 1.0
                y_TO = packed.packed_linear(x_TD, *weight, None)
                assert torch.equal(y_TO.float(), factor * wanted.expand(num_rows, -1))


def moe(kind: str, num_experts: int, hidden: int, size: int) -> tuple[Any, ...]:
    if kind == "fp8":
        gate_up = fp8_weight(2 * size, hidden, 16, 32, (num_experts,))
        return gate_up, fp8_weight(hidden, size, 8, 16, (num_experts,))
    gate_up = packed_weight(2 * size, hidden, 4, 32, "offset", (num_experts,))
    return gate_up, packed_weight(hidden, size, 4, 16, "offset narrow", (num_experts,))


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize(
    "num_tokens, top_k, is_parallel", [(1, 2, True), (2, 1, False), (3, 2, True), (21, 3, True)]
)
def test_experts_match_the_formula(
    kind: str, num_tokens: int, top_k: int, is_parallel: bool
) -> None:
    """For one token, few pairs and many; with experts on other ranks, whose places are negative."""
    num_experts, hidden, size = 8, 64, 32
    gate_up, down = moe(kind, num_experts, hidden, size)
    local = [3, -1, 0, 7, 1, -1, 2, 4, 5, 6, -1] if is_parallel else list(range(num_experts))
    logits = torch.randn(num_tokens, len(local), device=device)
    weight_TK, expert_TK = reference.experts.topk_softmax(logits, top_k, True)
    local_X = torch.tensor(local, dtype=torch.int32, device=device)
    x_TD = torch.randn(num_tokens, hidden, device=device).half()
    residual_TD = torch.randn_like(x_TD)
    run = packed_experts.fp8_experts if kind == "fp8" else packed_experts.packed_experts
    y_TD = run(
        x_TD, weight_TK, expert_TK, *gate_up, *down, residual_TD, local_X if is_parallel else None
    )
    exact = residual_TD.double()
    real_up, real_down = real(gate_up, hidden), real(down, size)
    for t in range(num_tokens):
        for k in range(top_k):
            place = local[int(expert_TK[t, k])]
            if place >= 0:
                inner = reference.norm_act.silu_mul(real_up[place] @ x_TD[t].double())
                exact[t] += weight_TK[t, k].double() * (real_down[place] @ inner)
    assert error(y_TD, exact) < LIMIT[torch.float16]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize("num_tokens, has_row_each", [(1, False), (1, True), (9, True)])
def test_products_of_experts_match_the_formula(
    kind: str, num_tokens: int, has_row_each: bool
) -> None:
    gate_up, _ = moe(kind, 5, 64, 24)
    expert_TK = torch.randint(5, (num_tokens, 2), device=device, dtype=torch.int32)
    shape = (num_tokens, 2, 64) if has_row_each else (num_tokens, 64)
    x = torch.randn(shape, device=device).half()
    run = packed_experts.fp8_expert_linear if kind == "fp8" else packed_experts.packed_expert_linear
    x_TKD = x if has_row_each else x.unsqueeze(1).expand(-1, 2, -1)
    exact = torch.einsum("tkd,tkod->tko", x_TKD.double(), real(gate_up, 64)[expert_TK.long()])
    assert error(run(x, expert_TK, *gate_up), exact) < LIMIT[torch.float16]


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_experts_are_one_op_where_the_device_has_a_kernel(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, down = moe(kind, 5, 64, 32)
    weight = Fp8Weight if kind == "fp8" else packed_of
    weight_TK, expert_TK = reference.experts.topk_softmax(torch.randn(3, 5, device=device), 2, True)
    x_TD = torch.randn(3, 64, device=device)
    args = (x_TD, weight_TK, expert_TK, weight(*gate_up), weight(*down), x_TD)
    apart = formats.experts(*args)
    name = "fp8_experts" if kind == "fp8" else "packed_experts"
    called = []
    whole = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: called.append(name) or whole(*args))
    monkeypatch.setattr(ops, "has_kernel", lambda op, device: True)
    torch.testing.assert_close(formats.experts(*args), apart, rtol=1e-4, atol=1e-5)
    assert called == [name]


def packed_of(code: Tensor, scale: Tensor, offset: Any, table: Any, bits: int, group: int) -> Any:
    depth = code.shape[-1] * 8 // bits
    return PackedWeight(code, scale, offset, table, None, bits, group, depth)


@pytest.mark.parametrize(
    ("bits", "group", "form"),
    [(8, 32, "offset narrow"), (4, 32, "offset"), (4, 16, "table"), (4, 32, "e2m1"), (8, 2000, "")],
)
@pytest.mark.parametrize("depth", [64, 1040])
def test_rows_of_a_table_are_its_real_values(bits: int, group: int, form: str, depth: int) -> None:
    weight = packed_weight(19, depth, bits, group, form)
    for row_T in (torch.tensor([18, 0, 7]), torch.tensor([3], dtype=torch.int32)):
        args = row_T.to(device), *weight, depth, torch.float32
        found = packed_lookup.packed_lookup(*args)
        torch.testing.assert_close(found, reference.packed.packed_lookup(*args))
    none = packed_lookup.packed_lookup(row_T[:0].to(device), *weight, depth, torch.float16)
    assert none.shape == (0, depth) and none.dtype is torch.float16


@pytest.mark.parametrize("silu", [False, True])
def test_the_ops_trace_with_their_shapes(silu: bool) -> None:
    """The same shapes as the meaning gives."""
    weight, fp8 = packed_weight(20, 64, 4, 32, "offset"), fp8_weight(20, 64, 4, 32)
    x_TD, norm_D = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    for op, parts in ((ops.fused_packed_linear, weight), (ops.fused_fp8_linear, fp8)):
        args = (x_TD, norm_D, *parts, None, None, EPS, silu)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in args]
            assert op(*fakes).shape == (3, 10 if silu else 20)
        assert reference.meaning(ops.op_name(op) or "")(*args).shape == (3, 10 if silu else 20)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 8, 16, 33, 64, 128, 256])
@pytest.mark.parametrize("kind", ["int4", "int8", "nf4", "fp8"])
@pytest.mark.parametrize(
    "num_outs, depth, silu", [(4096, 4096, False), (4096, 12288, False), (12288, 4096, True)]
)
def test_products_of_qwen3_8b_match_the_formula(
    num_outs: int, depth: int, silu: bool, kind: str, num_rows: int
) -> None:
    """What the interpreter cannot run: assembly, pipelines and real splits."""
    lines = 2 * num_outs if silu else num_outs
    weight = {
        "int4": lambda: packed_weight(lines, depth, 4, 128, "offset"),
        "int8": lambda: packed_weight(lines, depth, 8, 32, "offset narrow"),
        "nf4": lambda: packed_weight(lines, depth, 4, 64, "table"),
        "fp8": lambda: fp8_weight(lines, depth, 128, 128),
    }[kind]()
    check(weight, num_rows, depth, torch.bfloat16, silu=silu, residual=not silu)
