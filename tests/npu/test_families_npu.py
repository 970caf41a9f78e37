"""Dense families give the CPU's tokens on device "npu".

Random checkpoints run in fp32, which Ascend's attention does not support on a device: rounding to
bf16 changes near-ties of their tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models.families import FAMILIES
from tests.npu.ge import Ge
from tests.npu.host import Host, host_view

MODES: dict[str, dict[str, Any]] = {
    "ge": {},
    "captured": {"npu_graph_mode": "aclgraph"},
    "eager": {"enforce_eager": True},
}
SIZES: dict[str, Any] = {
    "max_num_seqs": 3,
    "graph_batch_sizes": (3,),
    "num_kvcache_blocks": 9,
    "max_model_len": 128,
    "max_num_batched_tokens": 16,
    "dtype": "float32",
    "skip_tokenizer_init": True,
}
# two rotary tables without windows, which are refused on an NPU
CHANGES: dict[str, dict[str, Any]] = {"smollm3": {}, "gemma3": {"sliding_window": None}}
# more than one prefill bucket, more prompts than rows, and more tokens than one step takes
PROMPTS = [[7], list(range(20, 39)), [5, 9, 30, 17, 4], list(range(40, 71))]


def tokens(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module", params=CHANGES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[list[int]]]:
    """A checkpoint, and the tokens of a CPU engine that runs the plain meaning of our ops."""
    case = next(one for one in FAMILIES if one.name == request.param)
    folder = str(case.save(tmp_path_factory.mktemp(case.name), **CHANGES[case.name]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
        llm = LLM(folder, device="cpu", enforce_eager=True, **SIZES)
        expected = tokens(llm)
        llm.close()
    return folder, expected


@pytest.mark.shows("NPU", architectures=["SmolLM3ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_the_cpus(
    mode: str,
    family: tuple[str, list[list[int]]],
    host: Host,
    ge: Ge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding reaches no token: the block that only padding writes holds NaN."""
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    monkeypatch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
    folder, expected = family
    first = len(ge.graphs)
    llm = LLM(folder, device="npu", **SIZES, **MODES[mode])
    for cache in llm.engine.runner.steps.caches:
        for tensor in (cache.k_CBKH, cache.v_CBKH):
            host_view(tensor)[0].fill_(float("nan"))
    assert tokens(llm) == expected
    llm.close()
    graphs = ge.graphs[first:]
    assert bool(graphs) == (mode == "ge")
    for graph in graphs:
        assert not graph.count("TensorMove")
