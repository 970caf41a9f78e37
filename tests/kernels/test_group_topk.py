"""The choice of experts by score, bias and group in Triton is that of the reference."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference
from nanovllm.kernels.triton import group_topk

device = "cuda" if torch.cuda.is_available() else "cpu"
# (experts, experts per token, groups, chosen groups)
SIZES = [(1, 1, 1, 1), (8, 2, 1, 1), (60, 4, 1, 1), (256, 8, 8, 4), (12, 3, 4, 2), (6, 3, 6, 3)]


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_group_topk(sizes: tuple[int, int, int, int], sigmoid: bool) -> None:
    num_experts, top_k, num_groups, top_groups = sizes
    torch.manual_seed(num_experts)
    logits_TE = torch.randn(5, num_experts, device=device)
    bias_E = torch.randn(num_experts, device=device) if sigmoid or num_groups == 1 else None
    for normalize, smallest_sum, scale in ((True, 0.9, 2.5), (False, 0.5, 3.0)):
        rest = (top_k, num_groups, top_groups, sigmoid, normalize, smallest_sum, scale)
        weight_TK, expert_TK = group_topk.group_topk(logits_TE, bias_E, *rest)
        wanted_TK, wanted_expert_TK = reference.experts.group_topk(logits_TE, bias_E, *rest)
        assert torch.equal(expert_TK, wanted_expert_TK)
        torch.testing.assert_close(weight_TK, wanted_TK)


def test_equal_experts_and_groups_are_taken_in_their_order() -> None:
    logits_TE = torch.zeros(3, 12, device=device)
    rest = (3, 4, 2, True, True, 1e-20, 1.0)
    expert_TK = group_topk.group_topk(logits_TE, None, *rest)[1]
    assert expert_TK.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(expert_TK, reference.experts.group_topk(logits_TE, None, *rest)[1])


def test_a_row_with_nan_gets_valid_experts_and_harms_no_other() -> None:
    logits_TE = torch.randn(3, 12, device=device)
    logits_TE[1, 4] = torch.nan
    rest = (3, 4, 2, True, True, 1e-20, 1.0)
    found, wanted = (
        choose(logits_TE, None, *rest)
        for choose in (group_topk.group_topk, reference.experts.group_topk)
    )
    assert found[0][1].isnan().all() and wanted[0][1].isnan().all()
    assert ((found[1] >= 0) & (found[1] < 12)).all()
    for row in (0, 2):
        torch.testing.assert_close(found[0][row], wanted[0][row])
        assert torch.equal(found[1][row], wanted[1][row])
