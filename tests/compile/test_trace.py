"""A trace is a readable graph with named inputs and static sizes, and tracing computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from nanovllm.compile.keys import program_key
from nanovllm.compile.trace import dump, named_leaves, rebuild, tensors, trace
from nanovllm.kernels import ops


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


class Nested(NamedTuple):
    pair: Pair
    others: tuple[Tensor, ...]


def nested(*values: float) -> Nested:
    a, b, c = (torch.full((2, 3), value) for value in values)
    return Nested(Pair(a, None), (b, c))


def placeholders(graph: GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


def test_placeholders_are_named_by_path_in_the_order_of_the_leaves() -> None:
    graph, fakes, _ = trace(
        lambda tree, x: tree.pair.left + x, {"tree": nested(1, 2, 3), "x_TD": torch.ones(2, 3)}
    )
    assert placeholders(graph) == ["tree_pair_left", "tree_others_0", "tree_others_1", "x_TD"]
    assert len(fakes) == 4


def test_names_that_are_no_identifiers_are_made_ones() -> None:
    graph, _, _ = trace(lambda x, y: x + y, {"x-1": torch.ones(1), "y.2": torch.ones(1)})
    assert placeholders(graph) == ["x_1", "y_2"]
    torch.testing.assert_close(graph(torch.ones(1), torch.ones(1))[0], torch.full((1,), 2.0))


def test_results_come_back_nested_as_the_function_nests_them() -> None:
    def function(tree: Nested) -> tuple[Pair, Tensor, None]:
        return Pair(tree.pair.left * 2, None), tree.others[1] + 1, None

    graph, _, result = trace(function, {"tree": nested(1, 2, 3)})
    assert (
        isinstance(result, tuple)
        and isinstance(result[0], Pair)
        and result[0].right is None
        and result[2] is None
    )
    assert all(isinstance(leaf, FakeTensor) for leaf in tensors(result))
    rebuilt: Any = rebuild(result, list(graph(*tensors(nested(5, 6, 7)))))
    assert isinstance(rebuilt[0], Pair)
    assert rebuilt[0].left.eq(10).all() and rebuilt[1].eq(8).all() and rebuilt[2] is None


def test_leaves_and_rebuild_are_inverse() -> None:
    tree = nested(1, 2, 3)
    again: Any = rebuild(tree, tensors(tree))
    assert (
        type(again) is Nested
        and again.pair.left is tree.pair.left
        and again.others[1] is tree.others[1]
    )
    assert [tensor for _, tensor in named_leaves("t", tree)] == tensors(tree)


def test_ints_among_inputs_are_static() -> None:
    """A program has them as constants, so its key has them too."""

    class Sized(NamedTuple):
        x: Tensor
        size: int

    inputs = {"one": (Sized(torch.ones(6), 2), torch.ones(3))}
    graph, fakes, _ = trace(lambda one: one[0].x.view(one[0].size, -1) * one[1], inputs)
    assert len(fakes) == 2 and graph(*tensors((inputs["one"],)))[0].shape == (2, 3)
    keys = [
        program_key(named_leaves, {"one": (Sized(torch.ones(6), size),)}, varying=(), common={})
        for size in (2, 3)
    ]
    assert keys[0] != keys[1] and keys[0].ingredients["size one_0_size"] == "2"


@pytest.mark.parametrize("value", [3.0, [torch.ones(1)], {"a": torch.ones(1)}, "x"])
def test_inputs_that_are_no_tensors_are_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match=r"input 'tree_1' is a \w+: regions take tensors"):
        trace(lambda tree: tree, {"tree": (torch.ones(1), value)})


def test_nothing_is_computed_and_inputs_stay_as_they_are() -> None:
    cache, calls = torch.zeros(4), []

    def function(x: Tensor, written: Tensor) -> Tensor:
        calls.append(isinstance(x, FakeTensor))
        written.add_(x)
        return x * 2

    graph, _, _ = trace(function, {"x": torch.ones(4), "written": cache})
    assert calls == [True]
    assert cache.eq(0).all()
    graph(torch.ones(4), cache)
    assert cache.eq(1).all()


def test_dead_code_goes_and_writes_to_inputs_stay() -> None:
    def function(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor) -> Tensor:
        torch.sin(k)
        ops.store_kv(k, v, k_cache, v_cache, slot)
        return k + 1

    shape = (3, 2, 8)
    caches = {"k_cache": torch.zeros(4, 16, 2, 8), "v_cache": torch.zeros(4, 16, 2, 8)}
    inputs = {"k": torch.ones(shape), "v": torch.ones(shape), **caches, "slot": torch.arange(3)}
    graph, _, _ = trace(function, inputs)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [ops.store_kv, torch.ops.aten.add.Tensor]


def test_strides_and_dtypes_are_those_of_the_inputs() -> None:
    x = torch.ones(4, 6, dtype=torch.bfloat16).t()
    _, fakes, result = trace(lambda x: x + 1, {"x": x})
    assert (fakes[0].shape, fakes[0].stride(), fakes[0].dtype) == (
        x.shape,
        x.stride(),
        torch.bfloat16,
    )
    assert isinstance(result, Tensor) and result.dtype == torch.bfloat16


def test_inputs_that_share_memory_are_separate_in_the_graph() -> None:
    whole = torch.arange(8.0)
    graph, fakes, _ = trace(lambda a, b: a - b, {"a": whole[:4], "b": whole[4:]})
    assert fakes[0].untyped_storage()._cdata != fakes[1].untyped_storage()._cdata
    assert graph(torch.full((4,), 5.0), torch.full((4,), 3.0))[0].eq(2).all()


# Varying dimensions -------------------------------------------------------------------------------

NUM_BLOCKS, NUM_POSITIONS = 37, 41  # sizes that no other dimension has


def layer_inputs(num_blocks: int, num_positions: int) -> dict[str, object]:
    cache = torch.zeros(num_blocks, 16, 2, 8), torch.zeros(num_blocks, 16, 2, 8)
    inputs = {
        "qkv_TE": torch.ones(3, 8 * 8),
        "kv": cache,
        "cos_sin_MH": torch.ones(num_positions, 8),
    }
    return {**inputs, "pos_T": torch.arange(3), "slot_T": torch.arange(3)}


def store(
    qkv_TE: Tensor, kv: tuple[Tensor, Tensor], cos_sin_MH: Tensor, pos_T: Tensor, slot_T: Tensor
) -> Tensor:
    q_TNH, k_TKH, v_TKH = qkv_TE.view(3, -1, 8).split([4, 2, 2], dim=1)
    ops.store_kv(ops.rope(k_TKH, cos_sin_MH, pos_T), v_TKH, *kv, slot_T)
    return ops.rope(q_TNH, cos_sin_MH, pos_T)


def sizes(value: object) -> list[object]:
    """All numbers in a node's arguments."""
    if isinstance(value, (tuple, list)):
        return [size for item in value for size in sizes(item)]
    return [value] if isinstance(value, (int, torch.SymInt)) else []


def test_varying_dimensions_do_not_appear_as_sizes() -> None:
    inputs = layer_inputs(NUM_BLOCKS, NUM_POSITIONS)
    graph, fakes, _ = trace(store, inputs, varying=("kv_0", "kv_1", "cos_sin_MH"))
    for name, fake in zip(placeholders(graph), fakes, strict=True):
        varies = name in ("kv_0", "kv_1", "cos_sin_MH")
        assert isinstance(fake.shape[0], torch.SymInt) == varies, name
        assert not any(isinstance(size, torch.SymInt) for size in fake.shape[1:]), name
    for node in graph.graph.nodes:
        assert not any(isinstance(size, torch.SymInt) for size in sizes(node.args)), (
            node.format_node()
        )
        assert not {NUM_BLOCKS, NUM_POSITIONS} & set(sizes(node.args)), node.format_node()
        assert "sym_size" not in str(node.target)
    static, _, _ = trace(store, inputs)
    assert f"f32[{NUM_BLOCKS}, 16, 2, 8]" in static.print_readable(print_output=False)
    assert f"f32[{NUM_BLOCKS}" not in graph.print_readable(print_output=False)


def test_a_graph_runs_with_other_varying_sizes_than_traced() -> None:
    graph, _, _ = trace(
        store, layer_inputs(NUM_BLOCKS, NUM_POSITIONS), varying=("kv_0", "kv_1", "cos_sin_MH")
    )
    inputs = layer_inputs(2, 5)
    (q_TNH,) = graph(*tensors(tuple(inputs.values())))
    assert q_TNH.shape == (3, 4, 8)
    cache: Any = inputs["kv"]
    assert cache[1].view(-1, 2, 8)[:3].eq(1).all() and cache[1].view(-1, 2, 8)[3:].eq(0).all()


def test_dumps_are_python_with_shapes(tmp_path: Path) -> None:
    graph, _, _ = trace(store, layer_inputs(NUM_BLOCKS, NUM_POSITIONS))
    path = tmp_path / "new" / "store.py"
    dump(graph, path)
    text = path.read_text()
    compile(text, str(path), "exec")
    assert 'qkv_TE: "f32[3, 64]"' in text
    assert "torch.ops.nanovllm.rope.default" in text
