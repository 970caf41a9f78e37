"""The CPU: what it says when its kernels cannot be built."""

from __future__ import annotations

import pytest

from nanovllm.kernels.cpu import kernels as cpu_kernels
from nanovllm.platforms.cpu import CpuPlatform


def test_a_full_disk_is_not_reported_as_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "OSError: [Errno 28] No space left on device: '/store/cpp/.building-x'"
    monkeypatch.setattr(cpu_kernels, "available", lambda: (False, reason))
    platform = CpuPlatform()
    platform.prepare()
    lowering, problem = platform.lowering()
    assert lowering is None and problem.endswith(reason) and "compiler" not in problem
