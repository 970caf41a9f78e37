"""Passes keep the results of a graph: results before and after are compared in one run."""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.trace import tensors, trace
from nanovllm.kernels import ops
from nanovllm.models import loader as weights
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import dense_model
from nanovllm.models.model import VARYING, Batch, LayerCache, LayerCall
from nanovllm.models.rope import rotary_table

ROWS, TABLE_POSITIONS, BLOCKS, BLOCK_SIZE = 3, 40, 9, 16
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LINEAR = str(ops.op_name(ops.linear))


def op_counts(graph: GraphModule) -> Counter[str]:
    """The count of each of our ops in a graph."""
    names = [ops.op_name(node.target) for node in graph.graph.nodes]
    return Counter(name for name in names if name is not None)


def run(graph: GraphModule, inputs: dict[str, object]) -> list[Tensor]:
    """A graph's results on copies of the inputs, and the inputs afterwards, to show writes."""
    copies = [tensor.clone() for tensor in tensors(tuple(inputs.values()))]
    return [*graph(*copies), *copies]


def traced(
    function: Callable[..., Any], inputs: dict[str, object]
) -> tuple[GraphModule, list[Tensor]]:
    graph, fakes, _ = trace(function, inputs, varying=VARYING)
    return graph, fakes


def assert_same_results(before: GraphModule, after: GraphModule, inputs: dict[str, object]) -> None:
    for left, right in zip(run(before, inputs), run(after, inputs), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)


# A whole layer ------------------------------------------------------------------------------------


def layer_config(*, qk_norm: bool, biased: bool = False) -> ModelConfig:
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
        max_position=TABLE_POSITIONS,
        inv_freq=(1.0, 0.5, 0.2, 0.1),
        rope_scale=1.25,
        tied_embeddings=True,
        qk_norm=qk_norm,
        qkv_bias=biased,
    )


def layer_region(cfg: ModelConfig, window: int = 0) -> tuple[Callable[..., Any], dict[str, object]]:
    """A decode layer and its inputs: three rows at odd positions, each in its own blocks."""
    torch.manual_seed(0)
    shape = (BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    model = dense_model(cfg, (window,))
    drawn = weights.random(model, weights.Target(torch.device("cpu")), 0, int).layers[0]
    layer = type(drawn)(
        *(weight if weight is None else torch.randn(weight.shape) * 0.3 for weight in drawn)
    )
    pos_T = torch.tensor([0, 18, 31])
    block_table_RP = torch.tensor([[4, 0, 0], [2, 7, 0], [8, 1, 0]], dtype=torch.int32)
    batch = Batch(
        rope_pos_T=pos_T,
        slot_T=torch.tensor([4 * 16, 7 * 16 + 2, 1 * 16 + 15]),
        block_table_RP=block_table_RP,
        seq_len_R=(pos_T + 1).int(),
        q_start_S=torch.arange(ROWS + 1, dtype=torch.int32),
    )
    inputs: dict[str, object] = {
        "w": layer,
        "kv": LayerCache(torch.randn(shape), torch.randn(shape)),
        "cos_sin_MH": rotary_table(
            cfg.inv_freq, cfg.rope_scale, TABLE_POSITIONS, torch.device("cpu")
        ),
        "batch": batch,
        "h_TD": torch.randn(ROWS, cfg.hidden_size),
    }
    return partial(model.layer, cfg, LayerCall("", model.layer_kinds[0], 1)), inputs


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_s_rope_and_store_become_one_op(qk_norm: bool, biased: bool) -> None:
    function, inputs = layer_region(layer_config(qk_norm=qk_norm, biased=biased))
    before, _ = traced(function, inputs)
    graph, fakes = traced(function, inputs)
    after = fuse_rope_store(graph, fakes)
    after.graph.lint()
    assert op_counts(before) == op_counts(after) - Counter({"qk_norm_rope_store": 1}) + Counter(
        {"rope": 2, "store_kv": 1, **({"rms_norm": 2} if qk_norm else {})}
    )
    fused = next(node for node in after.graph.nodes if node.target is ops.qk_norm_rope_store)
    assert [str(arg) for arg in fused.args[1:8]] == [
        *(["w_q_norm_H", "w_k_norm_H"] if qk_norm else ["None", "None"]),
        "cos_sin_MH",
        "batch_rope_pos_T",
        "batch_slot_T",
        "kv_k_CBKH",
        "kv_v_CBKH",
    ]
    assert fused.args[8] == HEADS
    assert not qk_norm or fused.args[9] == 1e-3
    assert fused.meta["val"].shape == (ROWS, HEADS, HEAD_DIM)
    assert_same_results(before, after, inputs)


def test_the_scales_of_an_fp8_cache_stay_with_the_fused_op() -> None:
    function, inputs = layer_region(layer_config(qk_norm=True))
    cache = torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.float8_e4m3fn)
    scales = torch.rand(2, KV_HEADS) + 0.5
    inputs["kv"] = LayerCache(cache, cache.clone(), scales[0].clone(), scales[1].clone())
    before, _ = traced(function, inputs)
    after = fuse_rope_store(*traced(function, inputs))
    fused = next(node for node in after.graph.nodes if node.target is ops.qk_norm_rope_store)
    assert [str(arg) for arg in fused.args[10:]] == ["kv_k_scale_K", "kv_v_scale_K"]
    assert op_counts(after)["store_kv"] == 0
    outputs = []
    for graph in (before, after):
        leaves = [leaf.clone() for leaf in tensors(tuple(inputs.values()))]
        outputs.append(
            (
                graph(*leaves)[0],
                [leaf.float() for leaf in leaves if leaf.dtype is torch.float8_e4m3fn],
            )
        )
    assert all(cache.any() for cache in outputs[0][1])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_two_layers_in_one_graph_are_both_fused() -> None:
    function, inputs = layer_region(layer_config(qk_norm=True))

    def twice(w: Any, kv: Any, other_kv: Any, cos_sin_MH: Tensor, batch: Any, h_TD: Tensor) -> Any:
        h_TD = function(w, kv, cos_sin_MH, batch, h_TD)
        return function(w, other_kv, cos_sin_MH, batch, h_TD)

    kv: Any = inputs["kv"]
    both = {"w": inputs["w"], "kv": kv, "other_kv": LayerCache(kv.k_CBKH + 1, kv.v_CBKH - 1)}
    inputs = {**both, **{name: value for name, value in inputs.items() if name not in both}}
    before, _ = traced(twice, inputs)
    after = fuse_rope_store(*traced(twice, inputs))
    assert op_counts(after)["qk_norm_rope_store"] == 2
    assert op_counts(after)["store_kv"] == op_counts(after)["rope"] == 0
    assert_same_results(before, after, inputs)


# Graphs that match, or almost ---------------------------------------------------------------------


def store_inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return {
        "qkv_TE": torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "q_norm_H": torch.randn(HEAD_DIM),
        "k_norm_H": torch.randn(HEAD_DIM),
        "cos_sin_MH": torch.randn(TABLE_POSITIONS, HEAD_DIM),
        "pos_T": torch.tensor([5, 0, 31]),
        "other_pos_T": torch.tensor([6, 1, 32]),
        "slot_T": torch.tensor([3, 99, 17]),
        "k_CBKH": torch.randn(shape),
        "v_CBKH": torch.randn(shape),
    }


def split(qkv_TE: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return qkv_TE.view(qkv_TE.shape[0], -1, HEAD_DIM).split(
        sizes or [HEADS, KV_HEADS, KV_HEADS], dim=1
    )


def only_q_normed(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(ops.rms_norm(q, q_norm, 0.5), table, pos)


def only_k_normed(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(ops.rope(ops.rms_norm(k, k_norm, 0.5), table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos)


def query_before_the_key(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    q = ops.rope(q, table, pos)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return q + k_cache.view(-1, KV_HEADS, HEAD_DIM)[slot].repeat(1, HEADS // KV_HEADS, 1)


def key_read_again(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    k = ops.rope(k, table, pos)
    ops.store_kv(k, v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos), k + v


def query_read_before_the_store(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    q = ops.rope(q, table, pos) * 2.0
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return q


@pytest.mark.parametrize(
    "function",
    [
        only_q_normed, only_k_normed, query_before_the_key, key_read_again,
        query_read_before_the_store,
    ],
)  # fmt: skip
def test_variations_are_fused_too(function: Callable[..., Any]) -> None:
    inputs = store_inputs()
    before, _ = traced(function, inputs)
    after = fuse_rope_store(*traced(function, inputs))
    after.graph.lint()
    assert op_counts(after)["qk_norm_rope_store"] == 1
    assert op_counts(after)["store_kv"] == 0
    assert_same_results(before, after, inputs)


def cache_read_before_the_store(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    """The query is read before the store, and so is the cache."""
    q, k, v = split(qkv)
    q = ops.rope(q, table, pos) + k_cache[0, 0, 0]
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return q


def other_epsilons(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(ops.rope(ops.rms_norm(k, k_norm, 0.5), table, pos), v, k_cache, v_cache, slot)
    return ops.rope(ops.rms_norm(q, q_norm, 0.25), table, pos)


def other_positions(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, other_pos)


def other_order(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, v, k = split(qkv)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos)


def four_parts(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v, _ = split(qkv, HEADS - 1, KV_HEADS, KV_HEADS, 1)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos)


def scaled_key(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(ops.rope(k * 2, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos)


def no_rotation(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, v = split(qkv)
    ops.store_kv(k, v, k_cache, v_cache, slot)
    return q + 1


def two_projections(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    q, k, _ = split(qkv)
    v = split(qkv * 2)[2]
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return ops.rope(q, table, pos)


def no_query(qkv, q_norm, k_norm, table, pos, other_pos, slot, k_cache, v_cache):
    _, k, v = split(qkv)
    ops.store_kv(ops.rope(k, table, pos), v, k_cache, v_cache, slot)
    return pos + 1


@pytest.mark.parametrize(
    "function",
    [
        cache_read_before_the_store,
        other_epsilons,
        other_positions,
        other_order,
        four_parts,
        scaled_key,
        no_rotation,
        two_projections,
        no_query,
    ],
)
def test_graphs_that_do_not_match_are_left_alone(function: Callable[..., Any]) -> None:
    inputs = store_inputs()
    before, _ = traced(function, inputs)
    after = fuse_rope_store(*traced(function, inputs))
    assert after.code == before.code
    assert_same_results(before, after, inputs)


# Inlining -----------------------------------------------------------------------------------------

LAYER_OPS = ("rms_norm", LINEAR, "qk_norm_rope_store", "paged_attention", "silu_mul")


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    "kept",
    [(), ("paged_attention",), ("paged_attention", "qk_norm_rope_store"), LAYER_OPS],
    ids=lambda kept: str(len(kept)),
)
def test_what_is_told_to_stay_stays_and_the_rest_is_inlined(
    kept: tuple[str, ...], window: int
) -> None:
    function, inputs = layer_region(layer_config(qk_norm=True), window)
    before, _ = traced(function, inputs)
    graph, fakes = traced(function, inputs)
    fused = fuse_rope_store(graph, fakes)
    assert set(op_counts(fused)) == set(LAYER_OPS)
    present = op_counts(fused)
    after = replace_ops(fused, fakes, keep=lambda name, node: name in kept)
    after.graph.lint()
    assert op_counts(after) == Counter({name: present[name] for name in kept})
    assert_same_results(before, after, inputs)


def test_inlining_keeps_names_and_varying_sizes() -> None:
    function, inputs = layer_region(layer_config(qk_norm=False))
    graph, fakes = traced(function, inputs)
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    after = replace_ops(graph, fakes)
    kept = [node for node in after.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in kept] == names
    assert all(
        isinstance(node.meta["val"].shape[0], torch.SymInt)
        for node in kept
        if node.name.endswith(VARYING)
    )
    more_blocks = {**inputs, "kv": LayerCache(torch.randn(20, 16, 2, 8), torch.randn(20, 16, 2, 8))}
    assert_same_results(graph, after, more_blocks)


def test_the_choice_sees_the_op_s_name_and_its_sizes() -> None:
    function, inputs = layer_region(layer_config(qk_norm=False))
    seen: list[tuple[str, torch.Size]] = []

    def keep(name: str, node: Node) -> bool:
        argument: Any = node.args[0]
        seen.append((name, argument.meta["val"].shape))
        return name == LINEAR and argument.meta["val"].shape[1] == 40

    after = replace_ops(*traced(function, inputs), keep=keep)
    assert op_counts(after) == {LINEAR: 1}  # only the product with F columns
    assert ("silu_mul", (ROWS, 80)) in seen
    assert ("paged_attention", (ROWS, HEADS, HEAD_DIM)) in seen
    assert {name for name, _ in seen} == {
        "rms_norm", LINEAR, "rope", "store_kv", "paged_attention", "silu_mul",
    }  # fmt: skip


def test_writes_to_the_cache_survive_inlining() -> None:
    inputs = store_inputs()
    before, _ = traced(no_query, inputs)
    after = replace_ops(*traced(no_query, inputs))
    assert not op_counts(after)
    results = run(after, inputs)
    assert not torch.equal(results[-1], inputs["v_CBKH"])
    assert_same_results(before, after, inputs)
