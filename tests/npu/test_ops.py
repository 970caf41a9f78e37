"""Our ops as Ascend's ops give their plain meaning, in interpreted graphs and eagerly.

On a device fused_infer_attention_score does not support fp32. Here fp32 shows that the two sides
differ only by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nanovllm.kernels import ops, reference
from nanovllm.kernels.npu import attention as npu_attention
from tests.npu.op_runs import compare

N, K, H, B, C, D = 4, 2, 64, 128, 9, 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_norms_activation_and_products(
    run: Callable[..., Any], num_tokens: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(num_tokens, D), torch.randn(D)
    compare(
        run,
        ops.rms_norm,
        reference.norm_act.rms_norm,
        {"x": x, "weight": weight},
        1e-6,
        dtype=dtype,
    )
    tensors = {"x": x, "residual": torch.randn_like(x), "weight": weight}
    compare(run, ops.add_rms_norm, reference.norm_act.add_rms_norm, tensors, 1e-5, dtype=dtype)
    compare(run, ops.silu_mul, reference.norm_act.silu_mul, {"x": x}, dtype=dtype)
    weight, bias = torch.randn(33, D), torch.randn(33)
    compare(
        run,
        ops.linear,
        reference.linear.linear,
        {"x": x, "weight": weight, "bias": bias},
        dtype=dtype,
    )
    compare(
        run,
        lambda x, w: ops.linear(x, w, None),
        lambda x, w: x @ w.T,
        {"x": x, "w": weight},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_rope_and_cache_write(run: Callable[..., Any], num_tokens: int, dtype: torch.dtype) -> None:
    angle = torch.randn(99, H // 2)
    table, pos = torch.cat((angle.cos(), angle.sin()), dim=-1), torch.randint(0, 99, (num_tokens,))
    tensors = {"x": torch.randn(num_tokens, N, H), "cos_sin": table, "pos": pos}
    compare(run, ops.rope, reference.rope_store.rope, tensors, dtype=dtype, kept=("cos_sin",))

    def store(*args: Any) -> Tensor:
        ops.store_kv(*args)
        return args[4] + 1  # a graph must have a result

    def meaning(*args: Any) -> Tensor:
        reference.rope_store.store_kv(*args)
        return args[4] + 1

    slot = torch.randperm(C * B)[:num_tokens]
    tensors = {
        "k": torch.randn(num_tokens, K, H), "v": torch.randn(num_tokens, K, H),
        "k_cache": torch.randn(C, B, K, H), "v_cache": torch.randn(C, B, K, H), "slot": slot,
    }  # fmt: skip
    compare(run, store, meaning, tensors, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize(
    ("lengths", "num_padding"),
    [
        ([(1, 1)], 0),
        ([(1, 257), (1, 1), (1, 128)], 0),
        ([(19, 19)], 0),
        ([(3, 140), (1, 1), (20, 129)], 7),
        ([], 16),
    ],
    ids=str,
)
def test_attention(
    run: Callable[..., Any],
    lengths: list[tuple[int, int]],
    num_padding: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    """(new tokens, all tokens) per row, then padding tokens; unused cache slots are NaN."""
    num_rows, num_tokens = (
        max(1, len(lengths)) + (num_padding > 0),
        sum(new for new, _ in lengths) + num_padding,
    )
    is_decode = all(new == 1 for new, _ in lengths) and not num_padding
    caches = [torch.full((C, block_size, K, H), float("nan")) for _ in "kv"]
    table, seq_len, q_start = (
        torch.zeros(num_rows, 3).int(),
        torch.zeros(num_rows).int(),
        torch.zeros(num_rows + 1).int(),
    )
    blocks = iter(range(1, C))
    for row, (new, total) in enumerate(lengths):
        seq_len[row], q_start[row + 1 :] = total, q_start[row] + new
        for start in range(0, total, block_size):
            table[row, start // block_size] = block = next(blocks)
            for cache in caches:
                cache[block, : total - start] = torch.randn_like(cache[block, : total - start])
    tensors = {
        "q": torch.randn(num_tokens, N, H), "k_cache": caches[0], "v_cache": caches[1],
        "table": table, "seq_len": seq_len, "q_start": q_start,
    }  # fmt: skip
    used = int(q_start[-1]) if not is_decode else num_tokens

    def op(*args: Any) -> Tensor:
        return ops.paged_attention(*args)[:used] if used else ops.paged_attention(*args).new_ones(1)

    def meaning(*args: Any) -> Tensor:
        return reference.attention.paged_attention(*args)[:used] if used else torch.ones(1)

    compare(run, op, meaning, tensors, 1 if is_decode else num_tokens, 0.125, 0, dtype=dtype)


def test_softplus_and_relu(run: Callable[..., Any]) -> None:
    """Of small and large numbers: above 20 torch's softplus returns them."""
    x = torch.cat((torch.randn(9), torch.tensor([-300.0, -20.0, 0.0, 19.9, 20.1, 300.0])))
    compare(run, softplus, softplus, {"x": x})
    compare(run, torch.relu, torch.relu, {"x": x})


@pytest.mark.parametrize("vocab_size", [19, 989])
def test_drawing_is_exact(run: Callable[..., Any], vocab_size: int) -> None:
    """The hash without exclusive or and shifts is exact: every token equals the CPU's."""
    logits = torch.randn(64, vocab_size)
    logits[::9, : vocab_size // 2], logits[::9, vocab_size // 2 :] = torch.nan, -torch.inf
    logits[4:12, ::3] = torch.nan
    temperature = torch.rand(64) * 2
    temperature[:8] = 0.0
    seed = torch.randint(-(2**63), 2**63 - 1, (64,))
    pos = torch.randint(0, 100_000, (64,))
    inputs = {
        "logits": logits.npu(),
        "temperature": temperature.npu(),
        "seed": seed.npu(),
        "pos": pos.npu(),
    }
    (token,) = run(ops.sample, inputs)
    expected = reference.sample.sample(logits, temperature, seed, pos)
    assert torch.equal(token.cpu(), expected)
    assert torch.equal(token.cpu()[1:4], logits[1:4].argmax(-1)) and not torch.equal(
        expected, logits.argmax(-1)
    )
    assert (token.cpu()[::9] == reference.sample.NO_TOKEN).all() and (token.cpu()[10:18] >= 0).all()


def test_attention_that_the_op_does_not_do_is_refused() -> None:
    q = torch.zeros(3, N, H)
    cache, table = torch.zeros(C, 64, K, H), torch.zeros(3, 2, dtype=torch.int32)
    lengths, starts = torch.ones(3, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    with pytest.raises(
        ValueError, match="kvcache_block_size is 64: on an NPU it must be a multiple of 128"
    ):
        npu_attention.paged_attention_in_graph(q, cache, cache, table, lengths, starts, 3, 1.0, 0)
    with pytest.raises(
        ValueError, match="a sliding window of 32 tokens: attention windows are not supported"
    ):
        npu_attention.paged_attention_in_graph(q, cache, cache, table, lengths, starts, 1, 1.0, 32)


@pytest.mark.parametrize("wrong", ["table dtype", "lengths", "head size", "q dtype"])
def test_shapes_and_dtypes_that_torchair_would_accept_are_refused(wrong: str) -> None:
    q, cache = torch.zeros(3, N, H), torch.zeros(C, B, K, H)
    table, lengths, starts = torch.zeros(3, 2).int(), torch.ones(3).int(), torch.arange(4).int()
    if wrong == "table dtype":
        table = table.long()
    elif wrong == "lengths":
        lengths = lengths[:2]
    elif wrong == "head size":
        q = q[..., :32]
    else:
        q = q.half()
    with pytest.raises(AssertionError):
        npu_attention.paged_attention_in_graph(q, cache, cache, table, lengths, starts, 1, 1.0, 0)
