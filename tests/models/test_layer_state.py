"""What layers keep: sizes, parts of ranks and groups follow from declarations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovllm.models.layer_state import (
    PagedKV,
    PagedLatent,
    Recurrent,
    StateTensor,
    page_groups,
    recurrent_bytes,
)

FULL, LOCAL = PagedKV(4, 16, 16), PagedKV(4, 16, 16, window=32)
STATE = Recurrent((StateTensor("conv", (3, 40)), StateTensor("delta", (8, 4, 5), torch.float32, 0)))


def test_bytes_follow_from_declarations() -> None:
    groups = page_groups([FULL] * 3, 999)
    assert groups.token_bytes(torch.bfloat16) == 3 * (4 * 16 + 4 * 16) * 2
    assert groups.block_bytes(19, torch.float8_e4m3fn) == 19 * groups.token_bytes(
        torch.float8_e4m3fn
    )
    uneven = page_groups([PagedKV(2, 24, 8)], 999)
    assert uneven.token_bytes(torch.float32) == 2 * (24 + 8) * 4
    latents = page_groups([PagedLatent(512, 64)] * 2, 999)
    assert latents.token_bytes(torch.bfloat16) == 2 * (512 + 64) * 2
    assert STATE.num_bytes(torch.bfloat16) == 3 * 40 * 2 + 8 * 4 * 5 * 4
    assert recurrent_bytes([FULL, STATE, STATE], torch.float32) == 2 * (3 * 40 + 8 * 4 * 5) * 4


def test_ranks_share_heads_and_parts_of_states() -> None:
    assert FULL.on_ranks(2) == PagedKV(2, 16, 16)
    assert replace(LOCAL, num_kv_heads=2).on_ranks(4) == replace(LOCAL, num_kv_heads=1)
    assert PagedLatent(512, 64).on_ranks(4) == PagedLatent(512, 64)
    assert [one.shape for one in STATE.on_ranks(4).tensors] == [(3, 40), (2, 4, 5)]
    with pytest.raises(ValueError, match="must divide the 8 parts of the state 'delta'"):
        STATE.on_ranks(3)


def test_what_no_op_reads_is_refused() -> None:
    page_groups([PagedLatent(512, 64)], 99).check()
    for size in (520, 508):
        with pytest.raises(ValueError, match=f"kv_lora_rank {size} is not supported: it must be a"):
            page_groups([PagedLatent(size, 64)], 99).check()
    with pytest.raises(ValueError, match="keys of size 24 with values of size 16"):
        page_groups([replace(FULL, key_size=24)], 99).check()
    page_groups([FULL, LOCAL], 99).check()
    with pytest.raises(ValueError, match="pages of different sizes"):
        page_groups([FULL, PagedKV(4, 24, 24)], 99)
    with pytest.raises(ValueError, match="no layer has a paged cache"):
        page_groups([STATE], 99)


def test_groups_share_tensors_and_waste_little() -> None:
    """One group for layers that keep the same; else a full group of each window, where possible."""
    alone = page_groups([LOCAL] * 5, 999)
    assert [group.layers for group in alone.groups] == [tuple(range(5))]
    assert alone.num_tensors == 5 and alone.windows == (32,)
    assert page_groups([FULL, LOCAL] * 2, 32).windows == (0,), "the window is never left"
    kept = [FULL if idx % 6 == 5 else LOCAL for idx in range(26)]  # Gemma-3-1B
    groups = page_groups(kept, 32_768)
    assert groups.num_tensors == 4 and groups.windows == (0, 32, 32, 32, 32, 32, 32)
    places = groups.places(26)
    assert len(set(places)) == 26 and None not in places
    assert [places[idx] for idx in (5, 11, 0, 1, 4)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert page_groups([STATE, FULL, STATE], 99).places(3) == [None, (0, 0), None]
    reduced = groups.of_layers([0, 5])
    assert reduced.windows == groups.windows and reduced.places(2) == [(1, 0), (0, 0)]
