"""device="npu" on a machine without torch_npu. tests/npu tests what runs with torch_npu."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from nanovllm import LLM, EngineConfig, platforms


def test_without_torch_npu_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch_npu" else original(name, *rest),
    )
    match = (
        r"device 'npu' is not available: torch_npu is not installed: pip install torch_npu, "
        r"in the version of torch \(\d"
    )
    with pytest.raises(ValueError, match=match):
        LLM("tiny-qwen3", device="npu")


@pytest.mark.parametrize(
    "options", [{"npu_graph_mode": "ascend_ir"}, {"npu_graph_options": {}}], ids=str
)
def test_options_of_an_npu_are_refused_elsewhere(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{next(iter(options))} is .*, but the device is 'cpu': "
        "it is an option of device 'npu'",
    ):
        platforms.select("cpu", **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"npu_graph_mode": "torchair"},
            "npu_graph_mode is 'torchair': it must be one of ascend_ir, aclgraph, npugraph_ex",
        ),
        ({"npu_graph_options": ["O1"]}, r"npu_graph_options is \['O1'\]: it must be a dict"),
        (
            {"npu_graph_mode": "aclgraph", "run_ahead": 1},
            "does not go with run_ahead=1, capture=True",
        ),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig.from_options("tiny-qwen3", options)
