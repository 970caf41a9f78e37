"""Which attention an engine gets: by option, device, what is installed and what the model needs; and what it says of it."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nanovllm
from nanovllm import platforms
from nanovllm.platforms import attention
from nanovllm.platforms.base import Platform
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.platforms.mps import MpsPlatform
from nanovllm.platforms.npu import NpuPlatform
from nanovllm.startup.choose import choose_dtype
from tests.kernels import fake_flash_attn

CLASSES = {"cpu": CpuPlatform, "cuda": CudaPlatform, "mps": MpsPlatform, "npu": NpuPlatform}


def fake(name: str = "cuda") -> Platform:
    """A platform whose device need not be there."""
    platform = object.__new__(CLASSES[name])
    traits = sys.modules[CLASSES[name].__module__].TRAITS
    platform.device, platform.traits = torch.device("cuda", 0), traits
    return platform


def choose(option: str, device: str = "cuda", **facts: Any) -> str:
    needs: dict[str, Any] = {
        "dtype": torch.float16,
        "head_dim": 128,
        "block_size": None,
        "windows": (0, 0),
        **facts,
    }
    return attention.choose(option, fake(device), attention.Facts(**needs))


def test_auto_is_the_device_s_own_kernels_whatever_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_flash_attn.install(monkeypatch, 2)
    for device in ("cuda", "cpu", "mps", "npu"):
        assert choose("auto", device) == attention.OWN
    assert choose("triton") == attention.OWN
    assert choose("sdpa") == choose("sdpa", "cpu") == "sdpa"


@pytest.mark.parametrize(
    ("option", "device", "use"),
    [
        ("triton", "cpu", "'auto' or 'sdpa'"),
        ("flash_attn", "cpu", "'auto' or 'sdpa'"),
        ("sdpa", "npu", "'auto'"),
    ],
)
def test_a_backend_of_another_device_is_refused(option: str, device: str, use: str) -> None:
    with pytest.raises(
        ValueError, match=f"attention_backend '{option}' is not for the device {device}: use {use}$"
    ):
        choose(option, device)


@pytest.mark.parametrize(
    ("capability", "package", "command"),
    [
        ((7, 5), "flash-attn is not installed", "pip install 'flash-attn<2' --no-build-isolation"),
        ((8, 6), "flash-attn is not installed", "pip install flash-attn --no-build-isolation"),
        (
            (9, 0),
            "flash-attn-3 is not installed; flash-attn is not installed",
            "pip install flash-attn --no-build-isolation",
        ),
    ],
)
def test_a_missing_flash_attn_is_an_error_with_the_command(
    capability: tuple[int, int], package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as it is where nothing is installed: `None` in sys.modules makes the import fail in another way
    monkeypatch.setattr(attention.flash_attention.importlib, "import_module", _absent)
    fake_flash_attn.pretend_capability(monkeypatch, capability)
    with pytest.raises(ValueError) as error:
        choose("flash_attn")
    assert str(error.value) == f"attention_backend is 'flash_attn', but {package}: {command}"


def _absent(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])


def test_a_broken_flash_attn_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention.flash_attention.importlib, "import_module", broken)
    fake_flash_attn.pretend_capability(monkeypatch, (8, 0))
    with pytest.raises(
        ValueError,
        match=r"flash-attn cannot be imported \(undefined symbol: _ZN3c10\): pip install",
    ):
        choose("flash_attn")


def test_no_flash_attn_is_for_gpus_before_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash_attn.pretend_capability(monkeypatch, (7, 0))
    with pytest.raises(
        ValueError, match=r"flash-attn needs compute capability 7\.5 and this GPU has 7\.0$"
    ):
        choose("flash_attn")


@pytest.mark.parametrize(
    ("generation", "facts", "match"),
    [
        (1, {"head_dim": 256}, "head size is 256, and flash-attn 1 takes multiples of 8 up to 128"),
        (
            1,
            {"windows": (0, 4096)},
            "a layer has a window of 4096 tokens, and flash-attn 1 knows no windows",
        ),
        (
            2,
            {"block_size": 64},
            "kvcache_block_size is 64, and flash-attn 2 takes multiples of 256",
        ),
        (
            2,
            {"dtype": torch.float32},
            "dtype is float32, and flash-attn 2 computes in float16 and bfloat16 only",
        ),
        (3, {"head_dim": 264}, "head size is 264, and flash-attn 3 takes multiples of 8 up to 256"),
        (3, {"dtype": torch.float32}, "dtype is float32, and flash-attn 3"),
    ],
)
def test_what_flash_attn_cannot_do_is_named_with_its_limit(
    generation: int, facts: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    assert choose("flash_attn") == "flash_attn"
    with pytest.raises(ValueError, match=f"attention_backend is 'flash_attn', but {match}"):
        choose("flash_attn", **facts)


@pytest.mark.parametrize(
    ("generation", "tokens", "static"), [(1, 64, False), (2, 256, True), (3, 64, True)]
)
def test_blocks_and_capture_follow_the_backend(
    generation: int, tokens: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    platform = fake()
    assert attention.default_block_size("flash_attn", platform) == tokens
    assert (
        attention.default_block_size("sdpa", platform)
        == attention.default_block_size("", platform)
        == attention.default_block_size("", platform, torch.bfloat16)
        == 64
    )
    assert attention.default_block_size("", platform, torch.float8_e4m3fn) == 128
    assert attention.recordable("flash_attn", platform) == (static, static)
    assert attention.recordable("sdpa", platform) == (True, False)
    assert attention.recordable("", platform) == (True, True)


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
        takes, weight = fuse_linear.keywords["takes"], torch.empty(1024, 2048, device="meta")
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


def info(capsys: pytest.CaptureFixture[str], device: str) -> dict[str, str]:
    nanovllm.print_attention_backend_info(device)
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_the_info_on_a_cpu_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = info(capsys, "cpu")
    assert lines["device"].startswith("cpu")
    assert f"torch {torch.__version__}" in lines["installed"]
    assert lines["own"] == "kernels  runs with 'auto': the kernels for cpu"
    assert lines["sdpa"].startswith("can run: torch's own; ")
    for name in ("triton", "flash_attn"):
        assert lines[name] == "not available: needs a GPU, and the device is cpu"


@pytest.mark.parametrize("generation", [0, 1, 2, 3])
def test_the_info_on_a_gpu_says_what_runs_and_how_to_get_the_rest(
    generation: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_flash_attn.install(monkeypatch, generation or 2)
    if not generation:
        fake_flash_attn.remove(monkeypatch)
    monkeypatch.setattr(platforms, "select", lambda device: fake())
    properties = SimpleNamespace(name="Some GPU", total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    lines = info(capsys, "auto")
    assert "Some GPU" in lines["device"] and "24 GiB" in lines["device"]
    assert lines["triton"].startswith(("runs with 'auto'", "not available: pip install triton"))
    assert lines["sdpa"].startswith("can run")
    if generation:
        version = fake_flash_attn.FAKES[generation][2]
        assert lines["flash_attn"].startswith(
            f"can run: flash-attn {version}, interface {generation}"
        )
        assert ("multiple of 256 tokens" in lines["flash_attn"]) == (generation == 2)
    else:
        assert lines["flash_attn"].startswith("not available: flash-attn")
        assert lines["flash_attn"].endswith("; pip install flash-attn --no-build-isolation")
