"""With this folder on PYTHONPATH a Python process starts as `conftest.py` makes the tests' own: the interpreter stands where
GE would be, and eager ops run on the host. So programs run as they are, and so do the processes that they start."""

from __future__ import annotations

import pytest

from nanovllm.platforms.npu import load_torch_npu
from tests.npu.ge import Ge
from tests.npu.host import Host

load_torch_npu()
ge, host = Ge(), Host()
ge.install(pytest.MonkeyPatch())
host.install(pytest.MonkeyPatch())
host.__enter__()
