"""`nanovllm bench serve` against a server whose times and counts are known."""

from __future__ import annotations

import asyncio
import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.cli import http
from nanovllm.cli.bench import against_server, client, requests, results, serve
from nanovllm.cli.bench.client import RequestRecord
from nanovllm.cli.bench.workload import draw_requests
from nanovllm.cli.main import run
from nanovllm.flags import Parser
from tests.cli.mock_server import WAIT_S, Mock, serving

ROUNDING_S = 1e-5  # of the sums of times that are kept in microseconds
TIMER_S = 2e-3  # timers of event loops count in milliseconds


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


def arguments(words: str) -> Any:
    parser = Parser()
    serve.add_arguments(parser)
    return parser.parse_args(words.split())


def prompts_of(words: str) -> list[tuple[int, ...]]:
    """The prompts of a benchmark, in their order."""
    return [tuple(one["prompt"]) for one in requests.bodies(arguments(words), "mock")]


class Clock:
    """A client's clock. The mock moves it on, once the client has looked at it."""

    def __init__(self) -> None:
        self.now, self.seen = 64.0, set[float]()

    def monotonic(self) -> float:
        self.seen.add(self.now)
        return self.now

    async def sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.now not in self.seen and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        self.now += seconds


def test_a_client_notes_when_a_request_began_and_when_each_delta_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(client, "monotonic", clock.monotonic)

    async def send(url: str) -> list[RequestRecord]:
        one = http.HttpClient(url)
        bodies = [
            {"prompt": [1, 2, 3], "max_tokens": num, "stream_options": {"include_usage": True}}
            for num in (5, 1, 4)
        ]
        asked = [(0.0, one.request("/v1/completions", body)) for body in bodies]
        found = await client.send_all(one, asked, 1, clock.now)
        one.close()
        return found

    with serving(ttft=1 / 4, itl=1 / 32, tokens_per_event=2, sleep=clock.sleep) as mock:
        records = [record.as_dict() for record in http.run(send(mock.url))]
    common = {"num_prompt": 3, "error": None}
    assert records == [
        {
            "start": 64.0,
            "end": 64.3125,
            "times": [0.25, 0.28125, 0.3125],
            "num_output": 5,
            **common,
        },
        {"start": 64.3125, "end": 64.5625, "times": [0.25], "num_output": 1, **common},
        {"start": 64.5625, "end": 64.84375, "times": [0.25, 0.28125], "num_output": 4, **common},
    ]


def test_times_and_counts_are_those_of_the_server(bench: Any) -> None:
    begun = time.monotonic()
    with serving(ttft=0.2, itl=0.03, tokens_per_event=2, gathers=19) as mock:
        words = "--num-prompts 19 --random-input-len 33 --random-output-len 21 --num-warmups 0"
        status, found, out, _ = bench(mock, f"{words} --num-clients 2 --metric-percentiles 50,99.9")
    elapsed = time.monotonic() - begun
    assert status == 0
    assert (found["completed"], found["failed"], found["model_id"]) == (19, 0, "mock")
    assert found["total_input_tokens"] == 19 * 33 and found["total_output_tokens"] == 19 * 21
    sent = {
        tuple(body["prompt"]): np.array(times)
        for body, times in zip(mock.bodies, mock.times, strict=True)
    }
    assert [len(times) for times in sent.values()] == [1 + 11] * 19, "21 tokens are 11 events"
    assert [len(gaps) for gaps in found["itls"]] == [10] * 19
    seen = [np.cumsum([ttft, *gaps]) for ttft, gaps in zip(found["ttfts"], found["itls"])]
    for prompt, times in zip(prompts_of(words), seen, strict=True):
        # the client has begun before, and received after
        least = sent[prompt][1:] - sent[prompt][0]
        assert np.all(times > least - ROUNDING_S) and times[0] > 0.19
    for name, values in {
        "ttft": found["ttfts"],
        "itl": np.concatenate(found["itls"]),
        "tpot": [(times[-1] - times[0]) / 20 for times in seen],
        "e2el": [times[-1] for times in seen],
    }.items():
        # rounded to microseconds
        assert found[f"median_{name}_ms"] == pytest.approx(1e3 * np.median(values), abs=0.02)
        assert found[f"p50_{name}_ms"] == pytest.approx(found[f"median_{name}_ms"])
        assert found[f"median_{name}_ms"] <= found[f"p99.9_{name}_ms"] < 1e3 * elapsed
    first, last = min(map(min, sent.values())), max(map(max, sent.values()))
    assert last - first <= found["duration"] < elapsed
    assert found["output_throughput"] == pytest.approx(19 * 21 / found["duration"])
    assert mock.most_at_once == 19, "an infinite rate sends all at once"
    assert found["max_concurrent_requests"] == 19
    # all tokens came in so many seconds, so the best one is not below their mean
    seconds = int(found["duration"]) + 1
    most = found["max_output_tokens_per_s"]
    assert 19 * 21 / seconds <= most + 1e-6 and most <= 19 * 21 + 1e-6
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
    args = arguments("--metric-percentiles 25,99.9")
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


def test_a_rate_spreads_requests(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request comes before its time after the start that clients are told."""
    starts, run_client = [], against_server._Client.run

    def noted(self: Any, start: float, bar: Any) -> Any:
        starts.append(start)
        return run_client(self, start, bar)

    monkeypatch.setattr(against_server._Client, "run", noted)
    words = "--num-prompts 21 --random-input-len 3 --random-output-len 1 --request-rate 40"
    with serving(ttft=0.05) as mock:
        status, _, out, _ = bench(mock, f"{words} --num-clients 2 --num-warmups 0")
    assert status == 0 and "Request rate configured (RPS):           40.00" in out
    assert len(starts) == 2 and len(set(starts)) == 1
    came = {tuple(body["prompt"]): times[0] for body, times in zip(mock.bodies, mock.times)}
    planned = requests.send_times(21, 40.0, 1.0, 0)
    for prompt, at in zip(prompts_of(words), planned, strict=True):
        assert came[prompt] >= starts[0] + at - TIMER_S


def test_a_limit_holds_requests_back(bench: Any) -> None:
    with serving(ttft=0.05, gathers=3) as mock:
        words = "--num-prompts 9 --random-input-len 3 --random-output-len 1 --max-concurrency 3"
        common = "--num-clients 2 --num-warmups 0 --metadata a=b c=d=e"
        _, found, out, _ = bench(mock, f"{words} {common}")
    assert (found["a"], found["c"]) == ("b", "d=e")
    assert mock.most_at_once == found["max_concurrent_requests"] == 3
    assert found["duration"] >= 0.15, "three times three answers of 0.05 s"
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
        (b'{"choices":[{"delta":{"role":"assistant","reasoning":"a"}}]}', 5),
        (b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}', 5),
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
