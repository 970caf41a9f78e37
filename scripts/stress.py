"""Sends mixed concurrent requests to `nanovllm serve` and compares the answers with idle ones.

# each embedded model, with 1 and 2 API processes, without and with two API keys
python scripts/stress.py
# one server, more answers, with options of `nanovllm serve`
python scripts/stress.py --variants tiny-qwen3:1:2 --answers 5000 -- --max-num-seqs 8

A variant is MODEL:API_PROCESSES:KEYS. First every request is sent alone to the idle server, not
streamed and with a unique cache salt. Then many connections send the requests concurrently,
streamed or not, with other priorities and cache salts. Some clients disconnect in the middle of an
answer, and some close their sending side early. Requests have temperature 0 or a seed, so an answer
must equal the idle one: texts, calls, reasons, counts, and log-probabilities within
LOGPROB_TOLERANCE. (Batches of other sizes sum in another order, so an answer may differ at a near
tie of two tokens; the report shows such answers.) At the end nothing may run, all cache blocks must
be free, and no process may be left after SIGTERM.

It prints a line of JSON for each variant. The exit status is 1 if an answer differs or anything is
left. Requests go over loopback only. Each variant has a time limit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.tools import command_line
from scripts.bench.server_process import Limit, Server
from scripts.stress_answers import differs, joined, parts_of
from scripts.stress_requests import CHAT_TEMPLATE, RequestMaker

VARIANTS = ("tiny-qwen3:1:0", "tiny-qwen3:2:2", "tiny-qwen3-vl:1:2", "tiny-qwen3-vl:2:0")
KEYS = ("first-key", "second-key")
MAX_SHOWN = 5  # differences of a variant
QUIET_SECONDS = 30.0  # for the server to become idle after the last answer

Json = dict[str, Any]


class Sent(NamedTuple):
    """A request. number: of its idle answer."""

    number: int
    path: str
    body: Json


class Client:
    """Sends requests to a server. keys: the valid API keys."""

    def __init__(self, url: str, keys: tuple[str, ...], seconds: float) -> None:
        self._address, self._keys, self._seconds = urlsplit(url), keys, seconds

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Host": self._address.netloc}
        if self._keys:
            headers["Authorization"] = f"Bearer {random.choice(self._keys)}"
        return headers

    def ask(
        self, sent: Sent, *, leaves_after: int | None = None, halves: bool = False
    ) -> list[Json]:
        """The answer. leaves_after: disconnect after this many bytes of it instead, and return
        nothing. halves: close the sending side once the request is sent. Raises ValueError for an
        error."""
        assert self._address.hostname is not None
        connection = http.client.HTTPConnection(
            self._address.hostname, self._address.port, timeout=self._seconds
        )
        try:
            connection.request("POST", sent.path, json.dumps(sent.body), self._headers())
            if halves:
                connection.sock.shutdown(socket.SHUT_WR)
            if leaves_after is not None:
                connection.sock.recv(leaves_after) if leaves_after else None
                return []
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {data[:300]!r}")
        if not sent.body.get("stream"):
            return parts_of(sent.path, json.loads(data))
        lines = (line for line in data.split(b"\n") if line.startswith(b"data: {"))
        return joined(sent.path, [json.loads(line[6:]) for line in lines])

    def gauges(self) -> dict[str, float]:
        """The values of /metrics that have no further labels."""
        assert self._address.hostname is not None
        connection = http.client.HTTPConnection(self._address.hostname, self._address.port)
        connection.request("GET", "/metrics", headers=self._headers())
        text = connection.getresponse().read().decode()
        connection.close()
        found = re.findall(r"^\w+:(\w+)\{model_name=[^,}]*\} (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def left(self) -> dict[str, float]:
        """The gauges of running and waiting requests and used blocks, once all are 0 or after a
        timeout."""
        end = time.monotonic() + QUIET_SECONDS
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while True:
            gauges = self.gauges()
            left = {name: gauges[name] for name in names if gauges[name]}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)


class Load:
    """Sends requests at random and compares their answers with the idle ones."""

    def __init__(self, client: Client, requests: list[Sent], quiet: list[list[Json]]) -> None:
        self._client, self._requests, self._quiet = client, requests, quiet
        self.counts: Counter[str] = Counter()
        self.shown: list[Json] = []

    def send(self, seed: int) -> None:
        chance = random.Random(seed)
        request = chance.choice(self._requests)
        body = dict(request.body)
        if request.path != "/v1/responses":
            body["cache_salt"] = chance.choice(["a", "b", "c"])
            body["priority"] = chance.randint(-2, 2)
        # the log-probabilities of a prompt are not streamed
        if chance.random() < 0.5 and not ("echo" in body and "logprobs" in body):
            body["stream"] = True
            if request.path != "/v1/responses":
                body["stream_options"] = {"include_usage": True}
        sent = request._replace(body=body)
        try:
            if chance.random() < 0.12:
                self._client.ask(sent, leaves_after=chance.choice([0, 1, 300]))
                self.counts["gone_away"] += 1
                return
            found = self._client.ask(sent, halves=chance.random() < 0.1)
        except (ValueError, OSError, http.client.HTTPException) as error:
            self._show("failed", sent, repr(error))
            return
        self.counts["compared"] += 1
        quiet = self._quiet[request.number]
        if differs(found, quiet):
            self._show("different", sent, {"found": found, "quiet": quiet})

    def _show(self, kind: str, sent: Sent, what: Any) -> None:
        self.counts[kind] += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append({"kind": kind, "path": sent.path, "body": sent.body, "what": what})


def memory(pids: list[int]) -> dict[int, int]:
    """The resident MiB of running processes."""
    found = {}
    for pid in pids:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        found[pid] = pages * os.sysconf("SC_PAGE_SIZE") >> 20
    return found


def run_variant(variant: str, args: argparse.Namespace, log: Path) -> Json:
    """Start the server of a variant, load it, end it. Returns the line of the report."""
    model, processes, num_keys = variant.split(":")
    keys, limit = KEYS[: int(num_keys)], Limit(args.timeout)
    words = [model, "--api-processes", processes, "--no-access-log", *args.options]
    words += ["--api-key", *keys] if keys else []
    words += [] if (sees := "vl" in model) else ["--chat-template", CHAT_TEMPLATE]
    server = Server(words, dict(os.environ), log)
    try:
        server.wait(limit)
        client = Client(server.url, keys, args.timeout)
        maker = RequestMaker(random.Random(args.seed), sees=sees)
        requests = [Sent(number, *maker.request(number)) for number in range(args.requests)]
        quiet = []
        for sent in requests:
            salt = {} if sent.path == "/v1/responses" else {"cache_salt": "quiet"}
            quiet.append(client.ask(sent._replace(body=sent.body | salt)))
            limit.left()
        load, before, begun = Load(client, requests, quiet), memory(server.pids()), time.monotonic()
        with ThreadPoolExecutor(args.connections) as pool:
            list(pool.map(load.send, range(args.seed, args.seed + args.answers)))
        seconds, left, after = time.monotonic() - begun, client.left(), memory(server.pids())
        gauges = client.gauges()
        end = server.end(server.process.pid, signal.SIGTERM)
    finally:
        server.close()
    grown = {pid: [before.get(pid, 0), mib] for pid, mib in after.items()}
    return {
        "variant": variant, **load.counts, "seconds": round(seconds, 1), "left": left,
        "tokens": gauges["generation_tokens_total"], "preemptions": gauges["num_preemptions_total"],
        "MiB before and after": grown, "end": end, "shown": load.shown,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--requests", type=int, default=150, help="that differ (default: 150)")
    parser.add_argument("--answers", type=int, default=1500, help="of a variant (default: 1500)")
    parser.add_argument("--connections", type=int, default=24, help="at once (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a variant")
    parser.add_argument("options", nargs="*", help="after --, of nanovllm serve")
    args = parser.parse_args()
    log, is_bad = Path(tempfile.mkdtemp()) / "server.log", False
    print(f"the servers' log is {log}", file=sys.stderr)
    for variant in args.variants:
        report = run_variant(variant, args, log)
        is_bad |= bool(report.get("different") or report.get("failed") or report["left"])
        is_bad |= bool(report["end"]["exit_status"] or report["end"]["processes_left"])
        print(json.dumps(report), flush=True)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
