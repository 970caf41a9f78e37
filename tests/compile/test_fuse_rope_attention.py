"""fuse_rope_attention keeps a graph's meaning, takes the decode step of one row, and leaves the rest alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.passes.fuse_rope_attention import fuse_rope_attention
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.inline_ops import inline_ops
from nanovllm.compile.trace import tensors, trace
from nanovllm.kernels import ops
from nanovllm.models import llama, weights
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import Batch, LayerCache
from nanovllm.models.rope import rotary_table

BLOCKS, BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 9, 16, 6, 2, 8
VARYING = ("k_CBKH", "v_CBKH", "cos_sin_MH")
APART = Counter({"qk_norm_rope_store": 1, "paged_attention": 1})
TOGETHER = Counter({"rope_attention": 1})


def config(qk_norm: bool, biased: bool = False, attention_backend: str = "") -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32,
        hidden_size=24,
        ffn_size=40,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        norm_eps=1e-3,
        max_position=40,
        inv_freq=(1.0, 0.5, 0.2, 0.1),
        rope_scale=1.25,
        layer_windows=(0,),
        tied_embeddings=True,
        qk_norm=qk_norm,
        qkv_bias=biased,
        attention_backend=attention_backend,
    )


def region(
    cfg: ModelConfig, num_rows: int = 1, num_new: int = 1, window: int = 0
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A layer and inputs for it: rows of 19 tokens, the last num_new of which are new."""
    torch.manual_seed(0)
    drawn = weights.random(llama, cfg, torch.device("cpu"), 0, int).layers[0]
    layer = type(drawn)(*(weight if weight is None else torch.randn(weight.shape) * 0.3 for weight in drawn))
    pos_T = torch.arange(19 - num_new, 19).repeat(num_rows)
    table_RP = torch.tensor([[4, 7, 0], [2, 5, 0]], dtype=torch.int32)[:num_rows]
    block_T = table_RP.repeat_interleave(num_new, 0)[torch.arange(len(pos_T)), pos_T // BLOCK_SIZE]
    batch = Batch(
        pos_T=pos_T,
        slot_T=block_T * BLOCK_SIZE + pos_T % BLOCK_SIZE,
        block_table_RP=table_RP,
        seq_len_R=torch.full((num_rows,), 19, dtype=torch.int32),
        q_start_S=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
    )
    inputs: dict[str, Any] = {
        "w": layer,
        "kv": LayerCache(*torch.randn(2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM).clone().unbind(0)),
        "cos_sin_MH": rotary_table(cfg.inv_freq, cfg.rope_scale, 40, torch.device("cpu")),
        "batch": batch,
        "h_TD": torch.randn(len(pos_T), cfg.hidden_size),
    }
    return partial(llama.layer, cfg, window, num_new), inputs


def one_row(qkv: Tensor, k_cache: Tensor, num_heads: int, window: int) -> bool:
    """The rule of Triton's kernel, less what it says of dtypes and sizes."""
    return qkv.shape[0] == 1 and window != 1


def attention_ops(graph: GraphModule) -> Counter[str]:
    names = [ops.op_name(node.target) for node in graph.graph.nodes]
    parts = {"rope", "store_kv", "qk_norm_rope_store", "paged_attention", "rope_attention"}
    return Counter(name for name in names if name in parts)


def both(function: Callable[..., Any], inputs: dict[str, Any], takes: Any = one_row) -> tuple[GraphModule, GraphModule]:
    """The graph without and with the pass, which are checked to give and to write the same."""
    before = fuse_rope_store(*trace(function, inputs, varying=VARYING)[:2])
    graph, fakes, _ = trace(function, inputs, varying=VARYING)
    after = fuse_rope_attention(fuse_rope_store(graph, fakes), fakes, takes=takes)
    after.graph.lint()
    outputs = []
    for one in (before, after):
        leaves = [leaf.clone() for leaf in tensors(tuple(inputs.values()))]
        outputs.append([leaf.float() for leaf in (*one(*leaves), *leaves)])
    for left, right in zip(*outputs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)
    return before, after


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [0, 5])
def test_one_row_s_rope_and_attention_become_one_op(qk_norm: bool, biased: bool, window: int) -> None:
    before, after = both(*region(config(qk_norm, biased), window=window))
    assert attention_ops(before) == APART and attention_ops(after) == TOGETHER
    fused = next(node for node in after.graph.nodes if node.target is ops.rope_attention)
    assert [str(argument) for argument in fused.args[1:10]] == [
        *(["w_q_norm_H", "w_k_norm_H"] if qk_norm else ["None", "None"]),
        "cos_sin_MH",
        "batch_pos_T",
        "batch_slot_T",
        "kv_k_CBKH",
        "kv_v_CBKH",
        str(HEADS),
        "0.001" if qk_norm else "0.0",
    ]
    assert [str(argument) for argument in fused.args[10:12]] == ["batch_block_table_RP", "batch_seq_len_R"]
    assert fused.args[13] == window
    assert fused.meta["val"].shape == (1, HEADS, HEAD_DIM)


def test_the_scales_of_an_fp8_cache_go_along() -> None:
    function, inputs = region(config(True))
    cache = torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.float8_e4m3fn)
    scales = torch.rand(2, KV_HEADS) + 0.5
    inputs["kv"] = LayerCache(cache, cache.clone(), scales[0].clone(), scales[1].clone())
    _, after = both(function, inputs)
    fused = next(node for node in after.graph.nodes if node.target is ops.rope_attention)
    assert [str(argument) for argument in fused.args[14:]] == ["kv_k_scale_K", "kv_v_scale_K"]


@pytest.mark.parametrize(("num_rows", "num_new", "window"), [(2, 1, 0), (1, 5, 0), (2, 5, 0), (1, 1, 1)], ids=str)
def test_more_rows_prefill_and_a_window_of_one_stay_as_they_are(num_rows: int, num_new: int, window: int) -> None:
    before, after = both(*region(config(True), num_rows, num_new, window))
    assert attention_ops(before) == attention_ops(after) == APART


def test_prefill_stays_whatever_the_rule_says() -> None:
    _, after = both(*region(config(True), 1, 5), takes=lambda *sizes: True)
    assert attention_ops(after) == APART


def test_the_rule_is_asked_with_the_sizes() -> None:
    asked = []

    def takes(qkv: Tensor, k_cache: Tensor, num_heads: int, window: int) -> bool:
        asked.append((tuple(qkv.shape), tuple(k_cache.shape[1:]), num_heads, window))
        return False

    _, after = both(*region(config(False), 2, window=7), takes=takes)
    assert asked == [((2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), (BLOCK_SIZE, KV_HEADS, HEAD_DIM), HEADS, 7)]
    assert attention_ops(after) == APART


def test_attention_that_was_asked_for_stays() -> None:
    _, after = both(*region(config(True, attention_backend="sdpa")))
    assert attention_ops(after) == Counter({"qk_norm_rope_store": 1})


def test_two_layers_in_one_graph_are_both_fused() -> None:
    function, inputs = region(config(True))
    kv = inputs["kv"]

    def twice(w: Any, kv: Any, other_kv: Any, cos_sin_MH: Tensor, batch: Any, h_TD: Tensor) -> Any:
        return function(w, other_kv, cos_sin_MH, batch, function(w, kv, cos_sin_MH, batch, h_TD))

    pair = {"w": inputs["w"], "kv": kv, "other_kv": LayerCache(kv.k_CBKH + 1, kv.v_CBKH - 1)}
    _, after = both(twice, {**pair, **{name: value for name, value in inputs.items() if name not in pair}})
    assert attention_ops(after) == Counter({"rope_attention": 2})


# Graphs that nearly match -------------------------------------------------------------------------------------------


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return {
        "qkv_TE": torch.randn(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "cos_sin_MH": torch.randn(40, HEAD_DIM),
        "pos_T": torch.tensor([18]),
        "slot_T": torch.tensor([7 * BLOCK_SIZE + 2]),
        "k_CBKH": torch.randn(shape),
        "v_CBKH": torch.randn(shape),
        "table_RP": torch.tensor([[4, 7]], dtype=torch.int32),
        "seq_len_R": torch.tensor([19], dtype=torch.int32),
        "q_start_S": torch.tensor([0, 1], dtype=torch.int32),
    }


def store(qkv, table, pos, slot, k_cache, v_cache):  # type: ignore[no-untyped-def]
    return ops.qk_norm_rope_store(qkv, None, None, table, pos, slot, k_cache, v_cache, HEADS, 0.0)


def nothing_between(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    before = k_cache.sum()
    q = store(qkv, table, pos, slot, k_cache, v_cache)
    out = ops.paged_attention(q, k_cache, v_cache, blocks, seq_len, q_start, 1, 0.3, 0)
    return out, before, k_cache.sum()


def query_read_again(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    q = store(qkv, table, pos, slot, k_cache, v_cache)
    return ops.paged_attention(q, k_cache, v_cache, blocks, seq_len, q_start, 1, 0.3, 0), q + 1


def another_cache(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    q = store(qkv, table, pos, slot, k_cache, v_cache)
    return (ops.paged_attention(q, v_cache, k_cache, blocks, seq_len, q_start, 1, 0.3, 0),)


def cache_read_between(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    q = store(qkv, table, pos, slot, k_cache, v_cache)
    between = v_cache.sum()
    return ops.paged_attention(q, k_cache, v_cache, blocks, seq_len, q_start, 1, 0.3, 0), between


def view_read_between(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    view = k_cache.flatten(0, 1)
    q = store(qkv, table, pos, slot, k_cache, v_cache)
    between = view.sum()
    return ops.paged_attention(q, k_cache, v_cache, blocks, seq_len, q_start, 1, 0.3, 0), between


def query_changed(qkv, table, pos, slot, k_cache, v_cache, blocks, seq_len, q_start):  # type: ignore[no-untyped-def]
    q = store(qkv, table, pos, slot, k_cache, v_cache) * 2
    return (ops.paged_attention(q, k_cache, v_cache, blocks, seq_len, q_start, 1, 0.3, 0),)


def test_others_may_read_the_cache_before_and_after() -> None:
    assert attention_ops(both(nothing_between, parts())[1]) == TOGETHER


@pytest.mark.parametrize(
    "function", [query_read_again, another_cache, cache_read_between, view_read_between, query_changed]
)
def test_graphs_that_do_not_match_are_left_alone(function: Callable[..., Any]) -> None:
    before, after = both(function, parts())
    assert after.code == before.code


def test_the_op_is_inlined_where_it_is_not_kept() -> None:
    function, inputs = region(config(True))
    graph, fakes, _ = trace(function, inputs, varying=VARYING)
    fused = fuse_rope_attention(fuse_rope_store(graph, fakes), fakes, takes=one_row)
    after = inline_ops(fused, fakes, keep=lambda name, node: name != "rope_attention")
    assert not attention_ops(after)
    outputs = []
    for one in (trace(function, inputs, varying=VARYING)[0], after):
        leaves = [leaf.clone() for leaf in tensors(tuple(inputs.values()))]
        outputs.append([*one(*leaves), *leaves])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)
