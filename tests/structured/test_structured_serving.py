"""Structured output through an engine in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.interface import EngineDead

CODE = "[0-9]{3}-[a-f]{2}"


def trials() -> set[str]:
    """The ids of the processes that try grammars."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"nanovllm.structured.trial" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            pass  # it has ended
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_an_engine_that_is_killed_leaves_no_compiler_behind() -> None:
    before = trials()

    async def text(llm: AsyncLLM, given: dict[str, Any]) -> str:
        params = SamplingParams(max_tokens=12, seed=1, structured_outputs=given)  # type: ignore[arg-type]
        stream = await llm.open("What is 2 + 3?", params)
        return "".join([one.text async for one in stream])

    async def work() -> None:
        llm = AsyncLLM(
            "tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=64
        )
        async with llm:
            assert re.fullmatch(CODE, await text(llm, {"regex": CODE}))
            with pytest.raises(ValueError, match=r"structured_outputs.json: .* 'not' at #"):
                await text(llm, {"json": {"not": {}}})
            with pytest.raises(ValueError, match="at most 262144 are allowed"):
                await text(llm, {"regex": "a" * 300_000})
            assert trials() - before
            os.kill(llm._process.pid, signal.SIGKILL)
            with pytest.raises(EngineDead):
                await text(llm, {"choice": ["a"]})

    asyncio.run(work())
    deadline = time.monotonic() + 20
    while trials() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not trials() - before
