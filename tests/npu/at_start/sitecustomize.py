"""With this folder on PYTHONPATH a Python process starts with the patches of `conftest.py`.

The interpreter replaces GE, and eager ops run on the host. Programs and the processes that they
start need no change.
"""

from __future__ import annotations

import pytest

from nanovllm.platforms.npu import load_torch_npu
from tests.npu import capture, hccl
from tests.npu.ge import Ge
from tests.npu.host import Host

load_torch_npu()
ge, host = Ge(), Host()
ge.install(pytest.MonkeyPatch())
host.install(pytest.MonkeyPatch())
capture.install(host, pytest.MonkeyPatch())
hccl.install(host, pytest.MonkeyPatch())
host.__enter__()
