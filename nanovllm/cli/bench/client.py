"""A process that sends its share of a benchmark's requests and records when deltas arrive.

It reads its work from stdin as a line of JSON, writes "ready", reads the start time, writes "done"
after each response, and finally writes its records as a line of JSON. All times are from
`time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from nanovllm import open_files, programs
from nanovllm.cli import http

# substrings of events that contain more than text
TELLING = tuple(
    text.replace(b":", colon)
    for text in (b'"choices":[]', b'"error"', b'"role":', b'"usage":{', b'"finish_reason":"')
    for colon in (b":", b": ")
)
CONTENT = ("content", "reasoning", "reasoning_content", "tool_calls")


class RequestRecord:
    """One request. Times are in seconds; those of deltas are after `start`.

    num_prompt, num_output: token counts from the server's usage. error: None on success.
    """

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.times: list[float] = []
        self.num_prompt = self.num_output = 0
        self.error: str | None = None

    def on_event(self, data: bytes) -> None:
        """Record a delta. Most events have only text and are not parsed."""
        now = monotonic()
        for text in TELLING:
            if text in data:
                self._read(json.loads(data), now)
                return
        self.times.append(now)

    def _read(self, event: Mapping[str, Any], now: float) -> None:
        if event.get("error"):
            self.error = str(event["error"])
        if usage := event.get("usage"):
            self.num_prompt = usage.get("prompt_tokens", 0)
            self.num_output = usage.get("completion_tokens", 0)
        for choice in event.get("choices", ()):
            if choice.get("finish_reason") in ("error", "abort"):
                self.error = f"the answer ended with finish_reason {choice['finish_reason']!r}"
            # chat has events with only the role, or only the finish reason
            if "delta" not in choice or any(choice["delta"].get(name) for name in CONTENT):
                self.times.append(now)

    async def send(self, client: http.HttpClient, request: bytes) -> None:
        self.start = monotonic()
        try:
            answer = (await client.send(request, self.on_event)).checked()
            if answer.body:  # not a stream
                self._read(json.loads(answer.body), monotonic())
        except (OSError, ValueError) as error:
            self.error = str(error) or type(error).__name__
        self.end = monotonic()
        if self.error is None and not (self.times and self.num_output):
            self.error = "the server sent no tokens" if not self.times else "no usage was sent"

    def as_dict(self) -> dict[str, Any]:
        times = [round(time - self.start, 6) for time in self.times]
        return {
            "start": self.start, "end": self.end, "times": times, "num_prompt": self.num_prompt,
            "num_output": self.num_output, "error": self.error,
        }  # fmt: skip


async def send_all(
    client: http.HttpClient,
    requests: Sequence[tuple[float, bytes]],
    limit: int | None,
    start: float,
) -> list[RequestRecord]:
    """Send each request at its time after `start`, at most `limit` concurrently."""
    slots = asyncio.Semaphore(limit or len(requests))

    async def one(request: bytes) -> RequestRecord:
        async with slots:
            record = RequestRecord()
            await record.send(client, request)
        print("done", flush=True)
        return record

    tasks = []
    for at, request in requests:
        if (left := start + at - monotonic()) > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.create_task(one(request)))
    return await asyncio.gather(*tasks)


async def main() -> None:
    programs.begin()
    work = json.loads(sys.stdin.readline())
    client = http.HttpClient(work["url"], work["api_key"])
    requests = [(one["at"], client.request(work["path"], one["body"])) for one in work["requests"]]
    open_files.allow(len(requests) + 64)
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    gc.freeze()
    gc.disable()  # a garbage collection would distort the measurement
    records = await send_all(client, requests, work["limit"], start)
    client.close()
    print(json.dumps([record.as_dict() for record in records]), flush=True)


if __name__ == "__main__":
    try:
        http.run(main())
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
