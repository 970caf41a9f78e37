"""`nanovllm bench serve` against a server whose times and counts are known."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.cli.bench import against_server, requests, results, serve
from nanovllm.cli.bench.client import RequestRecord
from nanovllm.cli.bench.workload import draw_requests
from nanovllm.cli.main import run
from nanovllm.flags import Parser
from tests.cli.mock_server import Mock, serving


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the benchmark; returns (exit status, the saved numbers, stdout, stderr)."""

    def bench(mock: Mock, words: str) -> tuple[int, dict[str, Any], str, str]:
        path = tmp_path / "found.json"
        common = ["--base-url", mock.url, "--disable-tqdm", "--result-filename", str(path)]
        status = run("bench serve", [*common, "--save-detailed", *words.split()])
        shown = capsys.readouterr()
        assert isinstance(status, int)
        return status, json.loads(path.read_text()), shown.out, shown.err

    return bench


def test_times_and_counts_are_those_of_the_server(bench: Any) -> None:
    with serving(ttft=0.2, itl=0.03, tokens_per_event=2) as mock:
        words = "--num-prompts 19 --random-input-len 33 --random-output-len 21 --num-clients 2"
        status, found, out, _ = bench(mock, f"{words} --metric-percentiles 50,99.9")
    assert status == 0
    assert (found["completed"], found["failed"], found["model_id"]) == (19, 0, "mock")
    assert found["total_input_tokens"] == 19 * 33 and found["total_output_tokens"] == 19 * 21
    sent = [1e3 * np.array(times) for times in mock.times[1:]]  # without the warm-up
    assert [len(times) for times in sent] == [1 + 11] * 19, "21 tokens are 11 events"
    seen = {
        "ttft": [times[1] - times[0] for times in sent],
        "itl": np.concatenate([np.diff(times[1:]) for times in sent]),
        "tpot": [(times[-1] - times[1]) / 20 for times in sent],
        "e2el": [times[-1] - times[0] for times in sent],
    }
    for name, values in seen.items():
        # of the client: later by what the connection and a busy machine take
        slack = 3 if name in ("itl", "tpot") else 30
        difference = found[f"median_{name}_ms"] - np.median(values)
        assert -slack / 3 < difference < slack, name
        assert found[f"p50_{name}_ms"] == pytest.approx(found[f"median_{name}_ms"])
        assert found[f"median_{name}_ms"] <= found[f"p99.9_{name}_ms"]
    assert 0.5 <= found["duration"] < 2.0
    assert found["output_throughput"] == pytest.approx(19 * 21 / found["duration"])
    assert [len(gaps) for gaps in found["itls"]] == [10] * 19
    assert mock.most_at_once == 19, "an infinite rate sends all at once"
    assert found["max_concurrent_requests"] == 19
    assert found["max_output_tokens_per_s"] == pytest.approx(19 * 21), "all within a second"
    for line in (
        "============ Serving Benchmark Result ============",
        "Successful requests:                     19        ",
        "Total input tokens:                      627       ",
        "Total generated tokens:                  399       ",
        "---------------Time to First Token----------------",
        "-----Time per Output Token (excl. 1st token)------",
        "---------------Inter-token Latency----------------",
        "----------------End-to-end Latency----------------",
        "=" * 50,
    ):
        assert line in out.splitlines()
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        for word in ("Mean", "Median", "P50", "P99.9"):
            assert re.search(rf"^{word} {name} \(ms\): +\d+\.\d\d +$", out, re.MULTILINE)


def test_numbers_follow_from_the_records() -> None:
    parser = Parser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--metric-percentiles", "25,99.9"])
    common = {"num_prompt": 7, "error": None}
    records = [
        {**common, "start": 10.0, "end": 12.5, "times": [0.5, 1.0, 2.0], "num_output": 6},
        {**common, "start": 11.0, "end": 12.0, "times": [1.0], "num_output": 1},
        {**common, "start": 10.5, "end": 14.0, "times": [0.1], "num_output": 0, "error": "x"},
    ]
    found = results.summary(args, "m", records)
    assert (found["completed"], found["failed"], found["duration"]) == (2, 1, 4.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (14, 7)
    assert found["request_throughput"] == 0.5 and found["output_throughput"] == 7 / 4
    assert found["total_token_throughput"] == 21 / 4
    assert found["max_concurrent_requests"] == 3
    # pieces at 10.5, 11.0, 12.0 with two tokens each, and at 12.0 with one
    assert found["max_output_tokens_per_s"] == 4
    # a tenth of the seven tokens is there at 10.5, nine tenths at 12.0, five tokens later
    assert found["steady_output_throughput"] == pytest.approx(5 / 1.5)
    for name, values in {
        "ttft": [500, 1000],
        "tpot": [300],
        "itl": [500, 1000],
        "e2el": [2000, 1000],
    }.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(sum(values) / len(values))
        assert found[f"std_{name}_ms"] == pytest.approx((max(values) - min(values)) / 2)
        quarter = min(values) + (max(values) - min(values)) / 4
        assert found[f"p25_{name}_ms"] == pytest.approx(quarter), name
    assert results.errors(records) == ["1 requests: x"]


def test_requests_are_what_was_asked_for(bench: Any) -> None:
    words = "--num-prompts 3 --random-input-len 5 --random-output-len 2 --vocab-size 7 --ignore-eos"
    extra = '--temperature 0.5 --top-k 3 --extra-body {"n":1} --model other --num-warmups 0'
    with serving() as mock:
        bench(mock, f"{words} {extra} --num-clients 1")
    assert len(mock.bodies) == 3 and len({tuple(one["prompt"]) for one in mock.bodies}) == 3
    for body in mock.bodies:
        prompt = body.pop("prompt")
        assert len(prompt) == 5 and all(0 <= token < 7 for token in prompt)
        assert body == {
            "model": "other", "max_tokens": 2, "temperature": 0.5, "top_k": 3, "n": 1,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip


def test_the_offline_workload_is_the_same_online(bench: Any) -> None:
    with serving() as mock:
        words = "--dataset-name nanovllm --num-prompts 9 --min-len 3 --max-len 19 --num-clients 1"
        _, found, _, _ = bench(mock, words)
    prompts, output_lens = draw_requests(9, (3, 19), 151936)
    measured = mock.bodies[1:]  # after the request that warms up
    # all at once, so in any order
    asked = sorted((one["prompt"], one["max_tokens"]) for one in measured)
    assert asked == sorted(zip(prompts, output_lens))
    assert found["output_lens"] == output_lens and found["input_lens"] == list(map(len, prompts))
    assert all(one["ignore_eos"] and one["temperature"] == 0.6 for one in measured)


def test_a_rate_spreads_requests_and_a_limit_holds_them_back(bench: Any) -> None:
    with serving(ttft=0.05) as mock:
        words = "--num-prompts 21 --random-input-len 3 --random-output-len 1 --request-rate 40"
        _, found, out, _ = bench(mock, words)
        assert 0.5 <= found["duration"] < 2.0 and mock.most_at_once < 15
        assert "Request rate configured (RPS):           40.00" in out
        mock.most_at_once = 0
        words = "--num-prompts 9 --random-input-len 3 --random-output-len 1 --max-concurrency 3"
        _, found, out, _ = bench(mock, f"{words} --num-clients 2 --metadata a=b c=d=e")
    assert (found["a"], found["c"]) == ("b", "d=e")
    assert (
        mock.most_at_once == found["max_concurrent_requests"] == 3
        and 0.15 <= found["duration"] < 2.0
    )
    assert "Maximum request concurrency:             3 " in out


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"error_every": 5}, "requests: the server returned 400: not this one"),
        ({"broken_every": 5}, "requests: the server closed the connection before the end"),
    ],
)
def test_errors_are_counted_and_shown_and_the_others_measured(
    behaviour: dict[str, Any], message: str, bench: Any
) -> None:
    with serving(**behaviour) as mock:
        words = "--num-prompts 21 --random-input-len 3 --random-output-len 6 --num-warmups 0"
        status, found, out, err = bench(mock, words)
    assert status == 1 and (found["completed"], found["failed"]) == (17, 4)
    assert found["total_output_tokens"] == 17 * 6
    assert f"4 {message}" in err and "Failed requests:                         4 " in out
    assert sum(map(bool, found["errors"])) == 4


def test_a_server_that_dies_half_way_is_reported(bench: Any) -> None:
    with serving(itl=0.001, dies_after=100) as mock:
        words = "--num-prompts 30 --random-input-len 3 --random-output-len 9 --max-concurrency 4"
        status, found, _, err = bench(mock, f"{words} --num-clients 2")
    assert status == 1 and 5 < found["completed"] < 12
    assert found["completed"] + found["failed"] == 30
    assert "closed the connection before the end" in err and "refused" in err


def test_without_usage_or_tokens_a_request_has_failed() -> None:
    assert [requests.send_times(3, float("inf"), 1.0, 0)] == [[0.0] * 3]
    record = RequestRecord()
    record.on_event(b'{"choices":[{"text":"a"}]}')
    assert len(record.times) == 1 and record.num_output == 0


@pytest.mark.parametrize("space", [b"", b" "])
def test_only_events_with_content_are_pieces(space: bytes) -> None:
    record = RequestRecord()
    for event, num in (
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', 0),
        (b'{"choices":[{"delta":{"role":"assistant","content":"a"}}]}', 1),
        (b'{"choices":[{"delta":{"content":""},"finish_reason":null}]}', 2),
        (b'{"choices":[{"text":"error","finish_reason":null}]}', 3),
        (b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', 3),
        (b'{"choices":[{"text":"","finish_reason":"length"}]}', 4),
        (b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}', 4),
    ):
        record.on_event(event.replace(b":", b":" + space))
        assert len(record.times) == num, event
    assert (record.num_prompt, record.num_output, record.error) == (5, 7, None)
    record.on_event(b'{"error":{"message":"the engine has died"}}')
    assert "the engine has died" in (record.error or "")


def test_times_of_requests_have_the_rate_and_the_seed() -> None:
    times = requests.send_times(1000, 20.0, 1.0, 3)
    assert times == sorted(times) == requests.send_times(1000, 20.0, 1.0, 3)
    assert times[0] == 0 and times[-1] == pytest.approx(999 / 20)
    even = requests.send_times(100, 20.0, 1e6, 3)
    assert all(b - a == pytest.approx(0.05, rel=0.02) for a, b in pairwise(even))
    assert requests.send_times(1, 20.0, 1.0, 0) == [0.0]


def test_conversations_are_text_of_the_tokenizer(bench: Any) -> None:
    words = "--backend openai-chat --tokenizer tiny-qwen3 --num-prompts 3 --random-input-len 9"
    with serving(ttft=0.1) as mock:
        status, found, _, _ = bench(mock, f"{words} --random-output-len 4 --num-clients 1")
    assert status == 0 and found["median_ttft_ms"] > 100, "the role alone is no first token"
    for body in mock.bodies:
        (message,) = body["messages"]
        assert message["role"] == "user" and message["content"] and "prompt" not in body


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-prompts 0", "--num-prompts is 0: it must be at least 1"),
        ("--request-rate 0", "--request-rate must be above 0"),
        ("--percentile-metrics ttft,x", "--percentile-metrics has 'x': use ttft, tpot, itl, e2el"),
        ("--metric-percentiles 101", "--metric-percentiles has 101.0"),
        ("--random-range-ratio 1", "--random-range-ratio must be in"),
        ("--metadata a", "--metadata has 'a': it must be KEY=VALUE"),
        ("--extra-body [1]", r"--extra-body is \[1\]: it must be a JSON object"),
        ("--min-len 5 --max-len 4", "--max-len is 4: it must be at least --min-len"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(words: str, message: str) -> None:
    with serving() as mock, pytest.raises(ValueError, match=message):
        run("bench serve", ["--base-url", mock.url, *words.split()])
    assert mock.num_connections == 0


def test_no_server_is_one_error() -> None:
    with pytest.raises(OSError, match=r"no server at http://127\.0\.0\.1:9: "):
        run("bench serve", ["--port", "9"])


def test_a_refused_request_ends_it_before_the_clock_starts() -> None:
    with serving(error_every=1) as mock, pytest.raises(ValueError, match="400: not this one"):
        run("bench serve", ["--base-url", mock.url, "--num-prompts", "3"])
    assert len(mock.bodies) == 1


def test_a_limit_is_shared_out_among_clients() -> None:
    assert against_server._shares(7, 3) == [3, 2, 2]
    assert against_server._shares(None, 2) == [None, None]
