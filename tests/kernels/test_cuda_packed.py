"""Products with packed weights in CUDA C++: the formula on a GPU, and compiled for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.cuda import packed_linear as cuda_packed
from nanovllm.kernels.cuda.packed_groups import packed_groups
from nanovllm.kernels.cuda.packed_linear import FP8_TILES, INTEGER_TILES, ROWS, Tile
from nanovllm.kernels.triton import fp8_products, packed_codes
from nanovllm.kernels.triton.moe_sort import Groups
from nanovllm.kernels.triton.packed_codes import Codes
from tests.kernels import cuda_on_host

DTYPE, EPS = torch.bfloat16, 1e-6
LIMIT = 1.2e-2  # of bf16: the weight, the result, and SiLU·up twice are rounded
ROUNDED = 0.04  # x is rounded to fp8
# (bits or "fp8", group of columns, dtype of scales); group 0: one for each row
KINDS = [
    ("4", 128, torch.bfloat16), ("4", 64, torch.float16), ("4", 32, torch.float32),
    ("4", 0, torch.bfloat16), ("8", 128, torch.float16), ("8", 32, torch.bfloat16),
    ("fp8", 128, torch.float32), ("fp8", 0, torch.float32),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    nvrtc.configure(tmp_path)
    yield tmp_path
    nvrtc.configure(None)


def random_codes(
    kind: str, group: int, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> Codes:
    *outer, num_lines, depth = shape
    group = group or depth
    if kind == "fp8":
        rows = 128 if group == 128 else 1
        weight = torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        num_scales = (*outer, -(-num_lines // rows), -(-depth // group))
        scale = (torch.rand(num_scales, device=device) + 0.5) / depth**0.5
        return packed_codes.of_fp8(weight, scale, rows, group)
    bits = int(kind)
    code = torch.randint(
        256, (*outer, num_lines, depth * bits // 8), dtype=torch.uint8, device=device
    )
    scale = torch.rand(*outer, num_lines, -(-depth // group), device=device) + 0.5
    scale = (scale / depth**0.5 / 2 ** (bits - 2)).to(dtype)
    return packed_codes.of_packed(code, scale, -(2 ** (bits - 1)) * scale, None, bits, group)


def random_e2m1(shape: tuple[int, ...], device: str) -> Codes:
    """MXFP4: numbers in e2m1, with a power of 2 for 32 columns."""
    *outer, num_lines, depth = shape
    size = (*outer, num_lines, depth // 32)
    code = torch.randint(256, (*outer, num_lines, depth // 2), dtype=torch.uint8, device=device)
    scale = (2.0 ** torch.randint(-8, -4, size, device=device)).to(torch.bfloat16)
    return packed_codes.of_packed(code, scale, None, reference.packed.e2m1_table(device), 4, 32)


def real(codes: Codes, depth: int) -> Tensor:
    code, scale, offset, table, bits, rows, group, is_fp8 = codes
    if is_fp8:
        values = reference.packed.of_fp8(code.view(torch.float8_e4m3fn), scale, rows, group)
        return values.double()
    return reference.packed.unpacked(code, scale, offset, table, bits, group, depth).double()


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 5, 13, 27, 50])
@pytest.mark.parametrize("kind, group, dtype", KINDS)
def test_each_form_of_codes_matches_the_formula(
    kind: str, group: int, dtype: torch.dtype, num_rows: int
) -> None:
    """Odd sizes, with and without the neighbours, and rows that are a part of a larger tensor."""
    for num_lines, depth in ((320, 1024), (72, 448)):
        codes = random_codes(kind, group, dtype, (num_lines, depth), "cuda")
        for silu, norm in ((False, False), (True, False), (True, True), (False, True)):
            if norm and num_rows > cuda_packed.MAX_NORMED_ROWS:
                continue
            check_product(codes, num_rows, (num_lines, depth), silu=silu, norm=norm)


def check_product(
    codes: Codes, num_rows: int, shape: tuple[int, int], *, silu: bool, norm: bool
) -> None:
    num_lines, depth = shape
    device = codes.code.device
    num_outs = num_lines // 2 if silu else num_lines
    x_TD = torch.randn(num_rows, depth + 8, device=device).to(DTYPE)[:, :depth]
    if norm:  # a factor of another row would be wrong
        x_TD *= torch.arange(1, num_rows + 1, device=device)[:, None]
    bias_O = torch.randn(num_lines, device=device).to(DTYPE)
    residual_TO = torch.randn(num_rows, num_outs, device=device).to(DTYPE)
    norm_D = (torch.rand(depth, device=device) + 0.5).to(DTYPE) if norm else None
    assert cuda_packed.takes(x_TD, codes) and (not norm or cuda_packed.takes_norm(x_TD))
    y_TO = cuda_packed.packed_linear(
        x_TD, codes, norm_D=norm_D, eps=EPS, bias_O=bias_O, residual_TO=residual_TO, silu_mul=silu
    )
    exact_TD = x_TD.double()
    if norm_D is not None:
        exact_TD *= torch.rsqrt(exact_TD.square().mean(-1, keepdim=True) + EPS)
        exact_TD *= norm_D.double()
    exact_TO = exact_TD @ real(codes, depth).T + bias_O.double()
    exact_TO = reference.norm_act.silu_mul(exact_TO) if silu else exact_TO
    assert error(y_TO, exact_TO + residual_TO.double()) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("kind, group, dtype", [KINDS[0], KINDS[-2], KINDS[-1]])
def test_pairs_of_experts_match_the_formula(kind: str, group: int, dtype: torch.dtype) -> None:
    num_experts, size, hidden, top_k, num_tokens = 16, 256, 768, 8, 3
    gate_up = random_codes(kind, group, dtype, (num_experts, 2 * size, hidden), "cuda")
    down = random_codes(kind, group, dtype, (num_experts, hidden, size), "cuda")
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    weight_TK, expert_TK = reference.experts.topk_softmax(logits, top_k, True)
    x_TD, residual_TD = torch.randn(2, num_tokens, hidden, device="cuda").to(DTYPE)
    inner_PF = cuda_packed.packed_pairs(x_TD, gate_up, expert_TK, x_shared_by=top_k, silu_mul=True)
    chosen = real(gate_up, hidden)[expert_TK.long()]
    exact = torch.einsum("td,tkod->tko", x_TD.double(), chosen)
    assert error(inner_PF, reference.norm_act.silu_mul(exact).flatten(0, 1)) < LIMIT
    y_TD = cuda_packed.packed_pairs(
        inner_PF, down, expert_TK, factor_TK=weight_TK, residual_TO=residual_TD
    )
    inner = inner_PF.view(num_tokens, top_k, size).double()
    exact = torch.einsum("tkf,tkof->tko", inner, real(down, size)[expert_TK.long()])
    exact = (exact * weight_TK.double().unsqueeze(2)).sum(1) + residual_TD.double()
    assert error(y_TD, exact) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 4, 6])
def test_clamped_experts_in_e2m1_match_the_formula(top_k: int) -> None:
    """Biases of experts, a clamped activation, and warps that share a pair or have several."""
    check_clamped(top_k, 2, (5, 192, 352), "cuda")


@pytest.fixture
def on_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    if cuda_on_host.COMPILER is None:
        pytest.skip("no g++")

    def launch(function: Any, how: Any, arguments: Any, device: torch.device) -> None:
        num_programs, num_rows, _ = how.grid
        cuda_on_host.run(function, arguments(), num_programs, tmp_path, num_rows)

    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(cuda_packed, "is_supported", lambda device: True)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("num_rows", [1, 8])
def test_rows_are_normed_by_a_product_on_a_cpu(num_rows: int) -> None:
    shape = 48, 576  # SmolLM2-135M's depth
    codes = random_codes(*KINDS[2], shape, "cpu")
    check_product(codes, num_rows, shape, silu=True, norm=True)


@pytest.mark.usefixtures("on_host")
def test_the_arithmetic_of_clamped_experts_is_right_on_a_cpu() -> None:
    check_clamped(4, 1, (5, 32, 160), "cpu")


def check_clamped(top_k: int, num_tokens: int, sizes: tuple[int, int, int], device: str) -> None:
    (num_experts, size, hidden), num_pairs = sizes, num_tokens * top_k
    num_experts = max(num_experts, top_k)
    gate_up = random_e2m1((num_experts, 2 * size, hidden), device)
    down = random_e2m1((num_experts, hidden, size), device)
    logits = torch.randn(num_tokens, num_experts, device=device)
    weight_TK, expert_TK = reference.experts.topk_softmax(logits, top_k, True)
    x_TD, residual_TD = torch.randn(2, num_tokens, hidden, device=device).to(DTYPE)
    inner_bias, bias = (
        torch.randn(num_experts, n, device=device).to(DTYPE) for n in (2 * size, hidden)
    )
    clamp = 1.702, 0.9
    assert all(cuda_packed.takes(x_TD, one) for one in (gate_up, down))
    inner_PF = cuda_packed.packed_pairs(
        x_TD, gate_up, expert_TK, x_shared_by=top_k, silu_mul=True, bias_EO=inner_bias, clamp=clamp
    )
    chosen_TK = expert_TK.long()
    exact = torch.einsum("td,tkod->tko", x_TD.double(), real(gate_up, hidden)[chosen_TK])
    exact = (exact + inner_bias[chosen_TK].double()).view(num_pairs, 2 * size)
    assert error(inner_PF, reference.norm_act.clamped_swiglu(exact, *clamp)) < LIMIT
    y_TD = cuda_packed.packed_pairs(
        inner_PF, down, expert_TK, factor_TK=weight_TK, residual_TO=residual_TD, bias_EO=bias
    )
    inner = inner_PF.view(num_tokens, top_k, size).double()
    exact = torch.einsum("tkf,tkof->tko", inner, real(down, size)[chosen_TK])
    exact = (exact + bias[chosen_TK].double()) * weight_TK.double().unsqueeze(2)
    assert error(y_TD, exact.sum(1) + residual_TD.double()) < LIMIT


E2M1 = "e2m1", 32, torch.bfloat16
GROUPED_KINDS = [*KINDS[:1], *KINDS[-2:], E2M1]


@pytest.mark.gpu
@pytest.mark.parametrize("most_pairs", ROWS)
@pytest.mark.parametrize("kind, group, dtype", GROUPED_KINDS)
def test_groups_of_pairs_match_the_formula(
    kind: str, group: int, dtype: torch.dtype, most_pairs: int
) -> None:
    """An expert that all tokens chose, one that none did, and ranks with half of the experts."""
    multiply = grouped(most_pairs, Tile(1, 4, 2, 2))
    for num_tokens, is_local in ((2, False), (41, False), (41, True)):
        check_groups((kind, group, dtype), num_tokens, (6, 128, 448), multiply, "cuda", is_local)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("kind", "most_pairs"), [("e2m1", 8), ("fp8", 16), ("4", 16)])
def test_the_arithmetic_of_groups_is_right_on_a_cpu(kind: str, most_pairs: int) -> None:
    form = next(one for one in GROUPED_KINDS if one[0] == kind)
    hidden = 160 if kind == "e2m1" else 256  # a part of a chunk
    multiply = grouped(most_pairs, Tile(1, 2, 2))
    check_groups(form, 9, (4, 128, hidden), multiply, "cpu", True)


def grouped(most_pairs: int, tile: Tile) -> Callable[..., Tensor]:
    def multiply(x: Tensor, codes: Codes, groups: Groups, top_k: int, **how: Any) -> Tensor:
        tiles = most_pairs, tile
        return packed_groups(x, codes, groups, tile=tiles, x_shared_by=top_k or None, **how)

    return multiply


def check_groups(
    form: tuple[str, int, torch.dtype],
    num_tokens: int,
    sizes: tuple[int, int, int],
    multiply: Callable[..., Tensor],
    device: str,
    is_local: bool,
) -> None:
    """Both products of clamped experts, 3 for each token: with `is_local` every second one is here,
    in another order. `multiply` gets how many pairs share a row, or 0 for rows in their order."""
    (num_experts, size, hidden), top_k = sizes, 3
    kind, group, dtype = form
    shapes = (num_experts, 2 * size, hidden), (num_experts, hidden, size)
    gate_up, down = (
        random_e2m1(one, device)
        if kind == "e2m1"
        else random_codes(kind, group, dtype, one, device)
        for one in shapes
    )
    num_all = 2 * num_experts if is_local else num_experts
    logits = torch.randn(num_tokens, num_all, device=device)
    logits[:, 0], logits[:, 2] = 10, -10
    weight_TK, expert_TK = reference.experts.topk_softmax(logits, top_k, True)
    local_X = None
    if is_local:
        local_X = torch.full((num_all,), -1, dtype=torch.int32, device=device)
        local_X[::2] = torch.arange(num_experts, device=device, dtype=torch.int32).flip(0)
    place_P = (expert_TK if local_X is None else local_X[expert_TK.long()]).flatten().long()
    order_P = torch.sort(torch.where(place_P < 0, num_experts, place_P), stable=True).indices
    counts_E = torch.bincount(place_P[place_P >= 0], minlength=num_experts)
    start_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)]).int()
    groups = Groups(order_P.int(), start_E1, 1.0)
    own_P = order_P[: int(start_E1[-1])]
    clamp = 1.702, 0.9
    x_TD = torch.randn(num_tokens, hidden, device=device).to(DTYPE)
    inner_bias, bias = (
        torch.randn(num_experts, n, device=device).to(DTYPE) for n in (2 * size, hidden)
    )
    inner_PF = multiply(
        x_TD, gate_up, groups, top_k, by_place=True, silu_mul=True, bias_EO=inner_bias, clamp=clamp
    )[: len(own_P)]
    chosen_P = place_P[own_P]
    exact = torch.einsum(
        "pd,pod->po", x_TD[own_P // top_k].double(), real(gate_up, hidden)[chosen_P]
    )
    exact = exact + inner_bias[chosen_P].double()
    assert error(inner_PF, reference.norm_act.clamped_swiglu(exact, *clamp)) < LIMIT
    y_PD = multiply(inner_PF, down, groups, 0, factor_TK=weight_TK, bias_EO=bias)
    exact = torch.einsum("pf,pof->po", inner_PF.double(), real(down, size)[chosen_P])
    exact = (exact + bias[chosen_P].double()) * weight_TK.double().flatten()[own_P].unsqueeze(1)
    assert error(y_PD[own_P], exact) < LIMIT
    y_PD = multiply(inner_PF, down, groups, 0, by_place=True)
    exact = torch.einsum("pf,pof->po", inner_PF.double(), real(down, size)[chosen_P])
    assert error(y_PD[: len(own_P)], exact) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("group", [128, 0])
@pytest.mark.parametrize("num_rows", [33, 65, 250])
def test_products_in_fp8_match_the_formula(num_rows: int, group: int) -> None:
    if not fp8_products.has_units(torch.device("cuda")):
        pytest.skip("cuBLAS takes scales of blocks on sm_90")
    for num_lines, depth in ((512, 1024), (256, 768)):
        codes = random_codes("fp8", group, torch.float32, (num_lines, depth), "cuda")
        x_TD = torch.randn(num_rows, depth, device="cuda").to(DTYPE)
        assert fp8_products.takes(x_TD, codes)
        exact_TO = x_TD.double() @ real(codes, depth).T
        assert error(fp8_products.fp8_product(x_TD, codes), exact_TO) < ROUNDED


@pytest.mark.parametrize("group", [128, 320])
def test_the_largest_magnitude_of_a_group_becomes_the_largest_number(group: int) -> None:
    x_TD = torch.randn(5, 320, device="cuda" if torch.cuda.is_available() else "cpu").to(DTYPE)
    q_TD, scale_GT = fp8_products.quantize(x_TD, group)
    assert q_TD.shape == (fp8_products.ROWS, 320)
    assert scale_GT.shape == (-(-320 // group), fp8_products.ROWS)
    for i, part in enumerate(x_TD.float().split(group, 1)):
        scale_T = part.abs().amax(1) / 448
        assert torch.allclose(scale_GT[i, :5], scale_T, rtol=1e-6)
        values = q_TD[:5, i * group : i * group + part.shape[1]].float() * scale_T.unsqueeze(1)
        assert torch.allclose(values, part, rtol=2**-4, atol=2**-9 * float(scale_T.max()))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_the_kernel_compiles(capability: tuple[int, int], folder: Path) -> None:
    """One tile for each number of rows, alternately of integers and fp8; and pairs."""
    functions: list[tuple[Codes, Tile, int, dict[str, int]]] = []
    for i, row_tiles in enumerate(most // 8 for most in ROWS):
        kind, group, dtype = KINDS[0] if i % 2 else KINDS[-2]
        codes = random_codes(kind, group, dtype, (256, 256), "cpu")
        tile = (INTEGER_TILES if i % 2 else FP8_TILES)[i][0]
        functions.append((codes, tile, row_tiles, {"SILU": i == 1, "NORM": 2 * (i == 0)}))
    functions += [(functions[1][0], Tile(1, 8, 2), 1, {"PAIRS": pairs}) for pairs in (1, 2)]
    e2m1 = random_e2m1((256, 256), "cpu")
    functions.append((e2m1, Tile(2, 4, 2), 1, {"SILU": True, "PAIRS": 1, "CLAMP": True}))
    functions += [
        (codes, Tile(1, 4, 2, 2), row_tiles, {"PAIRS": 3, "SILU": codes is e2m1})
        for codes, row_tiles in ((e2m1, 1), (functions[0][0], 2), (e2m1, 4))
    ]
    x = torch.empty(1, 256, dtype=DTYPE)
    for codes, tile, row_tiles, form in functions:
        function = cuda_packed.function_of(x, codes, tile, row_tiles, **form)
        program = nvrtc.compile_function(function, capability)
        assert program.startswith(b"\x7fELF") and b"packed_linear" in program
        assert nvrtc.compile_function(function, capability) == program
    assert len(list(folder.glob("*.cubin"))) == len(functions)


def test_a_source_that_nvrtc_refuses_is_an_error_with_its_message(folder: Path) -> None:
    function = nvrtc.Function("packed_linear", nvrtc.constants({"BITS": 3}))
    with pytest.raises(RuntimeError, match=r"NVRTC refuses packed_linear\.cu: .*error"):
        nvrtc.compile_function(function, (9, 0))
    assert not list(folder.glob("*.cubin"))


def test_a_damaged_program_is_compiled_again(folder: Path) -> None:
    codes = random_codes(*KINDS[0], (256, 256), "cpu")
    function = cuda_packed.function_of(torch.empty(1, 256, dtype=DTYPE), codes, Tile(1, 4, 2), 1)
    program = nvrtc.compile_function(function, (9, 0))
    (path,) = folder.glob("*.cubin")
    path.write_bytes(program[:-1] + b"x")
    assert nvrtc.compile_function(function, (9, 0)) == program == path.read_bytes()
