"""Which attention an engine gets, why, and what the info page says about it.

The choice follows from the option, the device, the installed packages and the model. Tests in the
second half check that engines run the attention that they chose, in eager mode and in graphs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nanovllm
from nanovllm import LLM, SamplingParams, platforms
from nanovllm.cli import main as cli
from nanovllm.platforms import attention
from nanovllm.platforms.base import Platform
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.platforms.mps import MpsPlatform
from nanovllm.platforms.npu import NpuPlatform
from tests.engines import Generate, random_prompts, tokens
from tests.kernels import fake_flash_attn

CLASSES = {"cpu": CpuPlatform, "cuda": CudaPlatform, "mps": MpsPlatform, "npu": NpuPlatform}


def fake(name: str = "cuda") -> Platform:
    """A platform without its device."""
    platform = object.__new__(CLASSES[name])
    traits = sys.modules[CLASSES[name].__module__].TRAITS
    platform.device, platform.traits = torch.device("cuda", 0), traits
    return platform


OWN = attention.Attention()
H200 = "NVIDIA H200"


def flash(generation: int) -> attention.Attention:
    return attention.Attention.all_by(f"flash_attn_{generation}")


def choose(option: str, device: str = "cuda", **facts: Any) -> attention.Attention:
    needs: dict[str, Any] = {
        "dtype": torch.float16,
        "head_dim": 128,
        "block_size": None,
        "windows": (0, 0),
        **facts,
    }
    return attention.choose(option, fake(device), attention.AttentionNeeds(**needs))


@pytest.fixture(autouse=True)
def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    name_gpu(monkeypatch, "Some GPU")


def name_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


def test_auto_is_the_device_s_own_kernels_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for generation in (2, 3):
        fake_flash_attn.install(monkeypatch, generation)
        for device in ("cuda", "cpu", "mps", "npu"):
            assert choose("auto", device) == OWN
    fake_flash_attn.install(monkeypatch, 2)
    name_gpu(monkeypatch, H200)
    assert choose("auto") == choose("triton") == OWN
    assert choose("sdpa") == choose("sdpa", "cpu") == attention.Attention.all_by("sdpa")


def test_auto_takes_what_was_measured_to_be_faster_for_prefill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name_gpu(monkeypatch, H200)
    assert choose("auto") == OWN
    fake_flash_attn.install_wheel(monkeypatch)
    facts: dict[str, Any] = {"dtype": torch.bfloat16}
    chosen = choose("auto", **facts)
    keys = [chosen.key(*sizes) for sizes in ((1, 1), (1, 8192), (2048, 2048), (4096, 4096))]
    assert keys == ["", "", "", "flash_attn_3"]
    assert chosen.describe() == (
        "decode: the device's own kernels; prefill steps of 4096 tokens and more: "
        "flash-attn 3 (fa3-fwd 0.0.3)"
    )
    assert attention.default_block_size(chosen, fake(), 128) == 128
    assert choose("auto", block_size=256, **facts) == chosen
    for unsupported in (
        {"dtype": torch.float16},
        {"block_size": 64},
        {"head_dim": 64},  # not measured
        {"windows": (0, 4096)},
        {"cache_dtype": torch.float8_e4m3fn},
    ):
        assert choose("auto", **{**facts, **unsupported}) == OWN
    assert choose("triton", **facts) == OWN


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_flash_attn_is_refused_for_sinks(generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    assert choose("flash_attn") == flash(generation)
    message = f"the model's attention has sinks, and flash-attn {generation} has none"
    with pytest.raises(ValueError, match=message):
        choose("flash_attn", has_sinks=True)
    assert choose("auto", has_sinks=True) == OWN


def test_interface_4_runs_sinks_and_windows_that_fa3_fwd_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_flash_attn.install_wheel(monkeypatch)
    fake_flash_attn.add(monkeypatch, 4)
    facts: dict[str, Any] = {"dtype": torch.bfloat16}
    assert choose("flash_attn", **facts) == flash(3)
    assert choose("flash_attn", has_sinks=True, **facts) == flash(4)
    assert choose("flash_attn", windows=(0, 128), **facts) == flash(4)


def test_an_npu_refuses_other_backends() -> None:
    with pytest.raises(
        ValueError, match=r"attention_backend 'sdpa' is not for the device npu: use 'auto'$"
    ):
        choose("sdpa", "npu")


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_a_cpu_refuses_a_gpu_s_backend(make_llm: Callable[..., LLM], name: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"attention_backend '{name}' is not for the device cpu: use 'auto' or 'sdpa'$",
    ):
        make_llm(attention_backend=name, device="cpu")


@pytest.mark.parametrize(
    ("capability", "package", "command"),
    [
        ((7, 5), "flash-attn is not installed", "pip install 'flash-attn<2' --no-build-isolation"),
        ((8, 6), "flash-attn is not installed", "pip install flash-attn --no-build-isolation"),
        (
            (9, 0),
            "flash-attn-3 is not installed; fa3-fwd is not installed; flash-attn is not installed; "
            "flash-attn-4 is not installed",
            "pip install fa3-fwd",
        ),
        (
            (10, 0),
            "flash-attn-4 is not installed; flash-attn is not installed",
            "pip install --pre flash-attn-4",
        ),
    ],
)
def test_a_missing_flash_attn_is_an_error_with_the_command(
    capability: tuple[int, int], package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if nothing is installed; `None` in sys.modules would raise a different error
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
            "a layer has a window of 4096 tokens, and flash-attn 1 has no windows",
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
        (
            4,
            {"head_dim": 192},
            "head size is 192, and flash-attn 4 takes multiples of 8 up to 128, and 256",
        ),
    ],
)
def test_what_flash_attn_cannot_do_is_named_with_its_limit(
    generation: int, facts: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    assert choose("flash_attn") == flash(generation)
    with pytest.raises(ValueError, match=f"attention_backend is 'flash_attn', but {match}"):
        choose("flash_attn", **facts)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"dtype": torch.float16}, "dtype is float16, and fa3-fwd 0.0.3 was built without it"),
        (
            {"windows": (0, 4096)},
            "a layer has a window of 4096 tokens, and fa3-fwd 0.0.3 was built without them",
        ),
        (
            {"block_size": 64},
            r"kvcache_block_size is 64, and flash-attn 3 takes multiples of 128 \(heads of 128, ",
        ),
    ],
)
def test_what_a_build_leaves_out_is_named(
    facts: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install_wheel(monkeypatch)
    assert choose("flash_attn", dtype=torch.bfloat16) == flash(3)
    with pytest.raises(ValueError, match=f"attention_backend is 'flash_attn', but {match}"):
        choose("flash_attn", **{"dtype": torch.bfloat16, **facts})


def test_an_older_interface_runs_what_the_newest_one_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_flash_attn.install_wheel(monkeypatch)
    fake_flash_attn.add(monkeypatch, 2)
    assert choose("flash_attn", dtype=torch.bfloat16) == flash(3)
    assert choose("flash_attn", dtype=torch.float16) == flash(2)


@pytest.mark.parametrize(
    ("generation", "tokens", "static"),
    [(1, 64, False), (2, 256, True), (3, 64, True), (4, 128, True)],
)
def test_blocks_and_capture_follow_the_backend(
    generation: int, tokens: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_flash_attn.install(monkeypatch, generation)
    platform, sdpa = fake(), attention.Attention.all_by("sdpa")
    assert attention.default_block_size(flash(generation), platform, 128) == tokens
    assert (
        attention.default_block_size(sdpa, platform, 128)
        == attention.default_block_size(OWN, platform, 128)
        == attention.default_block_size(OWN, platform, 128, torch.bfloat16)
        == 64
    )
    assert attention.default_block_size(OWN, platform, 128, torch.float8_e4m3fn) == 128
    assert attention.recordable(flash(generation)) == (static, static)
    assert attention.recordable(sdpa) == (True, False)
    assert attention.recordable(OWN) == (True, True)


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


@pytest.mark.parametrize("generation", [0, 1, 2, 3, 4])
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
            f"can run: {'flash-attn' + {3: '-3', 4: '-4'}.get(generation, '')} {version}, "
            f"interface {generation}"
        )
        assert ("multiple of 256 tokens" in lines["flash_attn"]) == (generation == 2)
    else:
        assert lines["flash_attn"].startswith("not available: flash-attn")
        assert lines["flash_attn"].endswith("; pip install flash-attn --no-build-isolation")


# An engine's attention ----------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([1, 19, 99], seed=5)
GRAPHS: dict[str, Any] = {"enforce_eager": False, "graph_batch_sizes": (1, 4), "max_num_seqs": 4}


@pytest.fixture(scope="module")
def expected(hf_generate: Generate) -> list[list[int]]:
    return [hf_generate(prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def test_the_log_and_the_info_name_the_package_of_decode_and_of_prefill(
    make_llm: Callable[..., LLM],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_flash_attn.install_wheel(monkeypatch)
    chosen = attention.Attention(prefill="flash_attn_3", prefill_from=4096)
    monkeypatch.setattr(attention, "choose", lambda *facts: chosen)
    text = (
        "decode: the device's own kernels; prefill steps of 4096 tokens and more: "
        "flash-attn 3 (fa3-fwd 0.0.3)"
    )
    caplog.set_level(logging.INFO)
    make_llm(device="cpu")
    assert f"attention: {text}" in caplog.text
    cli.main(["info", "tiny-qwen3", "--device", "cpu"])
    assert f"attention_backend       {text}  (auto)" in capsys.readouterr().out


def test_two_engines_each_with_its_own_attention(
    make_llm: Callable[..., LLM], expected: list[list[int]]
) -> None:
    torch_s, own = make_llm(attention_backend="sdpa"), make_llm()
    assert tokens(torch_s, PROMPTS, GREEDY) == tokens(own, PROMPTS, GREEDY) == expected
    chosen = [llm.engine.runner.spec.attention for llm in (torch_s, own)]
    assert chosen == [attention.Attention.all_by("sdpa"), OWN]


def test_graphs_hold_the_attention_that_was_asked_for_and_stores_keep_them_apart(
    make_llm: Callable[..., LLM], expected: list[list[int]], tmp_path: Path, lowered_ops: set[str]
) -> None:
    options = {**GRAPHS, "compile_cache": tmp_path}
    assert tokens(make_llm(**options), PROMPTS, GREEDY) == expected
    assert {name for name in lowered_ops if "attention" in name} == {"paged_attention"}
    for fuse in (True, False):
        lowered_ops.clear()
        assert (
            tokens(make_llm(**options, attention_backend="sdpa", fuse=fuse), PROMPTS, GREEDY)
            == expected
        )
        assert {name for name in lowered_ops if "attention" in name} == {"paged_attention_sdpa"}


def test_prefill_steps_that_ask_the_host_are_not_captured(
    make_llm: Callable[..., LLM], captured: list[object]
) -> None:
    layout = make_llm(**GRAPHS, attention_backend="sdpa").engine.runner.layout
    assert len(captured) == len(layout.decode_rows)


def test_a_stored_program_is_not_taken_for_another_attention(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    options = {**GRAPHS, "compile_cache": tmp_path}

    def num_compiled(**more: Any) -> int:
        llm = make_llm(**options, **more)
        return llm.engine.runner.compiler.num_compiled

    first = num_compiled()
    assert first > 0 and num_compiled() == 0
    assert (
        num_compiled(attention_backend="sdpa") > 0 and num_compiled(attention_backend="sdpa") == 0
    )


@pytest.mark.parametrize("name", ["fa2", "", None, "Triton", 2])
def test_an_unknown_backend_is_refused(make_llm: Callable[..., LLM], name: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"attention_backend is .*: it must be one of auto, triton, flash_attn, sdpa",
    ):
        make_llm(attention_backend=name, device="cpu")
