"""The CPU kernels of layers with experts agree with `reference/` and read only what they need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import experts as cpu_experts
from nanovllm.kernels.cpu import library as cpu_library

_is_available, _reason = cpu_library.available()
pytestmark = pytest.mark.skipif(not _is_available, reason=f"no C++ compiler: {_reason}")

DTYPES = (torch.float32, torch.bfloat16)
# relative to the largest value: a sum in another order; a bf16 result may round to the neighbour
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
# experts, experts per token, hidden, width: odd sizes, whole steps, rows of several chunks
SIZES = [(4, 1, 99, 19), (8, 2, 64, 32), (60, 8, 131, 77), (128, 8, 33, 50), (4, 2, 1024, 515)]
TOKENS = [1, 3, 19, 64]
NAN = float("nan")


def layer(
    sizes: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `experts`; experts without tokens hold NaN."""
    num_experts, top_k, hidden, width = sizes
    weight_TK, expert_TK = reference.experts.topk_softmax(
        torch.randn(num_tokens, num_experts), top_k, True
    )
    unused = sorted(set(range(num_experts)) - set(expert_TK.flatten().tolist()))
    gate_up_EGD = torch.randn(num_experts, 2 * width, hidden) / hidden**0.5
    down_EDF = torch.randn(num_experts, hidden, width) / width**0.5
    gate_up_EGD[unused], down_EDF[unused] = NAN, NAN
    x_TD = torch.randn(num_tokens, hidden)
    return x_TD.to(dtype), weight_TK, expert_TK, gate_up_EGD.to(dtype), down_EDF.to(dtype)


def assert_matches(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape and out.is_contiguous()
    limit = TOLERANCE[expected.dtype] * max(1.0, expected.float().abs().max().item())
    assert (out.float() - expected.float()).abs().max().item() <= limit  # a NaN fails, too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts_match_reference(
    sizes: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype
) -> None:
    args = layer(sizes, num_tokens, dtype)
    residual_TD = torch.randn_like(args[0])
    assert_matches(cpu_experts.experts(*args), reference.experts.experts(*args))
    assert_matches(
        cpu_experts.experts(*args, residual_TD), reference.experts.experts(*args, residual_TD)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_expert_linear_matches_reference_for_rows_of_tokens_and_of_pairs(
    sizes: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype
) -> None:
    x_TD, _, expert_TK, gate_up_EGD, down_EDF = layer(sizes, num_tokens, dtype)
    inner_TKF = torch.randn(*expert_TK.shape, down_EDF.shape[2]).to(dtype)
    for args in ((x_TD, expert_TK, gate_up_EGD), (inner_TKF, expert_TK, down_EDF)):
        assert_matches(cpu_experts.expert_linear(*args), reference.experts.expert_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 100])
def test_all_tokens_may_choose_one_expert(num_tokens: int, dtype: torch.dtype) -> None:
    x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF = layer((7, 1, 77, 45), num_tokens, dtype)
    expert_TK.fill_(5)
    for matrices in (gate_up_EGD, down_EDF):
        used = torch.randn_like(matrices[5]) / 8
        matrices.fill_(NAN)
        matrices[5] = used
    args = (x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF)
    assert_matches(cpu_experts.experts(*args), reference.experts.experts(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_s_result_depends_on_neither_the_batch_nor_the_threads(dtype: torch.dtype) -> None:
    x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF = layer((5, 2, 192, 99), 70, dtype)
    gate_up_EGD, down_EDF = gate_up_EGD.nan_to_num(), down_EDF.nan_to_num()
    expert_TK[:40] = torch.tensor([3, 1], dtype=torch.int32)  # many rows, and few
    together_TD = cpu_experts.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF, x_TD)
    pairs_TKG = cpu_experts.expert_linear(x_TD, expert_TK, gate_up_EGD)
    num_threads = torch.get_num_threads()
    try:
        for threads, size in ((1, 1), (3, 1), (3, 13), (2, 70)):
            torch.set_num_threads(threads)
            for part in torch.arange(70).split(size):
                rows = (x_TD[part], weight_TK[part], expert_TK[part])
                alone_TD = cpu_experts.experts(*rows, gate_up_EGD, down_EDF, x_TD[part])
                assert torch.equal(alone_TD, together_TD[part])
                alone_TKG = cpu_experts.expert_linear(rows[0], rows[2], gate_up_EGD)
                assert torch.equal(alone_TKG, pairs_TKG[part])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("top_k", [1, 3])
def test_more_pairs_than_are_in_work_at_a_time_match_reference(top_k: int) -> None:
    args = layer((4, top_k, 8, 5), 8197, torch.float32)
    assert_matches(cpu_experts.experts(*args, args[0]), reference.experts.experts(*args, args[0]))
    x_TD, _, expert_TK, gate_up_EGD, _ = args
    assert_matches(
        cpu_experts.expert_linear(x_TD, expert_TK, gate_up_EGD),
        reference.experts.expert_linear(x_TD, expert_TK, gate_up_EGD),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_token_or_in_its_weights_stays_in_its_row(dtype: torch.dtype) -> None:
    x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF = layer((4, 2, 67, 33), 12, dtype)
    gate_up_EGD, down_EDF = gate_up_EGD.nan_to_num(), down_EDF.nan_to_num()
    expected = cpu_experts.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF)
    x_TD[2, 66], weight_TK[7, 1] = NAN, NAN
    out_TD = cpu_experts.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF)
    assert out_TD[[2, 7]].isnan().all()
    others = [row for row in range(12) if row not in (2, 7)]
    assert torch.equal(out_TD[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_an_earlier_call_is_not_read_from_buffers(dtype: torch.dtype) -> None:
    x_TD, *others = layer((4, 2, 256, 128), 64, dtype)
    assert cpu_experts.experts(torch.full_like(x_TD, NAN), *others).isnan().all()
    for sizes in SIZES:
        args = layer(sizes, 5, dtype)
        assert cpu_experts.experts(*args).isfinite().all()
        assert cpu_experts.expert_linear(args[0], *args[2:4]).isfinite().all()
        assert cpu_experts.experts(torch.full_like(x_TD, NAN), *others).isnan().all()


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_is_not_there_is_refused(wrong: int) -> None:
    x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF = layer((4, 2, 16, 8), 3, torch.float32)
    expert_TK[:] = torch.tensor([1, 2], dtype=torch.int32)
    expert_TK[2, 0] = wrong
    message = f"experts {min(wrong, 1)} to {max(wrong, 2)} are chosen, and there are 4"
    with pytest.raises(IndexError, match=message):
        cpu_experts.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF)
    with pytest.raises(IndexError, match=message):
        cpu_experts.expert_linear(x_TD, expert_TK, gate_up_EGD)


def test_layouts_and_dtypes_that_no_kernel_takes_match_reference() -> None:
    x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF = layer((4, 2, 16, 8), 5, torch.float32)
    expected = reference.experts.experts(x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF)
    strided_EDF = down_EDF.transpose(1, 2).contiguous().transpose(1, 2)
    wide_TD, wide_TK = torch.cat((x_TD, x_TD), 1)[:, :16], torch.cat((weight_TK, weight_TK), 1)
    rows = (wide_TD, wide_TK[:, :2], torch.cat((expert_TK, expert_TK), 1)[:, :2].long())
    assert_matches(cpu_experts.experts(*rows, gate_up_EGD, down_EDF), expected)
    assert_matches(cpu_experts.experts(*rows, gate_up_EGD, strided_EDF), expected)
    args = (x_TD.half(), weight_TK, expert_TK, gate_up_EGD.half(), down_EDF.half())
    assert torch.equal(cpu_experts.experts(*args), reference.experts.experts(*args))
    linear = (x_TD.double(), expert_TK, gate_up_EGD.double())
    assert torch.equal(cpu_experts.expert_linear(*linear), reference.experts.expert_linear(*linear))


def test_no_tokens_give_no_rows() -> None:
    x_TD, _, _, gate_up_EGD, down_EDF = layer((4, 2, 16, 8), 1, torch.float32)
    weight_TK, expert_TK = cpu_experts.topk_softmax(torch.empty(0, 4), 2, True)
    assert weight_TK.shape == expert_TK.shape == (0, 2)
    args = (x_TD[:0], weight_TK, expert_TK, gate_up_EGD, down_EDF)
    assert cpu_experts.experts(*args).shape == (0, 16)
    assert cpu_experts.expert_linear(x_TD[:0], expert_TK, gate_up_EGD).shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (4, 1), (8, 2), (60, 4), (128, 8), (7, 7)]
)
@pytest.mark.parametrize("num_tokens", [*TOKENS, 300])
def test_topk_softmax_matches_reference(
    num_tokens: int, num_experts: int, top_k: int, normalize: bool, dtype: torch.dtype
) -> None:
    wide_TE = torch.randn(num_tokens, num_experts + 3).mul_(3).to(dtype)
    wide_TE[:, num_experts:] = NAN  # of no expert
    logits_TE = wide_TE[:, :num_experts]
    weight_TK, expert_TK = cpu_experts.topk_softmax(logits_TE, top_k, normalize)
    wanted_TK, wanted_expert_TK = reference.experts.topk_softmax(logits_TE, top_k, normalize)
    assert expert_TK.dtype == wanted_expert_TK.dtype and weight_TK.dtype == wanted_TK.dtype
    assert torch.equal(expert_TK, wanted_expert_TK)
    torch.testing.assert_close(weight_TK, wanted_TK, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_among_equal_probabilities_the_smaller_id_comes_first(dtype: torch.dtype) -> None:
    inf = float("inf")
    logits_TE = torch.randint(-2, 3, (200, 60)).to(dtype)
    logits_TE[0], logits_TE[1, :] = 0, -inf
    logits_TE[1, 30] = 1  # the others have probability 0, as far below as these
    logits_TE[2, ::2], logits_TE[2, 1::2], logits_TE[2, 7] = -2000, -1000, 1000
    for top_k in (1, 2, 8, 60):
        weight_TK, expert_TK = cpu_experts.topk_softmax(logits_TE, top_k, False)
        wanted_TK, wanted_expert_TK = reference.experts.topk_softmax(logits_TE, top_k, False)
        assert torch.equal(expert_TK, wanted_expert_TK)
        torch.testing.assert_close(weight_TK, wanted_TK, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_rows_whose_probabilities_are_nan_have_nan_weights_and_valid_ids(value: float) -> None:
    logits_TE = torch.randn(9, 60)
    logits_TE[4, 59], logits_TE[6] = value, -float("inf")
    for normalize in (False, True):
        weight_TK, expert_TK = cpu_experts.topk_softmax(logits_TE, 8, normalize)
        wanted_TK, wanted_expert_TK = reference.experts.topk_softmax(logits_TE, 8, normalize)
        assert torch.equal(expert_TK, wanted_expert_TK)
        assert weight_TK[[4, 6]].isnan().all() and wanted_TK[[4, 6]].isnan().all()
        assert weight_TK.isnan().sum() == 16


def test_registering_makes_them_the_kernels_of_the_ops() -> None:
    cpu_experts.register()
    for name in ("topk_softmax", "experts", "expert_linear"):
        op = getattr(ops, name)
        assert ops.kernel_of(op, "CPU") is getattr(cpu_experts, name)
    args = layer((8, 2, 64, 32), 3, torch.float32)
    assert torch.equal(ops.experts(*args), cpu_experts.experts(*args))
