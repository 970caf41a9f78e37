"""Settings of all tests, and tiny random checkpoints."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest_plugins = ["tests.engines"]

# Without a GPU, Triton kernels run in Triton's interpreter. Set this before Triton is imported;
# transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Compiling after warm-up is an error in all tests.
os.environ["NANOVLLM_STRICT"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Packed weights are compared with their formula, so their inputs are not quantized on CPUs. The
# arithmetic with quantized inputs has its own tests (kernels/test_cpu_packed.py).
os.environ.setdefault("NANOVLLM_EXACT_INPUTS", "1")
# Processes that tests start use one thread, like `one_thread` here. On a busy machine a tiny model
# takes ten times the processor time with two, since OpenMP's threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Containers often set this. Each worker would then rewrite the assertions of all tests, half of the
# time of a collection, and each process that a test starts would compile this package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Shells start background jobs with SIGINT ignored; Python keeps that, and children inherit it.
# Tests interrupt themselves and the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, from half a minute to three, come first, so that no worker is left
# with one of them at the end.
LONGEST = (
    "tests/kernels/test_triton_builds.py",
    "tests/test_documents.py",
    "tests/models/test_families.py",
    "tests/startup/test_warm_start.py",
    "tests/replicas/test_ray_replicas.py",
    "tests/kernels/test_cpu_packed.py",
    "tests/replicas/test_lost_replicas.py",
    "tests/replicas/test_data_parallel.py",
    "tests/models/test_formats.py",
    "tests/models/test_packed_checkpoints.py",
    "tests/models/test_recurrent.py",
    "tests/parallel/test_rank_failures.py",
    "tests/engine/test_tensor_parallel.py",
    "tests/kernels/test_triton_linear.py",
    "tests/engine/test_speculation.py",
    "tests/engine/test_speculation_options.py",
    "tests/engine/test_vision_ranks.py",
    "tests/batch/test_local_cluster.py",
    "tests/kernels/test_fp8_kernels.py",
    "tests/engine/test_gguf_model.py",
    "tests/models/test_compressed_experts.py",
    "tests/serving/test_async_llm.py",
    # of the NPU's, which run by themselves
    "tests/npu/test_tensor_parallel_npu.py",
    "tests/npu/test_engine.py",
    "tests/npu/test_expert_engine.py",
    "tests/npu/test_cache.py",
    "tests/npu/test_vision_npu.py",
    "tests/npu/test_tiny_seeing_npu.py",
    "tests/npu/test_adapters_npu.py",
    "tests/npu/test_npugraph_ex.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect without the garbage collector, which would go through torch, transformers and all
    tests again and again: a quarter of the time. Later collections leave these objects out."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that need more GPUs than this machine has, or a missing browser. A skip would
    mean that something is wrong."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [name for name, needed in (("gpu", 1), ("gpus", 2)) if num_gpus < needed]
    if not shutil.which("chromium"):
        missing.append("browser")
    from nanovllm.kernels.flash_attention import SOURCES, Flash, installed

    if not (num_gpus and any(isinstance(installed(one), Flash) for one in SOURCES)):
        missing.append("flash_attn")
    left_out = [item for item in items if any(map(item.get_closest_marker, missing))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    longest = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: longest.get(item.nodeid.partition("::")[0], len(longest)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not shutil.which("chromium"):
        terminalreporter.write_line(
            "The tests of the page need Chromium (make browser): they were left out."
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _libraries_as_before() -> Generator[None]:
    """An engine says for its whole process where C++ libraries are, and whether one is compiled."""
    from nanovllm.kernels.cpu import build

    before = build._LibraryState.settings
    yield
    build._LibraryState.settings = before


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Generator[None]:
    """A command that runs in this process with --quiet sets these variables for good."""
    names = ("NANOVLLM_LOG_LEVEL", "TQDM_DISABLE")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def save_tiny(
    folder: Path, architecture: str = "qwen3", *, dtype: str = "float32", **changes: Any
) -> Path:
    """Save a small random checkpoint made by transformers; returns its folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).to(
        getattr(torch, dtype)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            # transformers initializes biases to zero, which would hide mistakes in them
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            mean = 0.0 if _adds_one(architecture, name) else 1.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.1)
        elif name.endswith((".D", ".A_log")):  # of Mamba-2
            parameter.data += 0.3 * torch.randn(parameter.shape)
        elif name.endswith(("router.scale", "per_expert_scale")):  # of Gemma 4
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            torch.nn.init.normal_(buffer, mean=1.0, std=0.1)
        elif architecture == "nemotron_h" and name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    model.save_pretrained(folder)
    return folder


def _adds_one(architecture: str, norm: str) -> bool:
    """True if a norm multiplies by 1 + weight."""
    if architecture.startswith(("qwen3_next", "qwen3_5")):
        return "linear_attn" not in norm
    return architecture.startswith("gemma3")  # Gemma 4's do not


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The config of a small model, with `changes`.

    `initializer_range` is large, so that logits are far apart and rounding does not change greedy
    tokens.
    """
    from transformers import AutoConfig

    fields: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 3,
        **changes,
    }
    return AutoConfig.for_model(architecture, **fields)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny_qwen3"))
