"""Models with experts give the CPU's tokens on device "npu" in every mode.

Random checkpoints run in fp32, which Ascend's attention does not support on a device: rounding to
bf16 changes near-ties of their experts and tokens. The trained model has wide margins.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import decompose_experts
from compress.source import open_source

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.models.experts.compressed import Compressed
from nanovllm.platforms import npu
from tests.architectures import of_types
from tests.conftest import save_tiny
from tests.npu import ascend_ir, conftest, ir_rules
from tests.npu.conftest import answers
from tests.npu.ge import Ge, Graph
from tests.npu.host import Host, host_view

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    # the first layer is dense
    "qwen3_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
}
MODES: dict[str, dict[str, Any]] = {
    "ge": {},
    "captured": {"npu_graph_mode": "aclgraph"},
    "captured-unfused": {"npu_graph_mode": "aclgraph", "fuse": False},
    "npugraph_ex": {"npu_graph_mode": "npugraph_ex"},
    "eager": {"enforce_eager": True},
    "eager-unpadded": {"enforce_eager": True, "pad_batches": False},
}
SIZES: dict[str, Any] = {
    "max_num_seqs": 3,
    "graph_batch_sizes": (3,),
    "num_kvcache_blocks": 9,
    "max_model_len": 128,
    "max_num_batched_tokens": 16,
    "skip_tokenizer_init": True,
}
TRAINED: dict[str, Any] = {**conftest.SIZES, "graph_batch_sizes": (4,)}
# more than one prefill bucket, more prompts than rows, and more tokens than one step takes
PROMPTS = [[7], list(range(20, 39)), [5, 9, 300, 17, 4], list(range(400, 431))]
FUSED = {
    "npu::npu_moe_gating_top_k_softmax",
    "npu::npu_moe_init_routing_v2",
    "npu::npu_grouped_matmul",
    "npu::npu_moe_finalize_routing",
}


def tokens(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    @cache
    def save(name: str) -> str:
        return str(save_tiny(tmp_path_factory.mktemp(name), name, **EXPERTS[name]))

    return save


def tokens_on_cpu(folder: str) -> list[list[int]]:
    """The tokens of a CPU engine that runs the plain meaning of our ops, not kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
        llm = LLM(folder, device="cpu", enforce_eager=True, dtype="float32", **SIZES)
        found = tokens(llm)
        llm.close()
    return found


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Callable[[str], str]) -> Callable[[str], list[list[int]]]:
    return cache(lambda name: tokens_on_cpu(checkpoint(name)))


@pytest.fixture
def _fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))


@pytest.mark.shows("NPU", architectures=of_types(*EXPERTS))
@pytest.mark.usefixtures("_fp32")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EXPERTS)
def test_greedy_tokens_are_the_cpus(
    name: str,
    mode: str,
    checkpoint: Callable[[str], str],
    on_cpu: Callable[[str], list[list[int]]],
    host: Host,
    ge: Ge,
) -> None:
    """Padding reaches no token: the last block, which only padding writes, holds NaN."""
    host.seen.clear()
    num_graphs = len(ge.graphs)
    llm = LLM(checkpoint(name), device="npu", dtype="float32", **SIZES, **MODES[mode])
    for layer_cache in llm.engine.runner.steps.caches:
        for tensor in (layer_cache.k_CBKH, layer_cache.v_CBKH):
            host_view(tensor)[0].fill_(float("nan"))
    assert tokens(llm) == on_cpu(name)
    llm.close()
    # in graphs of GE these are Ascend IR, which the tests below check
    assert (host.seen >= FUSED) == (mode != "ge")
    assert (len(ge.graphs) > num_graphs) == (mode == "ge")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A checkpoint with compressed experts, and the CPU's tokens."""
    folder = save_tiny(tmp_path_factory.mktemp("compressed"), "mixtral", **EXPERTS["mixtral"])
    source = open_source(str(folder))
    decompose_experts.run(source, folder / "svd_experts", 19, "float32", torch.device("cpu"))
    return str(folder), tokens_on_cpu(str(folder))


@pytest.mark.usefixtures("_fp32")
@pytest.mark.parametrize("mode", ["ge", "captured", "eager"])
def test_compressed_experts_give_the_tokens_of_the_cpu(
    mode: str, compressed: tuple[str, list[list[int]]]
) -> None:
    folder, expected = compressed
    llm = LLM(folder, device="npu", dtype="float32", **SIZES, **MODES[mode])
    assert isinstance(llm.engine.runner.params.layers[1].experts, Compressed)
    assert tokens(llm) == expected
    llm.close()


@pytest.fixture(scope="module")
def trained_on_cpu() -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
        llm = LLM("tiny-mixtral", device="cpu", dtype="bfloat16", enforce_eager=True, **TRAINED)
    found = answers(llm)
    llm.close()
    return found


@pytest.mark.parametrize("mode", ["ge", "captured", "npugraph_ex", "eager"])
def test_the_trained_model_answers_as_on_the_cpu(
    mode: str, trained_on_cpu: list[list[int]]
) -> None:
    llm = LLM("tiny-mixtral", device="npu", **TRAINED, **MODES[mode])
    assert llm.engine.model_config.dtype == torch.bfloat16
    assert answers(llm) == trained_on_cpu
    llm.close()


@pytest.fixture(scope="module")
def graphs(ge: Ge, checkpoint: Callable[[str], str]) -> dict[str, Graph]:
    """The graphs with attention, prefill and decode, of a model whose second layer is sparse."""
    first = len(ge.graphs)
    LLM(checkpoint("qwen3_moe"), device="npu", dtype="bfloat16", **SIZES).close()
    steps = [graph for graph in ge.graphs[first:] if graph.count("FusedInferAttentionScore")]
    return {"decode" if graph.count("ArgMaxV2") else "prefill": graph for graph in steps}


def test_a_sparse_layer_is_the_fused_ops(graphs: dict[str, Graph]) -> None:
    assert graphs.keys() == {"decode", "prefill"}
    for name, graph in graphs.items():
        found = Counter(op.type for op in graph.proto.op)
        expected = {
            "MoeGatingTopKSoftmax": 1,
            "MoeInitRoutingV3": 1,
            "GroupedMatmul": 2,
            "MoeFinalizeRoutingV2": 1,
            "SwiGlu": 2,  # one in the dense layer
        }
        assert {op_type: found[op_type] for op_type in expected} == expected, name
        assert set(found) <= {*ascend_ir.OPS, *ascend_ir.STRUCTURE}, name
        assert not {"TensorMove", "Identity"} & set(found), name


def test_ge_can_fuse_the_transposition_of_experts(graphs: dict[str, Graph]) -> None:
    """GE's GroupedMatmulTransFusionPass looks for Transpose right before GroupedMatmul; otherwise
    each step would copy all experts. The weights are graph inputs, and frozen."""
    for graph in graphs.values():
        by_name = {op.name: op for op in graph.proto.op}
        frozen = graph.options["frozenInput"].split(",")
        for op in graph.proto.op:
            if op.type == "GroupedMatmul":
                weight = by_name[op.input[1].split(":")[0]]
                assert weight.type == "Transpose"
                data = by_name[weight.input[0].split(":")[0]]
                assert data.type == "Data" and frozen[data.attr["index"].i] == "1"


def test_dtypes_are_those_that_the_ops_declare(graphs: dict[str, Graph]) -> None:
    for name, graph in graphs.items():
        assert any(op.type == "GroupedMatmul" for op, _ in graph.dtypes), name
        found = [
            broken for op, dtypes in graph.dtypes for broken in ir_rules.violations(op.type, dtypes)
        ]
        assert not found, (name, found)
