"""Models with experts give the CPU's tokens on device "npu" in every mode.

Most tests run in fp32, which Ascend's attention does not support on a device: between random
weights, rounding to bf16 changes near-ties of experts and of tokens. One test runs in bf16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import kernels as cpu_kernels
from nanovllm.platforms import npu
from tests.conftest import save_tiny
from tests.npu import ascend_ir, ir_rules
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
# more than one prefill bucket, more prompts than rows, and more tokens than one step takes
PROMPTS = [[7], list(range(20, 39)), [5, 9, 300, 17, 4], list(range(400, 431))]
FUSED = {
    "npu::npu_moe_gating_top_k_softmax",
    "npu::npu_moe_init_routing_v2",
    "npu::npu_grouped_matmul",
    "npu::npu_moe_finalize_routing",
}


def tokens(llm: LLM, prompts: Sequence[list[int]] = PROMPTS, num: int = 12) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    @cache
    def save(name: str) -> str:
        return str(save_tiny(tmp_path_factory.mktemp(name), name, **EXPERTS[name]))

    return save


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Callable[[str], str]) -> Callable[..., LLM]:
    """A CPU engine that runs the plain meaning of our ops, not kernels."""

    @cache
    def make(name: str, dtype: str) -> LLM:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_kernels, "available", lambda *args, **kwargs: (False, "plain torch"))
            return LLM(checkpoint(name), device="cpu", enforce_eager=True, dtype=dtype, **SIZES)

    return make


@pytest.fixture
def _fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))


@pytest.mark.usefixtures("_fp32")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EXPERTS)
def test_greedy_tokens_are_the_cpus(
    name: str,
    mode: str,
    checkpoint: Callable[[str], str],
    on_cpu: Callable[..., LLM],
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
    assert tokens(llm) == tokens(on_cpu(name, "float32"))
    llm.close()
    # in graphs of GE the fused ops are other ones, which test_the_graphs checks
    assert (FUSED <= host.seen) == ((mode != "ge"))
    assert (len(ge.graphs) > num_graphs) == (mode == "ge")


@pytest.mark.parametrize("mode", ["ge", "npugraph_ex"])
def test_greedy_tokens_in_bf16_are_the_cpus(
    mode: str, checkpoint: Callable[[str], str], on_cpu: Callable[..., LLM]
) -> None:
    """Compared where the CPU gives the same tokens in fp32 and bf16, so that margins are wide."""
    prompts = [list(range(start, start + 1 + start % 19)) for start in range(3, 480, 23)]
    rounded = tokens(on_cpu("mixtral", "bfloat16"), prompts, num=4)
    exact = tokens(on_cpu("mixtral", "float32"), prompts, num=4)
    is_wide = [one == other for one, other in zip(rounded, exact)]
    assert sum(is_wide) >= 10
    llm = LLM(checkpoint("mixtral"), device="npu", dtype="bfloat16", **SIZES, **MODES[mode])
    found = tokens(llm, prompts, num=4)
    llm.close()
    assert [a for a, wide in zip(found, is_wide) if wide] == [
        a for a, wide in zip(exact, is_wide) if wide
    ]
