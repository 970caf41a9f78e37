"""Times a chain of decoder layers, as in a decode step: fused, and with cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from nanovllm.kernels.triton.attention_decode import paged_attention_decode
from nanovllm.kernels.triton.linear import fused_linear
from nanovllm.kernels.triton.norm_act import add_rms_norm, silu_mul
from nanovllm.kernels.triton.rope_store import qk_norm_rope_store
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.gpu_timing import time_launches
from scripts.bench.linear_cases import DTYPE
from scripts.bench.linear_tiles import MODELS, SHAPES


def bench_layer(model: str, num_rows: int, seq_len: int = 512) -> dict[str, float]:
    """Microseconds of one layer in a chain of as many as the model has: fused, and apart (cuBLAS
    with separate kernels for norm and activation); also of rope and attention alone."""
    config = CONFIGS[MODELS[model]]
    hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
    shapes = [SHAPES[f"{model} {part}"] for part in ("qkv", "out", "gate_up", "down")]
    layers = [
        [
            (torch.randn(2 * o if silu else o, d, device="cuda", dtype=DTYPE) / d**0.5)
            for o, d, _, silu in shapes
        ]
        for _ in range(num_layers)
    ]
    norms = [torch.rand(2, hidden, device="cuda").to(DTYPE) + 0.5 for _ in range(num_layers)]
    attention, caches = _attention(config, num_rows, seq_len)
    x0 = torch.randn(num_rows, hidden, device="cuda").to(DTYPE)

    def fused(first: Tensor) -> Tensor:
        h = first
        for (qkv, out, gate_up, down), norm, cache in zip(layers, norms, caches, strict=True):
            y = fused_linear(h, norm[0], qkv, None, None, 1e-6, False)
            h = fused_linear(attention(y, cache), None, out, None, h, 1e-6, False)
            y = fused_linear(h, norm[1], gate_up, None, None, 1e-6, True)
            h = fused_linear(y, None, down, None, h, 1e-6, False)
        return h

    def apart(first: Tensor) -> Tensor:
        x, h = torch.zeros_like(first), first
        for (qkv, out, gate_up, down), norm, cache in zip(layers, norms, caches, strict=True):
            x, h = add_rms_norm(x, h, norm[0], 1e-6)
            x, h = add_rms_norm(linear(attention(linear(x, qkv), cache), out), h, norm[1], 1e-6)
            x = linear(silu_mul(linear(x, gate_up)), down)
        return x + h

    h, h_apart = fused(x0), apart(x0)
    drift = float((h.float() - h_apart.float()).norm() / h_apart.float().norm())
    again = torch.equal(fused(x0), h)
    qkv0 = torch.randn(num_rows, shapes[0][0], device="cuda").to(DTYPE)
    result = {
        "fused": time_launches(fused, [(x0,)]) / num_layers,
        "apart": time_launches(apart, [(x0,)]) / num_layers,
        "attention": time_launches(attention, [(qkv0, cache) for cache in caches]),
    }
    print(
        f"layer {model} rows {num_rows:2}: fused {result['fused']:6.2f} µs, "
        f"apart {result['apart']:6.2f}, rope + attention alone {result['attention']:6.2f} | "
        f"after {num_layers} layers the streams differ by {drift:.1e}, same bits again: {again}",
        flush=True,
    )
    return result


def _attention(
    config: dict[str, int], num_rows: int, seq_len: int
) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
    """(rope, cache write and attention of one token per row, a cache for each layer)."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    heads = torch.rand(2, 128, device="cuda").to(DTYPE) + 0.5
    blocks = -(-(seq_len + 1) // 64)
    shape = (2, num_rows * blocks + 1, 64, num_kv_heads, 128)
    caches = [
        torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(config["num_hidden_layers"])
    ]
    block_ids = torch.arange(num_rows * blocks, device="cuda", dtype=torch.int32) + 1
    table = block_ids.view(num_rows, blocks)
    pos = torch.full((num_rows,), seq_len, device="cuda")
    slot = table[:, seq_len // 64].long() * 64 + seq_len % 64
    seq_lens = (pos + 1).int()
    cos_sin = torch.randn(1024, 128, device="cuda")

    def attention(qkv: Tensor, cache: Tensor) -> Tensor:
        q = qk_norm_rope_store(qkv, *heads, cos_sin, pos, slot, *cache, num_heads, 1e-6)
        return paged_attention_decode(q, *cache, table, seq_lens, 128**-0.5, 0).flatten(1)

    return attention, caches
