"""Properties of every graph that torchair makes of the engine's steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.npu import ascend_ir, ir_rules
from tests.npu.ge import Ge, Graph

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def graphs(ge: Ge, shallow: str) -> Iterator[dict[str, Graph]]:
    """All graphs of an engine by name: two prefill and decode buckets, prefill head and sampler."""
    first = len(ge.graphs)
    sizes: dict[str, Any] = {
        "max_num_seqs": 3,
        "graph_batch_sizes": (2, 3),
        "num_kvcache_blocks": 9,
    }
    llm = LLM(shallow, device="npu", max_model_len=300, max_num_batched_tokens=128, **sizes)
    # filtered sampling uses the logits of the same decode graph
    llm.generate(
        [[5, 6]],
        SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True),
        use_tqdm=False,
    )
    found: dict[str, Graph] = {}
    for graph in ge.graphs[first:]:
        has = {
            name: graph.count(name) > 0
            for name in ("FusedInferAttentionScore", "ArgMaxV2", "MatMul")
        }
        kind = {
            (True, True, True): "decode",
            (True, False, True): "prefill",
            (False, False, True): "head",
            (False, True, False): "sample",
        }[tuple(has.values())]
        found[f"{kind}{sum(name.startswith(kind) for name in found)}"] = graph
    yield found
    llm.close()


def test_one_graph_for_each_bucket_of_a_step(graphs: dict[str, Graph]) -> None:
    kinds = Counter(name.rstrip("0123456789") for name in graphs)
    assert kinds["prefill"] == 2 and kinds["decode"] == 2, kinds


def ops(graph: Graph) -> Counter[str]:
    return Counter(op.type for op in graph.proto.op)


def test_every_op_is_known(graphs: dict[str, Graph]) -> None:
    """The allow-list contains the ops of the interpreter, whose meanings were checked."""
    for name, graph in graphs.items():
        assert set(ops(graph)) <= {*ascend_ir.OPS, *ascend_ir.STRUCTURE}, name


def test_nothing_is_copied(graphs: dict[str, Graph]) -> None:
    for name, graph in graphs.items():
        assert not {"TensorMove", "Identity", "Assign"} & set(ops(graph)), name


def test_one_net_output_for_each_result(graphs: dict[str, Graph]) -> None:
    """decode: tokens, logits and two state vectors, written in place; prefill: the hidden states
    and the indices of the rows' last tokens."""
    expected = {"decode": (4, 2), "prefill": (2, 0), "head": (1, 0), "sample": (3, 2)}
    for name, graph in graphs.items():
        (net,) = (op for op in graph.proto.op if op.type == "NetOutput")
        outputs = [source for source in net.input if not source.endswith(":-1")]
        assert (len(outputs), len(graph.written)) == expected[name.rstrip("0123456789")], name


def test_the_layers_are_fused_ops(graphs: dict[str, Graph]) -> None:
    """Norms include the addition before them, except the first norm and norms of single heads."""
    for name in ("decode0", "decode1", "prefill0", "prefill1"):
        has_head = name.startswith("decode")
        expected = {
            "FusedInferAttentionScore": NUM_LAYERS,
            "AddRmsNorm": 2 * NUM_LAYERS - 1 + has_head,
            "RmsNorm": 2 * NUM_LAYERS + 1,
            "RotaryMul": 2 * NUM_LAYERS,
            "ScatterNdUpdate": 2 * NUM_LAYERS,
            "SwiGlu": NUM_LAYERS,
            "MatMul": 4 * NUM_LAYERS + has_head,
        }
        found = ops(graphs[name])
        assert {op_type: found[op_type] for op_type in expected} == expected, name


def test_layers_share_rotary_rows_and_cache_indices(graphs: dict[str, Graph]) -> None:
    for name in ("decode0", "prefill0"):
        indices = {op.input[1] for op in graphs[name].proto.op if op.type == "ScatterNdUpdate"}
        rows = {tuple(op.input[1:]) for op in graphs[name].proto.op if op.type == "RotaryMul"}
        assert len(indices) == len(rows) == 1, name


def test_the_cache_is_written_in_place(graphs: dict[str, Graph]) -> None:
    """Each write targets a graph input, each input once; attention reads the written caches."""
    for name in ("decode0", "prefill0"):
        by_name = {op.name: op for op in graphs[name].proto.op}
        writes = [op for op in graphs[name].proto.op if op.type == "ScatterNdUpdate"]
        targets = [by_name[op.input[0].split(":")[0]] for op in writes]
        assert all(target.type == "Data" for target in targets)
        assert len({target.name for target in targets}) == 2 * NUM_LAYERS, name
        read = ancestors(
            graphs[name],
            [op.name for op in by_name.values() if op.type == "FusedInferAttentionScore"],
        )
        assert {op.name for op in writes} <= read, name


def ancestors(graph: Graph, names: list[str]) -> set[str]:
    by_name = {op.name: op for op in graph.proto.op}
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [source.split(":")[0] for source in by_name[name].input if source]
    return found


def test_state_is_read_before_it_is_overwritten(graphs: dict[str, Graph]) -> None:
    """An output uses an input's memory: all readers of the input precede it by their data."""
    num_checked = 0
    for name, graph in graphs.items():
        (net,) = (op for op in graph.proto.op if op.type == "NetOutput")
        data = {op.attr["index"].i: op.name for op in graph.proto.op if op.type == "Data"}
        for output, index in graph.written.items():
            readers = {op.name for op in graph.proto.op if f"{data[index]}:0" in op.input}
            assert readers and readers <= ancestors(graph, [net.input[output].split(":")[0]]), (
                name,
                readers,
            )
            num_checked += 1
    assert num_checked >= 4


def test_dtypes_are_those_that_the_ops_declare(graphs: dict[str, Graph]) -> None:
    for name, graph in graphs.items():
        assert len(graph.dtypes) >= 3, name
        found = [
            broken for op, dtypes in graph.dtypes for broken in ir_rules.violations(op.type, dtypes)
        ]
        assert not found, (name, found)


def test_lengths_are_tensors_and_all_shapes_static(graphs: dict[str, Graph]) -> None:
    for name, graph in graphs.items():
        for op in graph.proto.op:
            if op.type == "Data":
                assert all(size > 0 for size in op.output_desc[0].shape.dim), (name, op.name)
            if op.type == "FusedInferAttentionScore":
                names = [desc.name for desc in op.input_desc]
                assert (
                    op.input[names.index("actual_seq_lengths_kv")]
                    and op.input[names.index("block_table")]
                ), name


def test_weights_are_frozen_and_nothing_else(graphs: dict[str, Graph]) -> None:
    # embedding, final norm, rotary table and eight tensors a layer, but not state, caches and batch
    for name in ("decode0", "decode1"):
        flags = graphs[name].options["frozenInput"].split(",")
        assert len(flags) == sum(op.type == "Data" for op in graphs[name].proto.op)
        assert flags.count("1") == 3 + 8 * NUM_LAYERS, name
        frozen = {
            op.name
            for op in graphs[name].proto.op
            if op.type == "Data" and flags[op.attr["index"].i] == "1"
        }
        written = {
            op.input[0].split(":")[0]
            for op in graphs[name].proto.op
            if op.type == "ScatterNdUpdate"
        }
        assert not frozen & written


def test_the_dtype_rules_find_a_wrong_dtype() -> None:
    import torch

    right = {
        "query": torch.bfloat16,
        "key0": torch.bfloat16,
        "value0": torch.bfloat16,
        "block_table": torch.int32,
    }
    assert ir_rules.violations("FusedInferAttentionScore", right) == []
    wrong = {**right, "block_table": torch.int64, "actual_seq_lengths_kv": torch.int32}
    assert len(ir_rules.violations("FusedInferAttentionScore", wrong)) == 2
    assert ir_rules.violations("GatherV2", {"indices": torch.float32})
    assert ir_rules.violations("SwiGlu", {"y": torch.bfloat16}) == ["SwiGlu has no input y"]
