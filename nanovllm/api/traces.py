"""Traces of requests for OpenTelemetry: a span for each, sent to a collector by OTLP over HTTP.

The names of attributes are those of OpenTelemetry's conventions for generative AI and HTTP, and
vLLM's for the time to the first token. Spans have counts and times, and no texts: what a request
can put into one is its id, of at most 64 letters, digits, "-" and "_".
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from nanovllm import extras

PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
MAX_WAITING = 2048  # spans; more are dropped while the collector does not answer
CLOSE_S = 3.0
SERVER_ERROR = 500


def check_installed() -> None:
    """Raises ValueError if a package of the extra is missing. Imports none of them."""
    for name in PACKAGES:
        try:
            is_there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # not even the package above it
            is_there = False
        if not is_there:
            raise ValueError(
                f"otlp_traces_endpoint needs {name}, which is not installed: "
                f"{extras.install('traces')}"
            )


class Finished(Protocol):
    """The facts of a request for its span. start: by `time.perf_counter()`. first_token: in
    seconds after it."""

    request_id: str
    start: float
    status: int
    num_prompt_tokens: int
    num_tokens: int
    first_token: float | None


class Traces:
    """Makes spans of requests that have ended, and sends them from a thread of its own.

    endpoint: the URL that takes traces, such as http://127.0.0.1:4318/v1/traces.
    Raises ValueError if the packages of the extra are missing.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        check_installed()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # not the global provider: each server in a process has its own
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "nanovllm"}), shutdown_on_exit=False
        )
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=MAX_WAITING)
        )
        self._tracer = self._provider.get_tracer("nanovllm")
        self._model = model

    def add(self, request: Finished, route: str, headers: Mapping[str, str]) -> None:
        """A request has ended now. route: the path of its endpoint. The header traceparent names
        the span that it belongs to."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        start = end - round((time.perf_counter() - request.start) * 1e9)
        span = self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            start_time=start,
            attributes={
                "gen_ai.request.id": request.request_id,
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": request.num_prompt_tokens,
                "gen_ai.usage.output_tokens": request.num_tokens,
                "http.route": route,
                "http.response.status_code": request.status,
            },
        )
        if request.first_token is not None:
            span.set_attribute("gen_ai.latency.time_to_first_token", request.first_token)
            span.add_event("first token", timestamp=start + round(request.first_token * 1e9))
        if request.status >= SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send the waiting spans, for at most three seconds."""
        # a collector that does not answer would hold the library for half a minute
        closing = threading.Thread(target=self._flush, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()  # from now on, what is sent is dropped

    def _flush(self) -> None:
        self._provider.force_flush()
        self._provider.shutdown()
