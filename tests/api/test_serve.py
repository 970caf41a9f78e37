"""`nanovllm.api.serve` with the embedded model and two API processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanovllm import LLM, SamplingParams

MODEL = "tiny-qwen3"
OPTIONS = {"device": "cpu", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
PROGRAM = f"""
import sys
from nanovllm.api import ServerConfig, serve
from nanovllm.config import EngineConfig
server = ServerConfig(port=0, api_processes=2, drain_timeout=100)
sys.exit(serve(EngineConfig({MODEL!r}, **{OPTIONS}), server))
"""
PROMPT = "Once upon a time"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


class Server:
    """The server's processes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "NANOVLLM_LOG_LEVEL": "INFO"},
        )  # fmt: skip
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"is served at (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.lines))

    def pids(self) -> list[int]:
        """Of all its processes."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
        return [self.process.pid, *(pid for pid, above in pairs if above == self.process.pid)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.process.kill()
    one.process.communicate()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as one:
        yield one


def test_a_server_answers_as_llm_does(client: openai.OpenAI) -> None:
    llm = LLM(MODEL, **OPTIONS)
    params = SamplingParams(temperature=0, max_tokens=19, logprobs=2, ignore_eos=True)
    (wanted,) = llm.generate(PROMPT, params, use_tqdm=False)
    chat = llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)[0]
    llm.close()
    asked: Any = {"model": MODEL, "temperature": 0, "max_tokens": 19}
    extra = {"return_token_ids": True, "ignore_eos": True}
    done = client.completions.create(prompt=PROMPT, logprobs=2, extra_body=extra, **asked)
    choice = done.choices[0]
    assert (choice.model_extra or {})["token_ids"] == wanted.outputs[0].token_ids
    assert choice.text == wanted.outputs[0].text and choice.logprobs is not None
    values = [float(top[one]) for one, top in zip(wanted.outputs[0].token_ids, wanted.logprobs)]
    assert choice.logprobs.token_logprobs == pytest.approx(values, abs=1e-5)
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], stream=True, extra_body=extra, **asked
    )
    text = "".join(one.choices[0].delta.content or "" for one in stream)
    assert text == chat.outputs[0].text


def test_an_answer_has_the_form_of_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(3):
        done = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], response_format=form,
            seed=seed, max_tokens=200,
        )  # fmt: skip
        if done.choices[0].finish_reason == "stop":
            found = json.loads(done.choices[0].message.content or "")
            assert found.keys() == {"a"} and isinstance(found["a"], int)


def test_a_form_that_cannot_be_is_refused_with_its_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="look-around") as caught:
        client.completions.create(
            model=MODEL, prompt=PROMPT, extra_body={"guided_regex": "(((a+)+)+)+$(?=x)"}
        )
    assert caught.value.param == "guided_regex"


def test_nothing_of_http_delays_the_start_of_the_engine() -> None:
    """The supervisor starts the engine's process first, so its own imports are waited for."""
    slow = {"uvicorn", "starlette", "prometheus_client", "numpy", "asyncio", "tqdm", "torch"}
    code = f"import sys, nanovllm.api.start; print({slow!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_both_processes_answer_and_count_together(server: Server) -> None:
    async def ask(number: int) -> int:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            body = {"prompt": [number], "max_tokens": 5, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body)
            return int(answer.json()["usage"]["completion_tokens"])

    async def work() -> list[int]:
        return await asyncio.gather(*[ask(number) for number in range(24)])

    def count() -> float:
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        return float(re.findall(r"e2e_request_latency_seconds_count\S* (\S+)", text)[0])

    before = count()
    assert asyncio.run(work()) == [5] * 24
    assert count() == before + 24, "the latencies of both are added up"


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(
    server: Server, client: openai.OpenAI
) -> None:
    """The last test of the file."""
    pids = server.pids()
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    parts = [next(iter(stream))]
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    parts += list(stream)
    assert parts[-1].choices[0].finish_reason == "length"
    server.process.communicate(timeout=100)
    assert server.process.returncode == 0
    assert len(pids) >= 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
