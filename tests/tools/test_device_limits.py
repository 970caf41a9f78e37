"""The limits of a device: which sizes are measured, and the rates computed from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanovllm.tools import device_limits
from nanovllm.tools.device_limits import DeviceLimits, best_seconds, measure_limits


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_limits, "COPY_BYTES", (400, 8000))
    monkeypatch.setattr(device_limits, "MATRIX_SIZES", (10, 20))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((0.5, 0.25), DeviceLimits(1600, 8000)),
        ((0.0005, 0.5, 0.0001, 0.2), DeviceLimits(1.6e6, 2e7)),
        ((0.0005, 0.001, 0.0001, 0.0002), DeviceLimits(1.6e7, 8e7)),
    ],
)
def test_the_larger_size_is_for_devices_too_fast_for_the_smaller(
    small: None, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], expected: DeviceLimits
) -> None:
    """Bytes are read and written, a product takes 2 · 10³ or 2 · 20³ operations."""
    times = iter(seconds)
    monkeypatch.setattr(device_limits, "best_seconds", lambda work, synchronize: next(times))
    found = measure_limits(torch.device("cpu"), torch.float32, lambda: None)
    assert found.bandwidth == pytest.approx(expected.bandwidth)
    assert found.flops == pytest.approx(expected.flops)
    assert next(times, None) is None, "every size that is measured counts"


def test_sizes_are_halved_until_they_fit_half_of_the_free_memory(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy takes twice its bytes, and fp32 matrices of n rows take 8 n²."""
    allocated: list[int] = []
    real = torch.randn

    def randn(*shape: int, **options: Any) -> torch.Tensor:
        made = real(*shape, **options)
        allocated.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(device_limits, "best_seconds", lambda work, synchronize: 1e-6)
    measure_limits(torch.device("cpu"), torch.float32, lambda: None, free_bytes=1800)
    assert allocated == [400, 248, 400]
    allocated.clear()
    measure_limits(torch.device("cpu"), torch.float32, lambda: None, free_bytes=16000)
    assert allocated == [400, 4000, 400, 1600]


def test_a_run_is_timed_between_two_waits() -> None:
    events: list[str] = []
    assert best_seconds(lambda: events.append("run"), lambda: events.append("wait")) > 0
    assert events == ["wait", "run", "wait"] * device_limits.REPEATS


def test_a_real_device_has_limits(small: None) -> None:
    found = measure_limits(torch.device("cpu"), torch.bfloat16, lambda: None)
    assert found.bandwidth > 0 and found.flops > 0
    assert found.seconds(2 * found.bandwidth, found.flops) == pytest.approx(2)
    assert found.seconds(found.bandwidth, 3 * found.flops) == pytest.approx(3)
