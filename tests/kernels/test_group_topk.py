"""The choice of experts by score, bias and group in Triton is that of the reference."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.triton import group_topk

device = "cuda" if torch.cuda.is_available() else "cpu"
# (experts, experts per token, groups, chosen groups, scores by which a group is worth)
SIZES = [
    (1, 1, 1, 1, 2), (8, 2, 1, 1, 2), (60, 4, 1, 1, 2), (64, 6, 1, 1, 2), (12, 3, 4, 2, 2),
    (256, 8, 8, 4, 2), (160, 6, 8, 3, 1), (6, 3, 6, 3, 1), (7, 3, 7, 3, 1), (24, 4, 4, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_group_topk(sizes: tuple[int, int, int, int, int], sigmoid: bool) -> None:
    num_experts, top_k, *groups = sizes
    torch.manual_seed(num_experts)
    logits_TE = torch.randn(19, num_experts, device=device)
    logits_TE[0] = logits_TE[1].round()  # equals
    bias_E = torch.randn(num_experts, device=device) if sigmoid or groups[0] == 1 else None
    for normalize, smallest_sum, scale in ((True, 0.9, 2.5), (False, 0.5, 3.0)):
        rest = (top_k, *groups, sigmoid, normalize, smallest_sum, scale)
        weight_TK, expert_TK = group_topk.group_topk(logits_TE, bias_E, *rest)
        wanted_TK, wanted_expert_TK = reference.experts.group_topk(logits_TE, bias_E, *rest)
        assert torch.equal(expert_TK, wanted_expert_TK)
        torch.testing.assert_close(weight_TK, wanted_TK)


def test_equal_experts_and_groups_are_taken_in_their_order() -> None:
    logits_TE = torch.zeros(3, 12, device=device)
    rest = (3, 4, 2, 2, True, True, 1e-20, 1.0)
    expert_TK = group_topk.group_topk(logits_TE, None, *rest)[1]
    assert expert_TK.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(expert_TK, reference.experts.group_topk(logits_TE, None, *rest)[1])


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_a_row_with_nan_gets_nan_and_valid_experts_and_harms_no_other(
    sigmoid: bool, normalize: bool, num_groups: int
) -> None:
    logits_TE = torch.randn(3, 12, device=device)
    logits_TE[1, 4] = torch.nan
    rest = (3, num_groups, max(1, num_groups // 2), 2, sigmoid, normalize, 1e-20, 1.0)
    found, wanted = (
        choose(logits_TE, None, *rest)
        for choose in (group_topk.group_topk, reference.experts.group_topk)
    )
    assert found[0][1].isnan().all() and wanted[0][1].isnan().all()
    assert ((found[1] >= 0) & (found[1] < 12)).all()
    assert all(len(row.unique()) == 3 for row in found[1])
    for row in (0, 2):
        torch.testing.assert_close(found[0][row], wanted[0][row])
        assert torch.equal(found[1][row], wanted[1][row])


def test_no_rows_give_no_choice() -> None:
    weight_TK, expert_TK = group_topk.group_topk(
        torch.zeros(0, 12, device=device), None, 3, 4, 2, 2, True, True, 1e-20, 1.0
    )
    assert weight_TK.shape == expert_TK.shape == (0, 3)
