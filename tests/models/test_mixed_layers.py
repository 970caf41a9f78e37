"""Layers of one model may differ in their parameters: such an architecture runs in an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.kernels import ops, reference
from nanovllm.models import dense, registry
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Batch, LayerCache, LayerCall, LayerKind, Model, Param
from nanovllm.models.rope import rotary_table
from nanovllm.startup.compile_farm import builder
from nanovllm.startup.resolve import resolve_without_weights
from tests.models.harness import engine_logits, load, max_difference, sequences

NAME, VOCAB_SIZE, TOLERANCE = "MixedForCausalLM", 128, 1e-4
KEPT = PagedKV(2, 32, 32)
NARROW, WIDE = LayerKind("narrow", KEPT), LayerKind("wide_window9", replace(KEPT, window=9))
# the last layer's kind occurs before it, and the layers of one kind are not neighbours
KINDS = (WIDE, NARROW, NARROW, WIDE, NARROW)
SIZES: dict[str, Any] = {"max_num_seqs": 2, "graph_batch_sizes": [2], "max_num_batched_tokens": 64}


class Layer(NamedTuple):
    """The wide kind has an MLP of twice the size, the narrow kind a bias in it."""

    norm_D: Tensor
    qkv_ED: Weight
    out_DQ: Weight
    up_FD: Weight
    up_bias_F: Tensor | None
    down_DF: Weight


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: Layer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """Attention and MLP side by side, on one norm."""
    x_TD = ops.rms_norm(h_TD, w.norm_D, cfg.norm_eps)
    qkv_TNH = linear(x_TD, w.qkv_ED, None).view(x_TD.shape[0], -1, cfg.head_dim)
    q_TNH, k_TKH, v_TKH = qkv_TNH.split([cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads], 1)
    q_TNH = ops.rope(q_TNH, cos_sin_MH, batch.rope_pos_T)
    k_TKH = ops.rope(k_TKH, cos_sin_MH, batch.rope_pos_T)
    ops.store_kv(k_TKH, v_TKH, kv.k_CBKH, kv.v_CBKH, batch.slot_T, kv.k_scale_K, kv.v_scale_K)
    o_TNH = ops.ATTENTION[call.attention](
        q_TNH, kv.k_CBKH, kv.v_CBKH, batch.block_table_RP, batch.seq_len_R, batch.q_start_S,
        call.max_q_len, cfg.head_dim**-0.5, call.kind.window, kv.k_scale_K, kv.v_scale_K,
    )  # fmt: skip
    o_TQ = o_TNH.flatten(1)
    if batch.keep_R is not None:
        o_TQ, h_TD, x_TD = (t.index_select(0, batch.keep_R) for t in (o_TQ, h_TD, x_TD))
    h_TD = linear(o_TQ, w.out_DQ, None, h_TD)
    return linear(torch.relu(linear(x_TD, w.up_FD, w.up_bias_F)), w.down_DF, None, h_TD)


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    prefix, hidden = f"blocks.{layer_idx}.", cfg.hidden_size
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    ffn_size = cfg.ffn_size * (2 if kind is WIDE else 1)
    qkv = tuple(prefix + c for c in "qkv")
    declared = {
        "norm_D": Param.one("norm", prefix + "norm", hidden),
        "qkv_ED": Param.stack("linear", qkv, (q_size, kv_size, kv_size), hidden),
        "out_DQ": Param.one("linear", prefix + "out", hidden, q_size, shard_axis=1),
        "up_FD": Param.one("linear", prefix + "up", ffn_size, hidden, shard_axis=0),
        "down_DF": Param.one("linear", prefix + "down", hidden, ffn_size, shard_axis=1),
    }
    if kind is NARROW:
        declared["up_bias_F"] = Param.one("bias", prefix + "up_bias", ffn_size, shard_axis=0)
    return declared


def mixed(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    cfg = dense_config(hf, architecture=NAME, dtype=dtype, max_model_len=max_model_len)
    return replace(
        dense.dense_model(cfg),
        layer_kinds=KINDS,
        layer=layer,
        layer_params=layer_params,
        layer_type=lambda kind: Layer,
        kv_scales=None,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the architecture, which the registry knows meanwhile."""
    folder = tmp_path_factory.mktemp("mixed")
    config = {
        "model_type": "llama", "architectures": [NAME], "vocab_size": VOCAB_SIZE, "hidden_size": 56,
        "intermediate_size": 72, "num_hidden_layers": len(KINDS), "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "eos_token_id": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig

    generator = torch.Generator().manual_seed(3)
    model = mixed(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    drawn = {
        source: torch.randn(part, *param.shape[1:], generator=generator) * 0.2
        + (param.kind == "norm")
        for group in model.declared
        for param in group.values()
        for source, part in zip(param.sources, param.parts)
    }
    save_file(drawn, folder / "model.safetensors")
    registry.ARCHITECTURES[NAME] = mixed
    yield folder
    del registry.ARCHITECTURES[NAME]


def expected_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """The whole sequence at once, without a cache, in plain torch on the checkpoint's tensors."""
    from transformers import AutoConfig

    stored = load_file(folder / "model.safetensors")
    cfg = mixed(AutoConfig.from_pretrained(folder), dtype=torch.float32).config
    length, groups = len(token_ids), cfg.num_heads // cfg.num_kv_heads
    table = rotary_table(cfg.inv_freq, cfg.rope_scale, length, torch.device("cpu"))
    norm = partial(torch.nn.functional.rms_norm, normalized_shape=(56,), eps=cfg.norm_eps)
    pos = torch.arange(length)
    h = stored["model.embed_tokens.weight"][token_ids]
    for layer_idx, kind in enumerate(KINDS):
        w = {
            name: stored.get(f"blocks.{layer_idx}.{name}")
            for name in ("norm", *"qkv", "out", "up", "down")
        }
        bias = stored.get(f"blocks.{layer_idx}.up_bias", torch.zeros(()))
        assert (kind is WIDE) == (w["up"].shape[0] == 2 * 72) == (not bias.dim())
        x = norm(h, weight=w["norm"])
        q, k, v = ((x @ w[c].T).view(length, -1, 32) for c in "qkv")
        q, k = reference.rope_store.rope(q, table, pos), reference.rope_store.rope(k, table, pos)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        distance = pos[:, None] - pos
        seen = (distance >= 0) & (distance < (kind.window or length))
        scores = torch.einsum("qnh,knh->nqk", q, k) / 32**0.5
        o = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.transpose(0, 1)
        mlp = torch.relu(x @ w["up"].T + bias) @ w["down"].T
        h = h + o.transpose(0, 1).flatten(1) @ w["out"].T + mlp
    return norm(h, weight=stored["model.norm.weight"]) @ stored["lm_head.weight"].T


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_logits_are_those_of_plain_torch(mode: str, checkpoint: Path, device: str) -> None:
    runner = load(checkpoint, device, enforce_eager=mode == "eager", **SIZES)
    assert (runner.compiler.lowering is None) == (mode == "eager")
    for lengths in (((1, 6), (99, 102)), ((19, 24), (32, 33))):
        known = sequences(VOCAB_SIZE, *lengths)
        expected = [expected_logits(checkpoint, one.token_ids) for one in known]
        assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


def test_int8_weights_are_near(checkpoint: Path) -> None:
    known = sequences(VOCAB_SIZE, (19, 24))
    plain, int8 = (
        engine_logits(load(checkpoint, "cpu", enforce_eager=True, quantization=how), known)[0]
        for how in (None, "int8")
    )
    assert 1e-4 < (int8 - plain).std() / plain.std() < 0.05


def test_the_reduced_model_leaves_every_program_of_the_whole_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Programs of two kinds are told apart; a store that is filled without weights is complete."""
    options = {**SIZES, "device": "cpu", "dtype": "float32", "max_model_len": 128,
               "kvcache_block_size": 16, "num_kvcache_blocks": 40,
               "compile_cache": tmp_path / "store"}  # fmt: skip
    resolved = resolve_without_weights(EngineConfig(str(checkpoint), **options))
    small = builder.small_runner(resolved)
    assert small.model.layer_kinds == (WIDE, NARROW, NARROW)
    for kind, size in resolved.spec.layout.buckets:
        small.run_bucket(kind, size)
    runner = load(checkpoint, **options, compile_cache_mode="require")
    assert runner.model.distinct_layers == (0, 1, 4)
    assert not runner.model.last_layer_needs_own_program
    compiler = runner.compiler
    assert (compiler.num_compiled, compiler.num_loaded) == (0, small.compiler.num_compiled)
    names = {"_".join(map(str, key)) for key in compiler._programs}
    for program in ("layer_prefill_64_2_wide_window9", "layer_decode_2_2_narrow"):
        assert program in names
    assert {name for name in names if name.startswith("last")} == {
        f"last_layer_prefill_{tokens}_2_narrow" for tokens in runner.layout.prefill_tokens
    }


def test_a_model_without_a_bound_refuses_an_fp8_cache(checkpoint: Path) -> None:
    message = f"kv_cache_dtype is 'fp8', but {NAME} has no bound for its keys and values"
    with pytest.raises(ValueError, match=message):
        load(checkpoint, "cpu", enforce_eager=True, kv_cache_dtype="fp8")


def test_kinds_are_one_for_each_layer_and_have_names_of_their_own(checkpoint: Path) -> None:
    from transformers import AutoConfig

    model = mixed(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    with pytest.raises(ValueError, match="4 layer kinds for 5 layers"):
        replace(model, layer_kinds=KINDS[:4])
    with pytest.raises(ValueError, match="two layer kinds have the same name"):
        replace(model, layer_kinds=(*KINDS[:4], LayerKind("narrow", WIDE.keeps)))
