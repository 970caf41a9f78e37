"""The benchmark itself, on the embedded model: what it prints, records and refuses."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import platforms
from nanovllm.cli.bench import offline, throughput
from nanovllm.cli.main import run as run_command
from nanovllm.flags import Parser
from nanovllm.tools import device_limits
from nanovllm.tools.device_limits import DeviceLimits

OPTIONS = "--num-seqs 3 --min-len 4 --max-len 9 --max-model-len 64"
COMMON = f"--model tiny-qwen3 --device cpu --enforce-eager {OPTIONS}".split()


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser()
    throughput.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call main with arguments; returns (stdout, the lines of JSON in it)."""
    monkeypatch.setattr(device_limits, "COPY_BYTES", (1 << 20,))
    monkeypatch.setattr(device_limits, "MATRIX_SIZES", (64,))

    def run(*arguments: str) -> tuple[str, list[dict[str, Any]]]:
        monkeypatch.setattr("sys.argv", ["bench.py", *COMMON, *arguments])
        run_command("bench throughput")
        out = capsys.readouterr().out
        return out, [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    return run


def test_lines_of_json_and_a_table_by_bucket_cap(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    out, found = run(
        "--bs", "1", "2", "--runs", "2", "--run-ahead", "1", "--no-graph", "--out", str(path)
    )
    assert [one["max_num_seqs"] for one in found] == [1, 2]
    for one in found:
        assert len(one["seconds"]) == 2 and one["spread"] >= 0
        assert one["mode"] == "eager" and one["run_ahead"] == 1
        assert one["capture"] is False and one["fuse"] is False
        assert one["versions"]["torch"] == torch.__version__ and "transformers" in one["versions"]
        assert one["command"].startswith("python bench.py --model tiny-qwen3")
        assert one["memory"]["kv_cache_tokens"] == one["max_num_seqs"] * 64
    head, first, second = out.splitlines()[-3:]
    assert head.split()[:2] == ["bs", "tok/s"]
    assert [first.split()[0], second.split()[0]] == ["1", "2"]
    run("--bs", "1", "--out", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == found and len(lines) == 3


def test_without_a_model_it_takes_the_embedded_one_on_a_cpu_and_the_length_that_fits(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--device cpu --enforce-eager --num-seqs 2 --min-len 2 --max-len 5 --bs 2"
    monkeypatch.setattr(f"{__name__}.COMMON", options.split())
    _, (found,) = run()
    assert found["model"] == "tiny-qwen3" and found["prompt_tokens"] < 11
    assert found["memory"]["kv_cache_tokens"] == 2 * 2048, "the model has 2048 positions"


class Accelerator:
    traits = SimpleNamespace(name="gpu")


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        (Accelerator(), [], (None, "Qwen3-0.6B")),
        (Accelerator(), ["--layers", "2"], (None, "Qwen3-0.6B")),
        (None, [], ("tiny-qwen3", None)),
        (None, ["--layers", "2"], (None, "Qwen3-0.6B")),
        (Accelerator(), ["--model", "x"], ("x", None)),
    ],
)
def test_the_model_it_takes_is_named_on_stderr(
    platform: Any,
    arguments: list[str],
    expected: tuple[str | None, str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = parsed(arguments)
    offline.choose_model(args, platform or platforms.select("cpu"))
    assert (args.model, args.random_weights) == expected
    err = capsys.readouterr().err
    assert err == "" if "--model" in arguments else next(filter(None, expected)) in err


def max_model_len(arguments: str) -> int:
    with ExitStack() as stack:
        return offline.make_workload(parsed(arguments.split()), stack).max_model_len


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--random-weights Qwen3-0.6B", 4096),
        ("--random-weights Qwen3-0.6B --latency", 4096),
        ("--random-weights Qwen3-0.6B --stall", 16400),
        ("--random-weights Qwen3-0.6B --min-len 5000 --max-len 5000", 10000),
        ("--model tiny-qwen3", 2048),
        ("--model tiny-qwen3 --max-model-len 2100", 2100),
    ],
)
def test_the_length_of_requests_follows_from_model_and_workload(
    monkeypatch: pytest.MonkeyPatch, arguments: str, expected: int
) -> None:
    assert max_model_len(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-len 1500 --min-len 1500", "up to 3000 tokens.*tiny-qwen3 has 2048 positions"),
        ("--stall", r"up to 16400 tokens.*2048 positions: lower --stall \(16384\)"),
        ("--latency --max-model-len 500", "up to 640 tokens.* --max-model-len is 500"),
    ],
)
def test_a_workload_that_does_not_fit_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        max_model_len(f"--model tiny-qwen3 {arguments}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a config.json: use one, or one of Qwen3-0.6B"), ("{", "json is not JSON"),
     ("[]", "it must be an object"), ('{"vocab_size": 9}', "has None for max_position_embeddings")],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "shape.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        max_model_len(f"--random-weights {tmp_path / 'shape.json'}")


def test_limits_are_measured_before_the_model_takes_the_memory(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def measure_limits(device: Any, dtype: Any, synchronize: Any, free_bytes: int) -> DeviceLimits:
        assert dtype is torch.bfloat16 and free_bytes > 0
        events.append("limits")
        return DeviceLimits(1.0, 1.0)

    def load(*_: Any) -> None:
        events.append("load")
        raise ValueError("seen enough")

    monkeypatch.setattr(offline, "measure_limits", measure_limits)
    monkeypatch.setattr(offline, "load", load)
    with pytest.raises(ValueError, match="seen enough"):
        run("--dtype", "bfloat16")
    assert events == ["limits", "load"]


def test_filters_are_recorded_and_wrong_ones_refused(run: Any) -> None:
    _, (found,) = run("--bs", "2", "--top-k", "20", "--top-p", "0.95")
    assert found["sampling"] == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    with pytest.raises(ValueError, match="top_p"):
        run("--bs", "2", "--top-p", "2")


def test_an_fp8_cache_is_recorded_and_its_limit_is_that_of_its_bytes(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "measure_limits", lambda *_: DeviceLimits(1e9, 1e15))
    _, (plain,) = run("--bs", "2")
    _, (fp8,) = run("--bs", "2", "--kv-cache-dtype", "fp8")
    assert (plain["kv_cache_dtype"], fp8["kv_cache_dtype"]) == ("float32", "float8_e4m3fn")
    assert fp8["limit_tokens_per_second"] > plain["limit_tokens_per_second"]


def test_the_experts_of_a_step_are_recorded_for_models_that_have_some(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (dense,) = run("--bs", "2")
    assert "experts_per_step" not in dense
    monkeypatch.setattr(f"{__name__}.COMMON", [word.replace("qwen3", "mixtral") for word in COMMON])
    _, (sparse,) = run("--bs", "3", "--first", "2")
    found = sparse["experts_per_step"]
    assert found["rows"] == sparse["num_seqs"] == 2 and found["expected"] == 3.5
    assert 2 <= found["measured"] <= 4


def test_traffic_of_offloaded_experts_is_recorded_with_the_limit_of_the_bus(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.COMMON", [word.replace("qwen3", "mixtral") for word in COMMON])
    _, (plain,) = run("--bs", "3")
    out, (found,) = run("--bs", "3", "--expert-offload", "3", "--expert-prefetch")
    experts = found["experts"]
    assert plain["experts"] is None
    assert experts["needed"] == experts["resident"] + experts["fetched"] + experts["in_place"]
    moved = sum(experts[name] for name in ("fetched", "in_place", "streamed", "ahead"))
    assert moved > 0 and experts["moved_bytes"] % moved == 0
    limit = found["output_tokens"] / experts["bus_seconds"]
    assert experts["bus_limit_tokens_per_second"] == pytest.approx(limit, rel=0.01)
    assert f"{experts['hit_rate']:.1%} of experts were resident" in out
    assert found["memory"]["host_gib"] > 0
    with pytest.raises(ValueError, match="expert_offload is '3GB', which holds all"):
        run("--bs", "3", "--expert-offload", "3GB")


def test_gaps_between_tokens_while_a_long_prompt_arrives(run: Any) -> None:
    options = "--stall-rows 3 --max-model-len 512 --max-num-batched-tokens 128 --max-stall-ms 0.001"
    _, (found,) = run("--stall", "300", *options.split())
    (one,) = found["runs"]
    for phase in ("before", "during", "after"):
        assert 0 < one[phase]["median"] <= one[phase]["p99"] <= one[phase]["worst"]
    assert found["worst_ms"] == one["during"]["worst"] < one["first_token_ms"]
    assert found["max_stall_ms"] == 0.001 and list(found["prefill_ms"]) == ["32", "128"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "somewhere"], "--profile needs a CUDA device"),
        (["--run-ahead", "2"], "run_ahead is 2: it must be 0 or 1"),
        (["--stall", "--latency"], "--stall is a separate measurement"),
        (["--runs", "0"], "must be at least 1"),
        (["--max-len", "3"], "--max-len at least --min-len"),
        (["--data-parallel-size", "2"], "=2 is not supported: this measures one engine"),
        (["--layers", "2"], "--layers needs --random-weights"),
        (["--first", "4"], "--first is 4: it must be 1 to --num-seqs (3)"),
    ],
)
def test_what_cannot_be_done_is_refused(run: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(*arguments)


def test_the_first_line_names_the_workload(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "INFO")
    monkeypatch.setattr("nanovllm.cli.watch.LINE_SECONDS", 0.0005)
    out, (found,) = run("--bs", "2", "--runs", "2")
    what = f"{found['prompt_tokens']} tokens in and {found['output_tokens']} out"
    assert out.startswith(f"tiny-qwen3: 3 prompts, {what}, at most 2 at a time, 2 times\n")
    quiet, _ = run("--bs", "2", "--quiet")
    assert quiet.startswith("tiny-qwen3 bs 2: ")


def test_the_tokens_so_far_are_shown_while_it_generates(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Any] = []

    class Watch:
        def __init__(self, name: str, unit: str, total: int, count: Any) -> None:
            watched.append((total, count))

        def __enter__(self) -> None:
            watched.append(watched[0][1]())

        def __exit__(self, *_: object) -> None:
            watched.append(watched[0][1]())

    monkeypatch.setattr(offline, "Watch", Watch)
    _, (found,) = run("--bs", "2", "--runs", "2")
    total = 2 * found["output_tokens"]
    assert watched[0][0] == total and watched[1:] == [0, total]
