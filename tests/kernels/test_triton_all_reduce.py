"""Sums and gathers through memory that all ranks read: the same bits on all ranks, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import collectives, peers, reference
from nanovllm.kernels.triton import all_reduce as kernels
from nanovllm.kernels.triton.all_reduce import Tile
from nanovllm.kernels.triton.common import INTERPRETED
from tests.kernels.peer_ranks import Regions

interpreted = pytest.mark.skipif(
    not bool(INTERPRETED) or not hasattr(os, "fork"), reason="needs TRITON_INTERPRET=1 and fork"
)


def share(rank: int, shape: tuple[int, ...], dtype: torch.dtype, call: int = 0) -> Tensor:
    """What a rank brings to a call."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def summed(num_ranks: int, shape: tuple[int, ...], dtype: torch.dtype, call: int = 0) -> Tensor:
    """The sum in fp32 in the order of ranks, rounded once."""
    total = share(0, shape, dtype, call).float()
    for rank in range(1, num_ranks):
        total = total + share(rank, shape, dtype, call).float()
    return total.to(dtype)


def check_bits(results: list[Tensor], expected: Tensor) -> None:
    """All results have the same bits, those of `expected`.

    The interpreter cuts bf16 off where a GPU rounds, so with bf16 results may differ from
    `expected`, by one unit in the last place for each rounding.
    """
    for result in results:
        assert torch.equal(result, results[0])
    if expected.dtype == torch.bfloat16:
        torch.testing.assert_close(results[0], expected.flatten(), rtol=2**-6, atol=2**-5)
    else:
        assert torch.equal(results[0], expected.flatten())


@interpreted
@pytest.mark.parametrize("tile", [Tile("one-shot", 64, 4), Tile("two-shot", 16, 4)], ids=str)
@pytest.mark.parametrize(
    ("num_ranks", "num", "dtype"),
    [(2, 99, torch.bfloat16), (4, 19, torch.float16), (8, 1, torch.float32)],
)
def test_all_ranks_get_the_same_bits(
    num_ranks: int, num: int, tile: Tile, dtype: torch.dtype
) -> None:
    regions = Regions(num_ranks)
    residual = share(99, (num,), dtype)

    def work(rank: int) -> Tensor:
        x = share(rank, (num,), dtype)
        out = torch.full_like(x, float("nan"))
        return kernels.reduce_by(tile, x, residual, out, regions.group(rank).peers)

    check_bits(regions.run(work), summed(num_ranks, (num,), dtype) + residual)


@interpreted
def test_calls_of_changing_sizes_and_forms_follow_each_other_while_counters_wrap_around() -> None:
    regions = Regions(2, counter=2**31 - 8)
    cases = [(19, "one-shot"), (150, "two-shot"), (150, "one-shot"), (1, "two-shot")]
    cases += [(99, "one-shot"), (64, "one-shot")]
    add = kernels.sum_over_ranks

    def add_late(*args: object) -> object:
        time.sleep(0.03)  # the other rank begins its next call before this one has read
        return add(*args)

    def work(rank: int) -> Tensor:
        if rank == 1:
            kernels.sum_over_ranks = add_late  # in this fork alone
        sums = []
        for call, (num, form) in enumerate(cases * 2):
            x = share(rank, (num,), torch.bfloat16, call)
            tile = Tile(form, 16 if form == "two-shot" else 32, 4)
            sums.append(kernels.reduce_by(tile, x, None, x, regions.group(rank).peers))
        return torch.cat(sums)

    wanted = [summed(2, (num,), torch.bfloat16, call) for call, (num, _) in enumerate(cases * 2)]
    check_bits(regions.run(work), torch.cat(wanted))


@interpreted
@pytest.mark.parametrize(
    ("num_ranks", "rows", "dim", "dtype"), [(2, 3, 99, torch.bfloat16), (4, 1, 64, torch.float32)]
)
def test_the_fused_norm_is_the_norm_of_the_sum(
    num_ranks: int, rows: int, dim: int, dtype: torch.dtype
) -> None:
    residual, weight = share(50, (rows, dim), dtype), share(51, (dim,), dtype)

    def work(rank: int) -> Tensor:
        x = share(rank, (rows, dim), dtype)
        return torch.cat(kernels.all_reduce_norm(x, residual, weight, 1e-6))

    results = Regions(num_ranks).run(work)
    total = summed(num_ranks, (rows, dim), dtype)
    normed, added = reference.norm_act.add_rms_norm(total, residual, weight, 1e-6)
    check_bits([result[rows * dim :] for result in results], added)
    eps = 4 * torch.finfo(dtype).eps * float(normed.float().abs().max())
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result[: rows * dim], normed.flatten(), rtol=eps, atol=eps)


@interpreted
@pytest.mark.parametrize(("rows", "width", "num_columns"), [(1, 99, 197), (3, 19, 20), (2, 5, 10)])
def test_columns_are_gathered_without_the_padding(rows: int, width: int, num_columns: int) -> None:
    def work(rank: int) -> Tensor:
        return kernels.gather_columns(share(rank, (rows, width), torch.float16), num_columns)

    both = torch.cat([share(rank, (rows, width), torch.float16) for rank in range(2)], dim=1)
    check_bits(Regions(2).run(work), both[:, :num_columns])


@interpreted
def test_ops_choose_the_regions_and_leave_the_input_alone() -> None:
    def work(rank: int) -> Tensor:
        x = share(rank, (2, 19), torch.float32)
        before = x.clone()
        out = kernels.all_reduce(x)
        assert torch.equal(x, before)
        kernels.all_reduce_(x, before)
        return torch.stack((out, x - before))

    results = Regions(2).run(work)
    total = summed(2, (2, 19), torch.float32)
    for result in results:
        assert torch.equal(result[:38], total.flatten())
        torch.testing.assert_close(result[38:], total.flatten())


@interpreted
def test_a_kernel_ends_when_its_peers_never_come_and_stop_is_set() -> None:
    regions = Regions(2)
    regions.stop[0] = 1

    def work(rank: int) -> Tensor:
        return kernels.all_reduce(share(rank, (19,), torch.float32))

    (result,) = regions.run(work, ranks=(1,))
    assert result.shape == (19,)


@pytest.mark.parametrize("num_ranks", peers.NUM_RANKS)
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_size_up_to_the_limit_fits_the_slabs(num_ranks: int, element_size: int) -> None:
    limit = max(kernels.ONE_SHOT_BYTES[num_ranks], kernels.TWO_SHOT_BYTES[num_ranks])
    for num_bytes in (element_size, 99 * element_size, 1 << 18, (1 << 18) + 4, 989 * 1000, limit):
        tile = kernels.tile_for(num_bytes, element_size, num_ranks)
        assert tile is not None
        each = tile.size * element_size * (num_ranks if tile.form == "two-shot" else 1)
        assert each <= peers.SLAB_BYTES
        assert each * peers.MAX_PROGRAMS >= num_bytes
    assert kernels.tile_for(limit + 1, element_size, num_ranks) is None


def test_gathers_use_at_most_all_programs_and_their_slabs() -> None:
    for num_rows in (1, 2, 19, 64, 128, 129, 989):
        for width in (1, 99, 18992, 75968):
            tile = kernels.gather_tile(num_rows, width, 2)
            if tile is not None:
                assert tile * 2 <= peers.SLAB_BYTES
                assert -(-width // tile) * num_rows <= peers.MAX_PROGRAMS


@pytest.mark.gpus
def test_gpus_agree_with_nccl_in_captured_graphs() -> None:
    num_ranks = max(num for num in peers.NUM_RANKS if num <= torch.cuda.device_count())
    script = Path(__file__).parents[2] / "scripts" / "bench" / "collectives.py"
    sizes = ["--rows", "1", "19", "129", "--hidden", "2880", "--vocab", "9973"]
    command = [sys.executable, str(script), "--ranks", str(num_ranks), *sizes]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {"one-shot", "two-shot", "fused", "gather, chosen", "sample, columns"} <= {
        line["form"] for line in lines
    }


class Plain:
    """A group without regions."""

    rank, size, peers, name = 0, 1, None, ""

    def all_reduce(self, x: Tensor) -> None:
        x *= 3

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def min_int(self, value: int) -> int:
        return value


@pytest.mark.parametrize("op", [kernels.all_reduce, collectives.all_reduce])
def test_without_regions_the_group_does_the_work(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(5)
    with collectives.using(Plain()):
        assert op(x).tolist() == [3.0] * 5
        assert kernels.gather_columns(x.view(1, 5), 4).tolist() == [[1.0] * 4]
    assert x.tolist() == [1.0] * 5
