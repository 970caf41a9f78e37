"""Errors for options that an NPU does not support and for machines without CANN."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.platforms.npu import CANN_LIBRARIES


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "npu:1"}, r"device 'npu:1' is not available: torch_npu finds 1 NPU\(s\)"),
        (
            {"device": "npu:x"},
            "device 'npu:x' is not supported: use one of auto, cuda, npu, mps, cpu or cuda:N",
        ),
        (
            {"dtype": "float32"},
            "float32 is not supported on this npu device: use one of bfloat16, float16",
        ),
        (
            {"kvcache_block_size": 64},
            "kvcache_block_size is 64: on an NPU it must be a multiple of 128, at most 512",
        ),
        (
            {"kvcache_block_size": 640},
            "kvcache_block_size is 640: on an NPU it must be a multiple of 128, at most 512",
        ),
        (
            {"graph_batch_sizes": [16, 65537]},
            "graph_batch_sizes holds 65537: attention on an NPU takes at most 65536 rows",
        ),
        (
            {"graph_batch_sizes": range(1, 67), "npu_graph_mode": "aclgraph"},
            "graph_batch_sizes holds 66 sizes: "
            "npu_graph_mode='aclgraph' captures at most 64 graphs",
        ),
        (
            {"graph_batch_sizes": range(1, 67), "npu_graph_mode": "npugraph_ex"},
            "npu_graph_mode='npugraph_ex' captures at most 64 graphs",
        ),
        (
            {"npu_graph_mode": "cuda"},
            "npu_graph_mode is 'cuda': it must be one of ascend_ir, aclgraph, npugraph_ex",
        ),
        (
            {"device": "cpu", "npu_graph_mode": "aclgraph"},
            "npu_graph_mode is 'aclgraph', but the device is 'cpu'",
        ),
        (
            {"npu_graph_mode": "aclgraph", "run_ahead": 1},
            "npu_graph_mode='aclgraph' does not go with run_ahead=1",
        ),
        (
            {"npu_graph_mode": "aclgraph", "capture": False},
            "does not go with run_ahead=None, capture=False",
        ),
        (
            {"npu_graph_mode": "npugraph_ex", "run_ahead": 1},
            "npu_graph_mode='npugraph_ex' does not go with run_ahead=1",
        ),
        ({"npu_graph_options": "fast"}, "npu_graph_options is 'fast': it must be a dict"),
        (
            {"npu_graph_options": {"ge_config.speed": 1}},
            "npu_graph_options names 'ge_config.speed', which torchair's",
        ),
        ({"npu_graph_options": {"mode": "x"}}, "npu_graph_options names 'mode', which torchair's"),
        (
            {"npu_graph_options": {"experimental_config.tiling_schedule_optimize": "maybe"}},
            r"npu_graph_options\['experimental_config.tiling_schedule_optimize'\] is 'maybe'",
        ),
        (
            {"npu_graph_options": {"ge_config.oo_level": "O1"}, "npu_graph_mode": "aclgraph"},
            "these are options of npu_graph_mode='ascend_ir' and 'npugraph_ex', and the mode is "
            "'aclgraph'",
        ),
        (
            {"npu_graph_options": {"ge_config.oo_level": "O1"}, "npu_graph_mode": "npugraph_ex"},
            "npu_graph_options names 'ge_config.oo_level', which npugraph_ex's CompilerConfig",
        ),
        (
            {"npu_graph_options": {"clone_input": True}, "npu_graph_mode": "npugraph_ex"},
            "npu_graph_options names 'clone_input', which the engine sets",
        ),
        (
            {"npu_graph_options": {"static_kernel_compile": 3}, "npu_graph_mode": "npugraph_ex"},
            r"npu_graph_options\['static_kernel_compile'\] is 3",
        ),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM("tiny-qwen3", **{"device": "npu", **options})


def test_without_cann_the_missing_libraries_are_named() -> None:
    """With torch_npu but without CANN: the stub's folder is not on the loader's path."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    script = "from nanovllm import LLM\nLLM('tiny-qwen3', device='npu')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"ValueError: device 'npu' is not available: these libraries of CANN are not found: ", last
    ), done.stderr
    assert all(name in last for name in CANN_LIBRARIES) and "set_env.sh" in last
