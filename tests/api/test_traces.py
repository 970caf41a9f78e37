"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import gzip
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from nanovllm.api.config import ServerConfig
from nanovllm.api.start import serve
from nanovllm.api.traces import MAX_WAITING, Traces
from nanovllm.config import EngineConfig
from nanovllm.serving import supervisor
from scripts.bench.mock_engine import MockOptions
from tests.api.mock_api_server import TEMPLATE, served
from tests.api.security_cases import USER
from tests.api.test_http_fuzz import connect, request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Request:
    request_id: str = "r-19"
    start: float = 0.0
    status: int = 200
    num_prompt_tokens: int = 19
    num_tokens: int = 99
    first_token: float | None = 0.25


class Collector:
    """Keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                got = ExportTraceServiceRequest.FromString(body)
                for resource in got.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.end()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_span_has_the_counts_and_times_of_its_request(collector: Collector) -> None:
    traces = Traces(collector.url, "tiny-qwen3")
    start = time.perf_counter() - 2
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": "Bearer secret"}
    traces.add(Request(start=start), "/v1/completions", headers)
    traces.close()
    (span,) = collector.spans
    assert span.name == "llm_request"
    assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT
    assert attributes(span) == {
        "gen_ai.request.id": "r-19",
        "gen_ai.request.model": "tiny-qwen3",
        "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.output_tokens": 99,
        "gen_ai.latency.time_to_first_token": 0.25,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    took = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 2 <= took <= time.perf_counter() - start
    (event,) = span.events
    assert event.time_unix_nano - span.start_time_unix_nano == 250_000_000


@pytest.mark.parametrize("name", ["opentelemetry", "opentelemetry.sdk"])
def test_missing_packages_are_told_before_an_engine_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(service: Any) -> Any:
        raise AssertionError("the engine starts")

    monkeypatch.setattr(supervisor, "Supervisor", start)
    for loaded in [one for one in sys.modules if one.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    config = ServerConfig(port=0, otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
    words = r"otlp_traces_endpoint needs opentelemetry.sdk, .*pip install .*\[traces\]"
    with pytest.raises(ValueError, match=words):
        serve(EngineConfig("tiny-qwen3"), config)


def test_errors_of_the_server_are_marked_and_others_are_not(collector: Collector) -> None:
    traces = Traces(collector.url, "tiny-qwen3")
    for status in (400, 503):
        traces.add(Request(status=status, first_token=None), "/v1/completions", {})
    traces.add(Request(), "/v1/completions", {"traceparent": "00-zz-\x00"})
    traces.close()
    assert [span.status.code for span in collector.spans] == [0, 2, 0]
    assert not collector.spans[0].events and not collector.spans[2].parent_span_id
    assert len({span.trace_id for span in collector.spans}) == 3


@contextmanager
def silent_collector(answer: bytes) -> Iterator[str]:
    """The URL of a collector that sends this, byte by byte, and never completes an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        has_ended = threading.Event()

        def drip(sock: socket.socket) -> None:
            with suppress(OSError):
                sock.sendall(answer)
                while answer and not has_ended.wait(0.2):
                    sock.sendall(b"x")

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock = stack.enter_context(listener.accept()[0])
                    threading.Thread(target=drip, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
        has_ended.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "answer",
    [None, b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    ids=["gone", "silent", "dripping"],
)
def test_a_collector_that_does_not_answer_delays_the_end_by_seconds_at_most(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.api.traces.CLOSE_S", 0.2)
    gone = nullcontext("http://127.0.0.1:9/v1/traces")
    with gone if answer is None else silent_collector(answer) as url:
        traces = Traces(url, "tiny-qwen3")
        for _ in range(3000):
            traces.add(Request(), "/v1/completions", {})
        queue = traces._provider._active_span_processor._span_processors[0]._batch_processor._queue  # type: ignore[attr-defined]
        assert len(queue) <= MAX_WAITING
        start = time.monotonic()
        traces.close()
        # the library would block for half a minute
        assert time.monotonic() - start < 20


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is added to the traces of a server in this process."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Traces, "add", lambda _, *given: found.append(given))
    return found


def test_only_requests_that_an_endpoint_takes_leave_spans(
    collector: Collector, added: list[tuple[Any, ...]]
) -> None:
    """Others would push them out of the queue, and bring paths that anybody makes up."""
    with served(otlp_traces_endpoint=collector.url, api_key=["a-key"]) as server:
        key = {"authorization": "Bearer a-key"}
        for path, headers in (
            ("/v1/completions", {}), ("/v1/completions", {**key, "host": "evil.example"}),
            ("/made/up", key), ("/v1/models", key), ("/health", key),
        ):  # fmt: skip
            assert server.http.post(path, json={}, headers=headers).status_code >= 400
        assert not added
        assert server.http.post("/v1/completions", json={}, headers=key).status_code == 400
        assert [route for _, route, _ in added] == ["/v1/completions"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_is_no_error_of_the_server(
    added: list[tuple[Any, ...]], path: str, is_stream: bool
) -> None:
    body: dict[str, Any] = {"max_tokens": 999, "stream": is_stream}
    body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": USER}
    url = "http://127.0.0.1:9/v1/traces"
    with served(MockOptions(tokens_per_s=20), TEMPLATE, otlp_traces_endpoint=url) as server:
        with connect(server) as sock:
            sock.sendall(request(body).replace(b"/v1/completions", path.encode()))
            while not server.engine.streams:
                time.sleep(0.001)
            if is_stream:
                sock.recv(1)
        while not added:
            time.sleep(0.001)
    assert [given[0].status for given in added] == [200 if is_stream else 499]


def test_an_abort_by_the_server_is_an_error(added: list[tuple[Any, ...]]) -> None:
    url = "http://127.0.0.1:9/v1/traces"
    with served(MockOptions(tokens_per_s=20), otlp_traces_endpoint=url) as server:
        with connect(server) as sock:
            sock.sendall(request({"prompt": "a", "max_tokens": 999}))
            while not server.engine.streams:
                time.sleep(0.001)
            for stream in list(server.engine.streams.values()):
                stream.abort()
            assert b" 503 " in sock.recv(1 << 16)
        while not added:
            time.sleep(0.001)
    assert [given[0].status for given in added] == [503]


@pytest.mark.parametrize(
    "parent", ["", "x" * 20_000, f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-01" + "-" * 20_000,
               "ff" * 99, f"00-{'0' * 32}-{PARENT}-01", "\xff\xfe", "00-" * 9_000],
    ids=range(8),
)  # fmt: skip
def test_a_malformed_traceparent_names_no_span(collector: Collector, parent: str) -> None:
    with served(otlp_traces_endpoint=collector.url) as server:
        headers = {"traceparent": parent.encode("latin-1"), "x-request-id": "x" * 64}
        body = {"prompt": "a", "max_tokens": 1}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    (span,) = collector.spans
    assert not span.parent_span_id and span.trace_id.hex() != TRACE
    assert attributes(span)["gen_ai.request.id"] == "x" * 64 and len(str(span)) < 2000
