"""Products with packed weights by warpgroups: the formula on a GPU of sm_90, and compiled."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.cuda import nvrtc, packed_wgmma, wgmma_groups
from nanovllm.kernels.cuda.packed_wgmma import MAX_ROWS, ROWS, TILES, Tile
from nanovllm.kernels.triton import packed_experts
from nanovllm.kernels.triton.dry_run import function_of
from nanovllm.kernels.triton.moe_sort import Groups, gather
from nanovllm.kernels.triton.packed_codes import Codes
from tests.kernels.test_cuda_packed import (
    DTYPE,
    E2M1,
    KINDS,
    LIMIT,
    check_groups,
    error,
    folder,
    random_codes,
    random_e2m1,
    real,
)

__all__ = ["folder"]  # a fixture
INTEGERS = [kind for kind in KINDS if kind[0] != "fp8"]
DIFFERENT = sorted({tile for tiles in TILES for tile in tiles if tile is not None})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [9, 27, 50, 90, 200])
@pytest.mark.parametrize("kind, group, dtype", INTEGERS)
def test_each_form_of_codes_matches_the_formula(
    kind: str, group: int, dtype: torch.dtype, num_rows: int
) -> None:
    """Odd sizes, all parts of the depth, and equal bits when it is repeated."""
    if not packed_wgmma.is_supported(torch.device("cuda")):
        pytest.skip("warpgroups multiply on sm_90")
    rows = packed_wgmma.rows_of_program(num_rows)
    for num_lines, depth in ((328, 2048), (72, 448)):
        codes = random_codes(kind, group, dtype, (num_lines, depth), "cuda")
        x_TD = torch.randn(num_rows, depth + 8, device="cuda").to(DTYPE)[:, :depth]
        assert packed_wgmma.takes(x_TD, codes)
        bias_O = torch.randn(num_lines, device="cuda").to(DTYPE)
        sum_TO = x_TD.double() @ real(codes, depth).T + bias_O.double()
        for i, tile in enumerate(DIFFERENT):
            most = packed_wgmma.most_stages(rows, tile.groups, codes.bits)
            tile = tile._replace(num_stages=min(tile.num_stages, most))
            silu = i % 2 == 0
            exact_TO = reference.norm_act.silu_mul(sum_TO) if silu else sum_TO
            residual_TO = torch.randn(exact_TO.shape, device="cuda").to(DTYPE)
            given = (x_TD, codes, tile, bias_O, residual_TO, silu)
            y_TO = packed_wgmma.packed_wgmma(*given)
            assert error(y_TO, exact_TO + residual_TO.double()) < LIMIT
            assert torch.equal(packed_wgmma.packed_wgmma(*given), y_TO)


@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_compiles_in_a_worker(rows: int, folder: Path) -> None:
    kind, group, dtype = INTEGERS[ROWS.index(rows) % len(INTEGERS)]
    codes = random_codes(kind, group, dtype, (256, 256), "cpu")
    x_TD = torch.empty(rows, 256, dtype=DTYPE)
    tile = Tile(3, 1 + rows % 3, 2)
    function = packed_wgmma.function_of(x_TD, codes, tile, rows, SILU=rows > 32)
    function = function_of(json.loads(json.dumps(function._asdict())))  # as a worker reads it
    program = nvrtc.compile_function(function, (9, 0))
    assert program.startswith(b"\x7fELF") and b"packed_wgmma" in program


@pytest.mark.parametrize("rows", wgmma_groups.ROWS)
def test_the_kernel_of_experts_compiles(rows: int, folder: Path) -> None:
    e2m1 = random_e2m1((4, 256, 256), "cpu")
    codes = random_codes(*INTEGERS[0], (4, 256, 256), "cpu") if rows == 32 else e2m1
    x_PD = torch.empty(rows, 256, dtype=DTYPE)
    function = packed_wgmma.function_of(
        x_PD, codes, Tile(2, 1, 2), rows, SILU=rows > 16, CLAMP=rows > 32, EXPERTS=1,
        OUT_BY_PLACE=rows > 16,
    )  # fmt: skip
    program = nvrtc.compile_function(function, (9, 0))
    assert program.startswith(b"\x7fELF") and b"packed_wgmma" in program


@pytest.mark.gpu
@pytest.mark.parametrize("rows", wgmma_groups.ROWS)
@pytest.mark.parametrize("form", [*INTEGERS[:3], INTEGERS[4], E2M1], ids=str)
def test_groups_of_pairs_match_the_formula(form: tuple[str, int, torch.dtype], rows: int) -> None:
    if not packed_wgmma.is_supported(torch.device("cuda")):
        pytest.skip("warpgroups multiply on sm_90")

    def multiply(x: torch.Tensor, codes: Codes, groups: Groups, top_k: int, **how: Any) -> Any:
        x_PD = gather(x, groups, top_k) if top_k else x
        assert wgmma_groups.takes(x_PD, codes)
        tile = wgmma_groups.Tile(rows, 1 + rows % 3, 3)
        return wgmma_groups.wgmma_groups(x_PD, codes, groups, tile=tile, **how)

    for num_tokens, is_local in ((2, False), (90, False), (90, True)):
        check_groups(form, num_tokens, (6, 128, 448), multiply, "cuda", is_local)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [2, 9, 40, 700])
@pytest.mark.parametrize("form", [INTEGERS[0], E2M1, KINDS[-2]], ids=str)
def test_products_of_experts_by_any_kernel(
    form: tuple[str, int, torch.dtype], num_tokens: int
) -> None:
    """One token's pairs share its row, or each has a row of its own; few pairs of an expert, and so
    many that a program has 128."""
    kind, group, dtype = form
    num_experts, depth = 12, 512
    make = random_e2m1 if kind == "e2m1" else partial(random_codes, kind, group, dtype)
    codes = make((num_experts, 192, depth), "cuda")
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    expert_TK = reference.experts.topk_softmax(logits, 4, True)[1]
    matrices = real(codes, depth)[expert_TK.long()]
    for x in torch.randn(num_tokens, 5, depth, device="cuda").to(DTYPE).split((1, 4), 1):
        found = packed_experts._expert_linear(x.squeeze(1), expert_TK, codes)
        exact = torch.einsum("tkd,tkod->tko", x.double().expand(-1, 4, -1), matrices)
        assert found is not None and error(found, exact) < LIMIT


def test_sizes_fit_the_product() -> None:
    """Parts of the depth are no shorter than a chunk, and the ring fits the shared memory."""
    for kind, num_lines, depth in (("4", 24576, 4096), ("8", 4096, 12288), ("4", 512, 256)):
        codes = random_codes(kind, 128, DTYPE, (num_lines, depth), "meta")
        for num_rows in (9, 16, 17, 64, 65, 256):
            tile = packed_wgmma.tile_of(num_rows, codes, depth)
            if tile is None:
                continue
            rows = packed_wgmma.rows_of_program(num_rows)
            assert tile.split * packed_wgmma.CHUNK <= depth and tile.num_stages >= 2
            shared_bytes = packed_wgmma.shared_bytes(tile, rows, codes.bits)
            assert shared_bytes <= packed_wgmma.MAX_SHARED_BYTES
        assert packed_wgmma.tile_of(MAX_ROWS, codes, depth) is not None
        assert packed_wgmma.tile_of(MAX_ROWS + 1, codes, depth) is None
        assert packed_wgmma.tile_of(1, codes, depth) is None
