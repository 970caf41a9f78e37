"""Models that see give the CPU's tokens on device "npu" in every mode, with images in prompts.

Random checkpoints run in fp32, which Ascend's attention does not support on a device: rounding to
bf16 changes near-ties between their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms import npu
from tests.models.test_vision_text import MODELS, NAMES, PROMPTS, Given, answers
from tests.npu import ascend_ir, ir_rules
from tests.npu.ge import Ge, Graph
from tests.npu.host import Host

MODES: dict[str, dict[str, Any]] = {
    "captured": {"npu_graph_mode": "aclgraph"},
    "npugraph_ex": {"npu_graph_mode": "npugraph_ex"},
    "eager": {"enforce_eager": True},
    "eager-unpadded": {"enforce_eager": True, "pad_batches": False},
}
# chunks end within images, and the largest image needs the larger budget
SIZES: dict[str, Any] = {
    "max_num_seqs": 3, "graph_batch_sizes": (3,), "num_kvcache_blocks": 9, "max_model_len": 128,
    "max_num_batched_tokens": 16, "vision_patch_budgets": (32, 96), "dtype": "float32",
    "skip_tokenizer_init": True,
}  # fmt: skip
NUM_TOKENS = 5


class Case:
    """A checkpoint, prompts for it, and the CPU's tokens by the plain meaning of our ops."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        hf = MODELS[name]().eval()
        for key, param in hf.named_parameters():
            if param.dim() > 1:
                torch.nn.init.normal_(param, std=0.1 if "visual" in key else 0.2)
        hf.lm_head.weight.data[80:] = 0  # no answer has a token of images
        hf.save_pretrained(folder)
        self.folder = str(folder)
        self.prompts = [Given(hf, parts, seed) for seed, parts in enumerate(PROMPTS.values())]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_library, "available", lambda *args, **kwargs: (False, "plain torch"))
            llm = LLM(self.folder, device="cpu", enforce_eager=True, **SIZES)
            self.expected = self.tokens(llm)
            self.of_given = self.tokens(llm, encodes=False)
            llm.close()

    def tokens(self, llm: LLM, *, encodes: bool = True) -> list[list[int]]:
        found = answers(llm, self.prompts, NUM_TOKENS, encodes=encodes)
        return [completion.token_ids for completion in found]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", autouse=True)
def _fp32() -> Iterator[None]:
    dtypes = (torch.float32, *npu.TRAITS.supported_dtypes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npu, "TRAITS", replace(npu.TRAITS, supported_dtypes=dtypes))
        yield


@pytest.fixture(scope="module", params=MODELS)
def in_graphs(
    request: pytest.FixtureRequest, case: Callable[[str], Case], ge: Ge, host: Host
) -> Iterator[tuple[Case, LLM, list[Graph]]]:
    """A case, an engine in GE's mode, and the graphs of its start."""
    first, one = len(ge.graphs), case(request.param)
    llm = LLM(one.folder, device="npu", **SIZES)
    yield one, llm, ge.graphs[first:]
    llm.close()


@pytest.mark.shows("NPU", architectures=NAMES)
def test_graphs_give_the_cpus_tokens(in_graphs: tuple[Case, LLM, list[Graph]], ge: Ge) -> None:
    one, llm, _ = in_graphs
    num_lowered = ge.num_lowered
    assert one.tokens(llm) == one.expected
    assert one.tokens(llm, encodes=False) == one.of_given
    assert ge.num_lowered == num_lowered, "no size of an image needs a graph of its own"


def test_there_is_a_graph_for_each_budget_and_for_prompts_with_and_without_images(
    in_graphs: tuple[Case, LLM, list[Graph]],
) -> None:
    _, llm, graphs = in_graphs
    names = [name for name, *_ in llm.engine.runner.compiler._programs]
    assert names.count("tower") == 2 and names.count("prefill") == 2
    assert not {"layer", "tower_block", "with_given"} & set(names)
    for graph in graphs:
        types = {op.type for op in graph.proto.op}
        assert types <= {*ascend_ir.OPS, *ascend_ir.STRUCTURE}
        # heads that are cut to their size are copied, and nothing else is
        has_tower = (
            not types & {"ScatterNdUpdate", "ArgMaxV2"} and "FusedInferAttentionScore" in types
        )
        copies = {"TensorMove", "Assign"} if has_tower else {"TensorMove", "Assign", "Identity"}
        assert not copies & types
        for op, dtypes in graph.dtypes:
            found = ir_rules.violations(op.type, dtypes)
            assert not [text for text in found if "float32" not in text], found


@pytest.mark.parametrize(
    ("name", "mode"),
    [("qwen2_5", "captured"), ("qwen2_5", "eager"), ("qwen3", "npugraph_ex"),
     ("qwen3", "eager-unpadded")],
)  # fmt: skip
def test_other_modes_give_the_cpus_tokens(
    name: str, mode: str, case: Callable[[str], Case], ge: Ge, host: Host
) -> None:
    one, num_graphs = case(name), len(ge.graphs)
    llm = LLM(one.folder, device="npu", **SIZES, **MODES[mode])
    try:
        assert one.tokens(llm) == one.expected
    finally:
        llm.close()
    assert len(ge.graphs) == num_graphs


def test_embeddings_for_a_text_model_are_refused_where_steps_are_whole(npu_llm: LLM) -> None:
    with pytest.raises(ValueError, match="use enforce_eager=True"):
        npu_llm.engine.runner.add_embeddings("key", torch.zeros(2, 64))
