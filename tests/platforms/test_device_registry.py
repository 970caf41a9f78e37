"""The registry of devices: what each module offers, and what selecting a device imports."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from nanovllm import platforms
from nanovllm.platforms.base import Traits

IMPORTS = """
import sys
from nanovllm import platforms
assert "torch" not in sys.modules
platforms.select("cpu")
heavy = ("triton", "torch_npu", "nanovllm.kernels.triton", "nanovllm.kernels.npu")
assert not [name for name in heavy if name in sys.modules]
"""


def test_one_device_does_not_import_what_others_need() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", platforms.DEVICES)
def test_every_device_offers_the_same_names(name: str) -> None:
    module = importlib.import_module(f"nanovllm.platforms.{name}")
    assert isinstance(module.TRAITS, Traits) and module.TRAITS.name == name
    assert list(module.TRAITS.decode_rows) == sorted(set(module.TRAITS.decode_rows))
    problem = module.problem(99)
    assert problem is None if name == "cpu" else isinstance(problem, str)
    assert callable(module.create)


@pytest.mark.parametrize("device", ["tpu", "", "cpu:0", "auto:0", "cuda:x", "cuda:-1"])
def test_other_names_are_refused_with_those_that_exist(device: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"device '{device}' is not supported: use one of auto, cuda, .* or cuda:N, npu:N$",
    ):
        platforms.select(device)


def test_an_option_of_no_device_is_not_ignored() -> None:
    with pytest.raises(KeyError, match="cpu_graph_mode"):
        platforms.select("cpu", cpu_graph_mode="fast")
