"""The CPU: what it says when its kernels cannot be built."""

from __future__ import annotations

import pytest

from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.platforms.cpu import CpuPlatform


def test_the_first_line_of_the_reason_is_shown_and_a_full_disk_is_no_missing_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "OSError: [Errno 28] No space left on device: '/store/cpp/.building-x'"
    monkeypatch.setattr(cpu_library, "available", lambda: (False, f"{reason}\nin line 1"))
    platform = CpuPlatform()
    platform.prepare()
    assert platform.lowering() == (
        None, f"graph mode lacks its C++ kernels, running eagerly: {reason}"
    )  # fmt: skip
