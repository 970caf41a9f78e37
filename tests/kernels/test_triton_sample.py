"""The Triton sampler agrees with the reference.

Greedy tokens are equal; drawn tokens may differ if the two best scores are almost equal.
"""

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.triton import sample as triton_sample

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(
    num_rows: int, vocab_size: int, dtype: torch.dtype, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_RV = (4 * torch.randn(num_rows, vocab_size, device=device)).to(dtype)
    seed_R = torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device)
    pos_R = torch.randint(40960, (num_rows,), device=device)
    return logits_RV, torch.full((num_rows,), temperature, device=device), seed_R, pos_R


def exact_scores(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """The reference's scores with logarithms in fp64."""
    uniform_RV = torch.exp(
        -torch.exp(-reference.sample.gumbel_noise(seed_R, pos_R, logits_RV.shape[1]).double())
    )
    # the fp32 noise determines which odd multiple of 2⁻²⁴ the uniform number is
    uniform_RV = (((uniform_RV * 2**24 - 1) / 2).round() * 2 + 1) / 2**24
    return logits_RV.double() / temperature_R.double().unsqueeze(1) - torch.log(
        -torch.log(uniform_RV)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(1, 1), (3, 19), (2, 1023), (7, 1025), (1, 9890), (5, 151936)]
)
def test_greedy_is_argmax(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits_RV, *rest = inputs(num_rows, vocab_size, dtype, 0.0)
    first_best_R = (logits_RV == logits_RV.max(-1, keepdim=True).values).int().argmax(-1)
    assert torch.equal(triton_sample.sample(logits_RV, *rest), first_best_R)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "temperature"), [(60, 989, 1.0), (130, 97, 0.6), (2, 151936, 1.3)]
)
def test_draws_equal_those_of_the_reference(
    num_rows: int, vocab_size: int, temperature: float, dtype: torch.dtype
) -> None:
    given = inputs(num_rows, vocab_size, dtype, temperature)
    actual_R, expected_R = triton_sample.sample(*given), reference.sample.sample(*given)
    score_RV = exact_scores(*given)
    lost_R1 = score_RV.max(-1, keepdim=True).values - score_RV.gather(1, actual_R.unsqueeze(1))
    assert float(lost_R1.max()) < 1e-4
    assert float((actual_R != expected_R).float().mean()) <= 1e-3


def test_each_row_of_a_batch_is_greedy_or_drawn_on_its_own() -> None:
    logits_RV, temperature_R, seed_R, pos_R = inputs(7, 2000, torch.bfloat16, 0.8)
    temperature_R[::2] = 0.0
    together_R = triton_sample.sample(logits_RV, temperature_R, seed_R, pos_R)
    for row in range(7):
        one = slice(row, row + 1)
        alone_R = triton_sample.sample(logits_RV[one], temperature_R[one], seed_R[one], pos_R[one])
        assert int(together_R[row]) == int(alone_R)
    assert torch.equal(together_R[::2], logits_RV[::2].float().argmax(-1))


def test_the_smallest_of_equal_tokens_wins() -> None:
    logits_RV = torch.zeros(2, 5000, device=device, dtype=torch.bfloat16)
    logits_RV[0, [17, 1041, 4000]] = 1.0
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    assert triton_sample.sample(
        logits_RV, torch.zeros(2, device=device), zeros, zeros
    ).tolist() == [17, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_and_padding_never_win(temperature: float) -> None:
    storage = torch.full((4, 3000), float("nan"), device=device)
    storage[0, :2500] = float("-inf")
    storage[0, 2049] = -3.0e38 if temperature else -1.0e30
    storage[1, :2500] = float("-inf")
    token_R = triton_sample.sample(storage[:, :2500], *inputs(4, 1, torch.float32, temperature)[1:])
    assert token_R.tolist() == [2049, *[reference.sample.NO_TOKEN] * 3]
    expected_R = reference.sample.sample(
        storage[:, :2500], *inputs(4, 1, torch.float32, temperature)[1:]
    )
    assert torch.equal(token_R, expected_R)


def test_nothing_is_launched_for_no_rows() -> None:
    assert triton_sample.sample(*inputs(0, 50, torch.float32, 0.0)).shape == (0,)
