"""The scales of an fp8 cache are close bounds of keys and values for every kind of checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.dense import kv_scales
from nanovllm.models.kv_scales import FP8_MAX, ROUNDING
from tests.conftest import save_tiny

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2, biases": ("qwen2", {}),
    "llama, rope that scales": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral, all heads": ("mistral", {"num_key_value_heads": 4}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CHECKPOINTS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    architecture, changes = CHECKPOINTS[request.param]
    folder = save_tiny(tmp_path_factory.mktemp("kv_scales"), architecture, **changes)
    return LLM(
        str(folder), device="cpu", enforce_eager=True, num_kvcache_blocks=20, max_model_len=256
    )


def test_no_key_and_no_value_passes_its_bound(llm: LLM) -> None:
    runner = llm.engine.runner
    prompts = [torch.randint(5, 512, (num,)).tolist() for num in (1, 19, 99)]
    llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False
    )
    for layer, cache in zip(runner.params.layers, runner.steps.caches, strict=True):
        for scale_K, x_CBKH in zip(
            kv_scales(runner.cfg, layer), (cache.k_CBKH, cache.v_CBKH), strict=True
        ):
            assert scale_K.dtype is torch.float32 and torch.equal(
                scale_K.log2(), scale_K.log2().round()
            )
            most_K = x_CBKH.abs().amax((0, 1, 3)) / scale_K
            assert (most_K <= FP8_MAX).all() and (most_K > 0).all()
            # below 2⁻⁶ a normalized number begins to lose bits; typical numbers are far above
            assert (most_K > 8).all(), most_K


def test_the_worst_hidden_state_reaches_the_bound_of_a_value(llm: LLM) -> None:
    cfg, layer = llm.engine.runner.cfg, llm.engine.runner.params.layers[0]
    _, v_scale_K = kv_scales(cfg, layer)
    v_rows_KHD = layer.qkv_ED[-cfg.num_kv_heads * cfg.head_dim :].view(
        cfg.num_kv_heads, cfg.head_dim, -1
    )
    bias_KH = torch.zeros(cfg.num_kv_heads, cfg.head_dim)
    if layer.qkv_bias_E is not None:
        bias_KH = layer.qkv_bias_E[-cfg.num_kv_heads * cfg.head_dim :].view_as(bias_KH)
    along_KHD = v_rows_KHD * layer.attn_norm_D
    normed_KHD = along_KHD / along_KHD.norm(dim=-1, keepdim=True) * math.sqrt(cfg.hidden_size)
    worst_K = ((normed_KHD * along_KHD).sum(-1) + bias_KH.abs()).amax(1)
    # rounding up to a power of two and the rounding margin are the only slack
    assert (worst_K <= v_scale_K * FP8_MAX).all()
    assert (worst_K > v_scale_K * FP8_MAX / (2 * ROUNDING) * 0.999).all()


def test_a_head_of_zeros_has_a_scale_that_divides() -> None:
    llm = LLM(
        "tiny-qwen3", device="cpu", enforce_eager=True, num_kvcache_blocks=70, max_model_len=64
    )
    runner = llm.engine.runner
    layer = runner.params.layers[0]
    layer = layer._replace(qkv_ED=torch.zeros_like(layer.qkv_ED))
    _, v_scale_K = kv_scales(runner.cfg, layer)
    assert (v_scale_K > 0).all() and v_scale_K.reciprocal().isfinite().all()
