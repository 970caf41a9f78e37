"""The meanings in expert_semantics.py equal torch's functions and invert one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.npu import expert_semantics as semantics

ROUTING: dict[str, Any] = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True}


@pytest.mark.parametrize(("num_experts", "k"), [(3, 1), (19, 4), (128, 8)])
def test_gating_is_torchs_topk_of_softmax(num_experts: int, k: int) -> None:
    x = torch.randn(7, num_experts)
    y, expert, row = semantics.moe_gating_top_k_softmax(x, k=k)
    values, indices = x.softmax(-1).topk(k)
    torch.testing.assert_close(y, values)
    assert torch.equal(expert.long(), indices)
    assert row.tolist() == [[column * 7 + token for column in range(k)] for token in range(7)]


def test_gating_keeps_the_dtype_and_does_not_normalise() -> None:
    y, _, _ = semantics.moe_gating_top_k_softmax(torch.randn(5, 16).bfloat16(), k=3)
    assert y.dtype == torch.bfloat16 and (y.float().sum(-1) < 0.99).any()


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 4, 2), (19, 5, 3), (6, 40, 1)])
def test_routing_sorts_by_expert_and_finalizing_returns(
    num_tokens: int, num_experts: int, k: int
) -> None:
    x = torch.randn(num_tokens, 8)
    expert = torch.rand(num_tokens, num_experts).topk(k).indices.int()
    rows, place, counts, _ = semantics.moe_init_routing_v2(
        x, expert, expert_num=num_experts, active_expert_range=[0, num_experts], **ROUTING
    )
    assert torch.equal(counts, torch.bincount(expert.flatten(), minlength=num_experts))
    # the rows of expert e are those of the tokens that chose it
    for number, part in enumerate(rows.split(counts.tolist())):
        expected = x[(expert == number).any(-1)]
        assert torch.equal(part.sort(0).values, expected.sort(0).values)
    assert torch.equal(rows[place.long()], x.repeat_interleave(k, 0))
    scales = torch.rand(num_tokens, k)
    out = semantics.moe_finalize_routing(rows, None, None, None, scales, place, None, 2)
    torch.testing.assert_close(out, x * scales.sum(-1, keepdim=True))


def test_the_other_order_of_finalizing_is_column_by_column() -> None:
    rows, scales = torch.randn(6, 4), torch.rand(3, 2)
    index = torch.randperm(6).int()
    by_column = index.view(3, 2).T.reshape(-1).contiguous()
    one = semantics.moe_finalize_routing(rows, None, None, None, scales, index, None, 2)
    other = semantics.moe_finalize_routing(rows, None, None, None, scales, by_column, None, 0)
    assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 1], [2, 2, 2]], ids=str)
def test_grouped_products_are_products(sizes: list[int]) -> None:
    x, weight = torch.randn(sum(sizes), 6), torch.randn(3, 6, 5)
    group_list = torch.tensor(sizes)
    settings: dict[str, Any] = {"group_type": 0, "split_item": 2}
    (y,) = semantics.grouped_matmul(
        [x], [weight], group_list=group_list, group_list_type=1, **settings
    )
    owner = torch.arange(3).repeat_interleave(group_list)
    torch.testing.assert_close(y, torch.einsum("pa,pab->pb", x, weight[owner]))
    (same,) = semantics.grouped_matmul([x], [weight], group_list=group_list.cumsum(0), **settings)
    assert torch.equal(same, y)


def test_rows_that_no_group_has_are_not_written() -> None:
    def products(*sizes: int) -> torch.Tensor:
        (y,) = semantics.grouped_matmul(
            [torch.zeros(5, 4)], [torch.zeros(2, 4, 3)], group_list=torch.tensor(sizes),
            group_type=0, split_item=2, group_list_type=1,
        )  # fmt: skip
        return y

    assert products(2, 2).isnan().any(-1).tolist() == [False] * 4 + [True]
    with pytest.raises(AssertionError, match="groups"):
        products(2, 4)


def test_an_expert_that_is_not_there_is_found() -> None:
    with pytest.raises(AssertionError, match="experts"):
        semantics.moe_init_routing_v2(
            torch.zeros(1, 4), torch.tensor([[5]]).int(), expert_num=5,
            active_expert_range=[0, 5], **ROUTING,
        )  # fmt: skip
