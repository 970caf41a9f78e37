"""/metrics: names, labels and histograms as Prometheus reads them; the Grafana dashboard."""

from __future__ import annotations

import json
import mmap
import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.api import prometheus
from nanovllm.api.latencies import BETWEEN_TOKENS, FIRST_TOKEN, Latencies
from nanovllm.api.prometheus import render
from nanovllm.engine.metrics import Counter, EngineMetrics, Gauge, Metric
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.scheduler import Scheduler

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def engine_metrics() -> list[Metric]:
    """Those of an engine that has done nothing."""
    cache = KVCacheManager(BlockPool(19, 16))
    scheduler = Scheduler(
        cache, max_num_seqs=1, max_num_batched_tokens=16, max_decode_rows=1, max_prefill_rows=1
    )
    return EngineMetrics(scheduler).read()


def values(text: bytes) -> dict[str, float]:
    """Every sample: name{labels} and its value."""
    return {
        sample.name
        + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_metrics_have_the_names_of_vllm_where_the_meaning_is_the_same() -> None:
    found = values(render(engine_metrics(), [Latencies()]))
    assert {name.partition("{")[0] for name in found if name.startswith("vllm:")} >= {
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
        "vllm:request_success_total", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_time_per_output_token_seconds_bucket",
    }  # fmt: skip
    assert "nanovllm:num_steps_total" in found, "others keep their names"
    assert {f"vllm:request_success_total{{finished_reason={one}}}" for one in ("stop", "abort")} < (
        found.keys()
    )


def test_values_and_labels_are_those_of_the_engine() -> None:
    metrics: list[Metric] = [
        Gauge("nanovllm:num_requests_running", 19),
        Counter("nanovllm:request_success", 3, {"finished_reason": "stop"}),
        Counter("nanovllm:request_success", 1, {"finished_reason": "abort"}),
        Gauge("nanovllm:expert_hit_rate", 0.5),
    ]
    assert values(render(metrics, labels={"model_name": 'a"b\\\n'})) == {
        'vllm:num_requests_running{model_name=a"b\\\n}': 19,
        'vllm:request_success_total{finished_reason=stop}{model_name=a"b\\\n}': 3,
        'vllm:request_success_total{finished_reason=abort}{model_name=a"b\\\n}': 1,
        'nanovllm:expert_hit_rate{model_name=a"b\\\n}': 0.5,
    }


def test_buckets_are_cumulative_and_the_sum_is_exact() -> None:
    latencies = Latencies()
    for seconds in (0.0, 0.001, 0.0011, 3.0, 1e6):
        latencies.observe(FIRST_TOKEN, seconds)
    found = values(render([], [latencies]))
    name = "vllm:time_to_first_token_seconds"
    bucket = name + "_bucket{le=%s}"
    assert [found[bucket % le] for le in ("0.001", "0.0015", "2.5", "5.0", "80.0", "+Inf")] == [
        2, 3, 3, 4, 4, 5,
    ]  # fmt: skip
    assert found[name + "_count"] == 5 and found[name + "_sum"] == pytest.approx(1e6 + 3.0021)
    assert found["vllm:inter_token_latency_seconds_count"] == 0


def test_an_answer_is_measured_from_its_request_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    latencies = Latencies()
    timer = latencies.timer(start=99.0)
    now = 100.5
    timer.tokens(1)
    timer.tokens(0)  # text that was held back: no token
    for num in (1, 3):
        now += 0.6
        timer.tokens(num)
    now += 1
    timer.end()
    latencies.timer().end()  # aborted before its first token
    found = values(render([], [latencies]))
    sums = {name.removesuffix("_sum"): found[name] for name in found if name.endswith("_sum")}
    assert {name: pytest.approx(value) for name, value in sums.items()} == {
        "vllm:time_to_first_token_seconds": 1.5,
        "vllm:inter_token_latency_seconds": 1.2,
        "vllm:request_time_per_output_token_seconds": 0.3,
        "vllm:e2e_request_latency_seconds": 3.7,
    }
    assert found["vllm:inter_token_latency_seconds_count"] == 4
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.2}"] == 3
    assert found["vllm:e2e_request_latency_seconds_count"] == 2


def test_processes_that_share_memory_are_added_up() -> None:
    size = Latencies.SIZE_BYTES
    with mmap.mmap(-1, 3 * size) as shared:
        memory = memoryview(shared)
        parts = [memory[i * size : (i + 1) * size] for i in range(3)]
        writers, readers = [Latencies(part) for part in parts], [Latencies(part) for part in parts]
        for i, writer in enumerate(writers):
            writer.observe(BETWEEN_TOKENS, 0.5, times=i + 1)
        found = values(render([], readers))
        del writer
        for one in (*writers, *readers):
            one._values.release()
        for part in (*parts, memory):
            part.release()
    assert found["vllm:inter_token_latency_seconds_count"] == 6
    assert found["vllm:inter_token_latency_seconds_sum"] == 3
    with pytest.raises(ValueError, match="the memory has 7 bytes: it must be"):
        Latencies(memoryview(bytes(7)))


def test_two_servers_in_a_process_share_nothing() -> None:
    one, other = Latencies(), Latencies()
    one.observe(FIRST_TOKEN, 1.0)
    assert values(render([], [other]))["vllm:time_to_first_token_seconds_count"] == 0
    assert render(engine_metrics(), [other]) == render(engine_metrics(), [other])


def test_the_content_type_is_that_of_prometheus_text() -> None:
    assert prometheus.CONTENT_TYPE.startswith("text/plain; version=")


def test_the_dashboard_shows_metrics_that_exist() -> None:
    found = {name.partition("{")[0] for name in values(render(engine_metrics(), [Latencies()]))}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"\b(?:nano)?vllm:\w+", " ".join(queries)))
    assert shown <= found, "a query of a metric that is not there"
    histograms = {name.removesuffix("_bucket") for name in found if name.endswith("_bucket")}
    parts = {name + end for name in histograms for end in ("_bucket", "_sum", "_count", "_created")}
    assert {name for name in found if name.startswith("vllm:")} - parts <= shown
    assert {f"{name}_bucket" for name in histograms} <= shown, "every metric of vLLM's is shown"
    assert all('model_name="$model_name"' in query for query in queries)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels do not overlap"
