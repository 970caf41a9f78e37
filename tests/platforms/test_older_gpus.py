"""Turing, GPUs before it, and AMD: the dtypes, fused products and launch options that they get."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.kernels import ops
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.startup.engine_spec import choose_dtype
from tests.kernels import fake_flash_attn


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> CudaPlatform:
    fake_flash_attn.pretend_capability(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return CudaPlatform(0)


def test_turing_refuses_bfloat16_and_names_float16(turing: CudaPlatform) -> None:
    hf = SimpleNamespace(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"bfloat16 is not supported on this cuda device: .*dtype='float16'"
    ):
        choose_dtype("bfloat16", hf, turing)
    assert choose_dtype("float16", hf, turing) is torch.float16


def test_turing_runs_a_bfloat16_checkpoint_in_float16_and_says_so(
    turing: CudaPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nanovllm"):
        assert choose_dtype("auto", SimpleNamespace(dtype=torch.bfloat16), turing) is torch.float16
    assert "no bfloat16: the checkpoint's weights are converted to float16" in caplog.text
    caplog.clear()
    assert choose_dtype("auto", SimpleNamespace(dtype=torch.float32), turing) is torch.float32
    assert not caplog.text


def test_turing_has_fused_products_of_one_row_only(
    turing: CudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels.triton import common as triton_common

    def taken() -> list[bool]:
        triton_common.has_matrix_units.cache_clear()
        fuse_linear: Any = dict(turing.passes(fuse=True))["fuse_linear"]
        takes, weight = (
            fuse_linear.keywords["takes"][ops.linear],
            torch.empty(1024, 2048, device="meta"),
        )
        return [
            takes(torch.empty(num_rows, 2048, device="meta"), weight, False, False)
            for num_rows in (1, 2, 64)
        ]

    assert taken() == [True, False, False]
    fake_flash_attn.pretend_capability(monkeypatch, (8, 0))
    assert taken() == [True, True, True]
    triton_common.has_matrix_units.cache_clear()


def test_gpus_before_turing_are_refused(
    turing: CudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    fake_flash_attn.pretend_capability(monkeypatch, (7, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ValueError, match=r"compute capability 7\.0: at least 7\.5 is needed"):
        turing.prepare()


def test_dependent_launch_is_for_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from nanovllm.kernels.triton import common as triton_common

    options = triton_common.launch_options.__wrapped__
    fake_flash_attn.pretend_capability(monkeypatch, (9, 4))
    assert options(torch.device("cuda", 0)) == {"PDL": True, "launch_pdl": True}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert options(torch.device("cuda", 0)) == {"PDL": False}
