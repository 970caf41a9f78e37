"""Measures a running server: requests and tokens per second, and latencies.

    nanovllm bench serve --port 8000 --dataset-name nanovllm
    nanovllm bench serve --num-prompts 1000 --random-input-len 128 --random-output-len 128 \\
        --request-rate 20 --ignore-eos

Options and results have the names of `vllm bench serve`. Prompts are token ids; answers are
streamed. Token counts come from the server's usage. Times are those of text deltas: the first one
(TTFT), the gaps between them (ITL), the last one (E2EL), and TPOT, the time after the first delta
divided by the number of tokens after the first. Several processes share the requests.
"""

from __future__ import annotations

import argparse
import math

from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser, json_value

USAGE = "[--base-url URL | --host HOST --port PORT] [options]"
DATASETS = ("random", "nanovllm")


def add_arguments(parser: Parser) -> None:
    _add_server(parser.add_argument_group("the server"))
    _add_workload(parser.add_argument_group("the workload"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_results(parser.add_argument_group("results"))
    add = parser.add_argument
    clients = "processes that send requests; default: half the cores, at most 6"
    add("--num-clients", type=int, metavar="N", help=clients)
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_quiet(parser)


def main(args: argparse.Namespace) -> int:
    """Exit status 1: some requests failed. Raises ValueError for invalid options, and OSError if
    there is no server."""
    from nanovllm.cli.bench import against_server

    return against_server.measure(args)


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", metavar="URL", help="such as http://127.0.0.1:8000")
    add("--host", default="127.0.0.1", help="default: %(default)s")
    add("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    chat = "openai-chat: send conversations to /v1/chat/completions"
    add("--backend", choices=("openai", "vllm", "openai-chat"), default="openai", help=chat)
    add("--endpoint", metavar="PATH", help="default: /v1/completions")
    add("--api-key", metavar="KEY", help="default: the variable OPENAI_API_KEY")
    add("--model", help="the model's name in requests; default: the first of /v1/models")
    add("--served-model-name", help="the same as --model")
    seconds = "wait this long for the server to respond (default: %(default)s)"
    add("--ready-check-timeout-sec", type=float, default=0.0, metavar="X", help=seconds)


def _add_workload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    dataset = "nanovllm: the workload of nanovllm bench throughput (default: %(default)s)"
    add("--dataset-name", choices=DATASETS, default="random", help=dataset)
    add("--num-prompts", type=int, metavar="N", help="default: 1000; for nanovllm: 256")
    shown = "default: %(default)s"
    add("--random-input-len", "--input-len", type=int, default=1024, metavar="N", help=shown)
    add("--random-output-len", "--output-len", type=int, default=128, metavar="N", help=shown)
    ratio = "lengths are drawn from LEN · (1 − X) to LEN · (1 + X) (default: %(default)s)"
    add("--random-range-ratio", type=float, default=0.0, metavar="X", help=ratio)
    lengths = "prompts and answers of nanovllm (default: %(default)s)"
    add("--min-len", type=int, default=100, metavar="N", help=f"shortest {lengths}")
    add("--max-len", type=int, default=1024, metavar="N", help=f"longest {lengths}")
    vocab = "token ids are below this; default: that of --tokenizer or --model if it is local"
    add("--vocab-size", type=int, metavar="N", help=vocab)
    add("--tokenizer", metavar="MODEL", help="for text prompts; default: --model")
    add("--random-text", action="store_true", help="send prompts as text instead of token ids")
    add("--seed", type=int, default=0, metavar="N", help=shown)
    rate = "requests per second; inf sends all at once (default: %(default)s)"
    add("--request-rate", type=float, default=math.inf, metavar="X", help=rate)
    burst = "1: a Poisson process; less: bursts; more: evenly spread (default: %(default)s)"
    add("--burstiness", type=float, default=1.0, metavar="X", help=burst)
    most = "the maximum number of concurrent requests, shared equally by the client processes"
    add("--max-concurrency", type=int, metavar="N", help=most)
    warmups = "short requests before the clock starts (default: %(default)s)"
    add("--num-warmups", type=int, default=1, metavar="N", help=warmups)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    ignore = "answers have the requested length (default: no; for nanovllm: yes)"
    add("--ignore-eos", action=argparse.BooleanOptionalAction, help=ignore)
    temperature = "default: 0; for nanovllm: 0.6"
    add("--temperature", type=float, metavar="X", help=temperature)
    for name, kind in (("--top-p", float), ("--top-k", int), ("--min-p", float)):
        add(name, type=kind, metavar="X" if kind is float else "N")
    extra = "more fields for every request"
    add("--extra-body", type=json_value, default={}, metavar="JSON", help=extra)


def _add_results(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    metrics = "some of ttft, tpot, itl, e2el (default: all)"
    add("--percentile-metrics", metavar="LIST", help=metrics)
    percentiles = "such as 50,90,99 (default: %(default)s)"
    add("--metric-percentiles", default="99", metavar="LIST", help=percentiles)
    add("--save-result", action="store_true", help="write the results as JSON")
    detailed = "also write the lengths, times and errors of each request"
    add("--save-detailed", action="store_true", help=detailed)
    add("--result-dir", metavar="DIR", help="where to write them; default: the current folder")
    add("--result-filename", metavar="FILE", help="default: built from rate, model and time")
    add("--label", help="stored with the results")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="stored with the results")
