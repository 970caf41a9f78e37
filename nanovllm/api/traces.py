"""OpenTelemetry traces: a span for each request, sent to a collector by OTLP over HTTP.

Attributes are named after OpenTelemetry's conventions for generative AI and HTTP, and vLLM's for
the time to first token. Spans have counts and times, but no texts: a request controls only its id,
which has at most 64 letters, digits, "-" and "_".
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from nanovllm import extras

PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
MAX_WAITING = 2048  # spans; more are dropped if the collector does not respond
CLOSE_S = 3.0
SERVER_ERROR = 500


def check_installed() -> None:
    """Raises ValueError if a package of the extra is missing. Imports nothing."""
    for name in PACKAGES:
        try:
            is_there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the parent package is missing
            is_there = False
        if not is_there:
            raise ValueError(
                f"otlp_traces_endpoint needs {name}, which is not installed: "
                f"{extras.install('traces')}"
            )


class Finished(Protocol):
    """A request's data for its span. start: by `time.perf_counter()`. first_token: seconds after
    start."""

    request_id: str
    start: float
    status: int
    num_prompt_tokens: int
    num_tokens: int
    first_token: float | None


class Traces:
    """Makes a span for each finished request, and sends them from a separate thread.

    endpoint: the collector's URL, such as http://127.0.0.1:4318/v1/traces.
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
        """Add the span of a request that ends now. route: the path of its endpoint. headers:
        traceparent names the parent span."""
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
        """Send the remaining spans, for at most three seconds."""
        # if the collector does not respond, the library would block for half a minute
        closing = threading.Thread(target=self._flush, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()  # drops further spans

    def _flush(self) -> None:
        self._provider.force_flush()
        self._provider.shutdown()
