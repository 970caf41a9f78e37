"""Attention on a CPU agrees with `reference/` at odd sizes and reads only memory that it owns."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.cpu import attention as cpu_attention
from tests.kernels.cpu_cases import (
    DTYPES,
    NEEDS_COMPILER,
    PROMPTS,
    SEQ_LENS,
    assert_close_to_reference,
    assert_matches,
    attention_case,
    one_thread,
)

__all__ = ["one_thread"]  # a fixture
pytestmark = NEEDS_COMPILER


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("q_lens", [[1] * 6, PROMPTS], ids=["decode", "prefill"])
def test_paged_attention_matches_reference_at_every_head_size(
    dtype: torch.dtype, head_dim: int, q_lens: list[int]
) -> None:
    case = attention_case(SEQ_LENS, q_lens, head_dim=head_dim, dtype=dtype)
    assert_matches(cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1), (14, 2), (16, 2), (71, 1)], ids=str)
@pytest.mark.parametrize("q_lens", [[1] * 6, PROMPTS], ids=["decode", "prefill"])
def test_paged_attention_matches_reference_at_every_group_size(
    dtype: torch.dtype, heads: tuple[int, int], q_lens: list[int]
) -> None:
    case = attention_case(SEQ_LENS, q_lens, num_heads=heads[0], num_kv_heads=heads[1], dtype=dtype)
    assert_matches(cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case))


@pytest.mark.parametrize("window", [1, 19, 64, 99, 1000])
@pytest.mark.parametrize("block_size", [1, 16, 19])
@pytest.mark.parametrize("q_lens", [[1] * 6, PROMPTS], ids=["decode", "prefill"])
def test_paged_attention_sees_only_its_window(
    window: int, block_size: int, q_lens: list[int]
) -> None:
    case = attention_case(SEQ_LENS, q_lens, window=window, block_size=block_size)
    assert_matches(cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case))


@pytest.mark.parametrize("seq_len", [1, 19, 99, 127, 128, 129, 989])
def test_a_long_prompt_and_its_decode_match_reference(seq_len: int) -> None:
    prompt = attention_case([seq_len], [seq_len], head_dim=32)
    assert_matches(
        cpu_attention.paged_attention(*prompt), reference.attention.paged_attention(*prompt)
    )
    decode = attention_case([seq_len], [1], head_dim=32)
    assert_matches(
        cpu_attention.paged_attention(*decode), reference.attention.paged_attention(*decode)
    )


def test_rows_that_decode_and_rows_that_prefill_share_a_batch() -> None:
    case = attention_case([989, 19, 99, 1, 5], [1, 19, 1, 1, 2])
    assert_matches(cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case))


def test_tokens_of_no_row_give_zeros() -> None:
    q_TNH, k, v, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, window = attention_case(
        [19, 0, 99], [19, 4, 5], num_extra_tokens=7
    )
    q_start_S += 3  # tokens before the first row, of the empty row, and after the last one
    case = (q_TNH, k, v, block_table_RP, seq_len_R, q_start_S, max_q_len, scale, window)
    out_TNH = cpu_attention.paged_attention(*case)
    assert_matches(out_TNH, reference.attention.paged_attention(*case))
    assert not out_TNH[:3].any() and not out_TNH[22:26].any() and not out_TNH[31:].any()
    assert out_TNH[3:22].any() and out_TNH[26:31].any()


def test_a_batch_of_padding_gives_zeros() -> None:
    for q_lens, max_q_len in (([1, 1], 1), ([0, 0], 5)):
        case = attention_case(
            [0, 0], q_lens, max_q_len=max_q_len, num_extra_tokens=0 if max_q_len == 1 else 5
        )
        assert not cpu_attention.paged_attention(*case).any()


def test_decode_does_not_read_q_start() -> None:
    case = list(attention_case([5, 19], [1, 1]))
    expected = cpu_attention.paged_attention(*case)
    case[5] = torch.full_like(case[5], 1 << 30)
    assert torch.equal(cpu_attention.paged_attention(*case), expected)


@pytest.mark.parametrize(
    "dtype,kv_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("q_lens", [[1] * 6, PROMPTS], ids=["decode", "prefill"])
def test_queries_and_cache_may_differ_in_dtype(
    dtype: torch.dtype, kv_dtype: torch.dtype, q_lens: list[int]
) -> None:
    case = attention_case(SEQ_LENS, q_lens, dtype=dtype, kv_dtype=kv_dtype)
    assert_matches(cpu_attention.paged_attention(*case), reference.attention.paged_attention(*case))


@pytest.mark.parametrize("q_lens", [[1] * 6, PROMPTS], ids=["decode", "prefill"])
def test_views_of_larger_tensors_are_read_in_place(q_lens: list[int]) -> None:
    q_TNH, k_cache, v_cache, block_table_RP, seq_len_R, q_start_S, *rest = attention_case(
        SEQ_LENS, q_lens
    )
    expected = reference.attention.paged_attention(
        q_TNH, k_cache, v_cache, block_table_RP, seq_len_R, q_start_S, *rest
    )
    qkv_TXH = torch.cat((torch.full_like(q_TNH, float("nan")), q_TNH), dim=1)
    kv_cache_2CBKH = torch.stack((k_cache, v_cache))
    table_and_more_RP = torch.cat((block_table_RP, block_table_RP), dim=1).long()
    out_TNH = cpu_attention.paged_attention(
        qkv_TXH[:, q_TNH.shape[1] :],
        *kv_cache_2CBKH.unbind(0),
        table_and_more_RP[:, : block_table_RP.shape[1]],
        seq_len_R.long(),
        q_start_S.long(),
        *rest,
    )
    assert out_TNH.is_contiguous()
    assert_matches(out_TNH, expected)
    transposed = q_TNH.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_matches(
        cpu_attention.paged_attention(
            transposed, k_cache, v_cache, block_table_RP, seq_len_R, q_start_S, *rest
        ),
        expected,
    )


def test_a_result_depends_on_neither_the_batch_nor_the_threads() -> None:
    case = attention_case([989, 19, 300], [1, 1, 1])
    q_TNH, k, v, block_table_RP, seq_len_R, q_start_S, *rest = case
    together = cpu_attention.paged_attention(*case)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(3):
            one = slice(row, row + 1)
            alone = cpu_attention.paged_attention(
                q_TNH[one], k, v, block_table_RP[one], seq_len_R[one], q_start_S[:2], *rest
            )
            assert torch.equal(alone, together[one])
    finally:
        torch.set_num_threads(num_threads)


def test_large_scores_do_not_overflow() -> None:
    q_TNH, *rest = attention_case([99, 300], [99, 7])
    for factor in (30.0, 1000.0):
        case = (q_TNH * factor, *rest)
        assert_matches(
            cpu_attention.paged_attention(*case),
            reference.attention.paged_attention(*case),
            tolerance=1e-3,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(7, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("has_norm", [(True, True), (False, False)], ids=["norms", ""])
@pytest.mark.usefixtures("one_thread")
def test_qk_norm_rope_store_matches_reference(
    dtype: torch.dtype, head_dim: int, heads: tuple[int, int], has_norm: tuple[bool, bool]
) -> None:
    (num_heads, num_kv_heads), block_size, num_blocks = heads, 19, 7
    for num_tokens, index_dtype in ((1, torch.int32), (19, torch.int64), (99, torch.int32)):
        generator = torch.Generator().manual_seed(head_dim + num_tokens)
        wide_TE = torch.randn(
            num_tokens, (num_heads + 2 * num_kv_heads) * head_dim + 5, generator=generator
        ).to(dtype)
        qkv_TE = wide_TE[:, :-5]
        q_norm_H, k_norm_H = (
            torch.randn(head_dim, generator=generator).to(dtype) if has else None
            for has in has_norm
        )
        angle_Mh = torch.randn(120, head_dim // 2, generator=generator)
        cos_sin_MH = torch.cat((angle_Mh.cos(), angle_Mh.sin()), dim=1)
        pos_T = torch.randperm(120, generator=generator)[:num_tokens].to(index_dtype)
        slot_T = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens].to(
            index_dtype
        )
        results = []
        for module in (cpu_attention, reference.rope_store):
            k_cache, v_cache = torch.zeros(
                2, num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype
            )
            q_TNH = module.qk_norm_rope_store(
                qkv_TE,
                q_norm_H,
                k_norm_H,
                cos_sin_MH,
                pos_T,
                slot_T,
                k_cache,
                v_cache,
                num_heads,
                1e-6,
            )
            results.append((q_TNH, k_cache, v_cache))
        for out, expected in zip(*results):
            assert_close_to_reference(out, expected)


def test_qk_norm_rope_store_writes_a_part_of_a_larger_cache() -> None:
    qkv_TE, cos_sin_MH = torch.randn(3, 4 * 32), torch.randn(9, 32)
    pos_T, slot_T = torch.tensor([0, 8, 3]), torch.tensor([5, 0, 11])
    together_CB2KH, k_cache, v_cache = (
        torch.zeros(3, 4, 2, 1, 32),
        torch.zeros(3, 4, 1, 32),
        torch.zeros(3, 4, 1, 32),
    )
    args = (qkv_TE, None, None, cos_sin_MH, pos_T, slot_T)
    q_TNH = cpu_attention.qk_norm_rope_store(*args, *together_CB2KH.unbind(2), 2, 1e-6)
    assert_matches(q_TNH, reference.rope_store.qk_norm_rope_store(*args, k_cache, v_cache, 2, 1e-6))
    assert_matches(together_CB2KH, torch.stack((k_cache, v_cache), dim=2))
