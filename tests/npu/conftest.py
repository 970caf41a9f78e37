"""torch_npu on the stub of CANN. `make test-npu` runs these tests in their own process."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if "NANOVLLM_CANN_STUB" in os.environ:
    from nanovllm import LLM, SamplingParams
    from nanovllm.hub import resolve
    from nanovllm.kernels.cpu import library as cpu_library
    from nanovllm.platforms.npu import NpuPlatform, load_torch_npu
    from nanovllm.schedule.plan import LogitEdits
    from nanovllm.schedule.request import Request
    from tests.npu import capture, hccl
    from tests.npu.ge import Ge
    from tests.npu.host import Host
    from tests.npu.op_runs import eagerly, in_graph
else:
    collect_ignore_glob = ["*"]

# The embedded model answers these with wide margins, so rounding does not change the answers. The
# last one is longer than the largest prefill bucket, and decode uses several buckets.
QUESTIONS = (
    "What is 37 + 45?",
    "Sort: 5 3 9 1",
    "Count from 3 to 9.",
    "Reverse: 4 8 1 7",
    "Sort: 9 2 7 5 3 8 1 6 4 2 9 5",
)
SIZES: dict[str, Any] = {
    "max_num_seqs": 4,
    "graph_batch_sizes": (2, 4),
    "num_kvcache_blocks": 12,
    "max_model_len": 256,
    "max_num_batched_tokens": 32,
}


@pytest.fixture(scope="session", autouse=True)
def host(ge: Ge) -> Iterator[Host]:
    """Eager npu ops run on the host for the whole session, because registered kernels stay."""
    patch = pytest.MonkeyPatch()
    mode = Host()
    mode.install(patch)
    capture.install(mode, patch)
    hccl.install(mode, patch)
    with mode:
        yield mode
    patch.undo()


@pytest.fixture(scope="session")
def ge() -> Iterator[Ge]:
    load_torch_npu()
    patch = pytest.MonkeyPatch()
    recorder = Ge()
    recorder.install(patch)
    yield recorder
    patch.undo()


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model's first two layers: its graphs take a third of the time. The answers mean
    nothing, so use it where programs are counted, or where two runs of them are compared."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(resolve("tiny-qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: one for name, one in weights.items() if not re.search(r"layers\.[2-9]", name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of programs of all tests, in all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    return str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "nanovllm")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", store(tmp_path_factory))


def answers(llm: LLM, edits: LogitEdits | None = None, **params: Any) -> list[list[int]]:
    """Token ids of the answers to `QUESTIONS` in one batch; every second one with the edits."""
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **params})
    scheduler = llm.engine.scheduler
    add = scheduler.add

    def add_edited(request: Request) -> None:
        request.edits = edits if len(scheduler.waiting) % 2 else None
        add(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "add", add_edited)
        outputs = llm.chat(conversations, settings, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(params=["graph", "eager"])
def run(request: pytest.FixtureRequest, ge: Ge, host: Host) -> Callable[..., Any]:
    """Runs a function of npu tensors as a graph of GE or op by op."""
    NpuPlatform().prepare()
    return in_graph if request.param == "graph" else eagerly


@pytest.fixture(scope="session")
def cpu_answers() -> Callable[..., list[list[int]]]:
    """The CPU's answers in bf16, as on an NPU, by the plain meaning of our ops, not by kernels.
    They are kept: most tests compare with the same few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu_library,
            "available",
            lambda *args, **kwargs: (False, "the tests of the NPU compare with plain torch"),
        )
        llm = LLM("tiny-qwen3", device="cpu", dtype="bfloat16", enforce_eager=True, **SIZES)
    known: list[tuple[LogitEdits | None, dict[str, Any], list[list[int]]]] = []

    def of_cpu(edits: LogitEdits | None = None, **params: Any) -> list[list[int]]:
        for other_edits, other_params, found in known:
            if other_edits is edits and other_params == params:
                return deepcopy(found)
        known.append((edits, params, answers(llm, edits, **params)))
        return deepcopy(known[-1][2])

    return of_cpu


@pytest.fixture(scope="session")
def npu_llm(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The embedded model in GE mode; its graphs are the first ones of `ge`."""
    os.environ["NANOVLLM_CACHE"] = store(tmp_path_factory)
    torch.set_num_threads(1)
    llm = LLM("tiny-qwen3", device="npu", **SIZES)
    yield llm
    llm.close()
