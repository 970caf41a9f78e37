"""The CPU kernels agree with `reference/` at odd sizes and read only memory that they own."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
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

_is_available, _reason = cpu_library.available()
pytestmark = pytest.mark.skipif(not _is_available, reason=f"no C++ compiler: {_reason}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative to the largest value: fp32 sums have another order; 16-bit results may round to the
# neighbour
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_matches(out: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    limit = (TOLERANCE[expected.dtype] if tolerance is None else tolerance) * max(
        1.0, expected.float().abs().max().item()
    )
    assert (out.float() - expected.float()).abs().max().item() <= limit  # a NaN fails, too


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small calls.

    On a busy machine a call that wakes threads may wait for a time slice.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def attention_case(
    seq_lens: list[int],
    q_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int = 0,
    max_q_len: int | None = None,
    num_extra_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float, int]:
    """Pages in random order. Slots of no row are NaN; table entries past a row's pages are -1."""
    kv_dtype = kv_dtype or dtype
    generator = torch.Generator().manual_seed(len(seq_lens) * 1000 + head_dim)
    num_rows = len(seq_lens)
    num_pages = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(num_pages) + 3
    k_cache_CBKH = torch.full(
        (num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=kv_dtype
    )
    v_cache_CBKH = k_cache_CBKH.clone()
    free = torch.randperm(num_blocks, generator=generator).tolist()
    block_table_RP = torch.full((num_rows, max(num_pages) + 2), -1, dtype=torch.int32)
    for row, seq_len in enumerate(seq_lens):
        for page in range(num_pages[row]):
            block, num_used = free.pop(), min(block_size, seq_len - page * block_size)
            block_table_RP[row, page] = block
            for cache in (k_cache_CBKH, v_cache_CBKH):
                cache[block, :num_used] = torch.randn(
                    num_used, num_kv_heads, head_dim, generator=generator
                ).to(kv_dtype)
    q_start_S = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    q_TNH = torch.randn(
        sum(q_lens) + num_extra_tokens, num_heads, head_dim, generator=generator
    ).to(dtype)
    max_q_len = max(q_lens) if max_q_len is None else max_q_len
    seq_len_R = torch.tensor(seq_lens, dtype=torch.int32)
    return (
        q_TNH,
        k_cache_CBKH,
        v_cache_CBKH,
        block_table_RP,
        seq_len_R,
        q_start_S,
        max_q_len,
        head_dim**-0.5,
        window,
    )


SEQ_LENS = [1, 19, 99, 0, 389, 16]
PROMPTS = [1, 19, 7, 0, 101, 16]  # whole prompts, and parts of prompts after a cached prefix


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


def assert_close_to_reference(out: Tensor, expected: Tensor) -> None:
    # a 16-bit result may round to the reference's neighbour, and an early rounding may pass through
    # a product
    torch.testing.assert_close(
        out, expected, rtol=4 * TOLERANCE[expected.dtype], atol=4 * TOLERANCE[expected.dtype]
    )


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
