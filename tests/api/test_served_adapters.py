"""Adapters of a server: names of models, the list, and requests that load and unload them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.api import adapters, start
from nanovllm.api.address import bind, url_of
from nanovllm.api.config import ServerConfig
from nanovllm.api.server import Stop, run
from nanovllm.api.service import Service
from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import CONFIG
from nanovllm.serving.client import Client
from tests.engines import make_llm as make_llm
from tests.models import lora_cases
from tests.serving.served import serve

PROMPT, NUM = [9, 10, 11, 12], 8
BASE = {"prompt": PROMPT, "max_tokens": NUM, "temperature": 0, "ignore_eos": True}
LORA: dict[str, Any] = {
    "enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("french", "german")):
        lora_cases.save_adapter(root / name, checkpoint, seed=seed)
    lora_cases.save_adapter(root / "dora", checkpoint, use_dora=True)
    return root


@pytest.fixture(scope="module")
def llm(make_llm: Any) -> Iterator[LLM]:
    one = make_llm(**LORA)
    yield one
    one.close()


@pytest.fixture(scope="module")
def expected(llm: LLM, folder: Path) -> dict[str, list[int]]:
    """The answers with each adapter, by `LLM`."""
    params = SamplingParams(temperature=0, max_tokens=NUM, ignore_eos=True)
    found = {}
    for number, name in enumerate(("base", "french", "german")):
        one = LoRARequest(name, 900 + number, str(folder / name)) if number else None
        (answer,) = llm.generate([PROMPT], params, use_tqdm=False, lora_request=one)
        found[name] = answer["token_ids"]
        if one is not None:
            assert llm.llm_engine.remove_lora(one.lora_int_id)
    assert len(set(map(tuple, found.values()))) == 3
    return found


async def served(work: Any, options: dict[str, Any], client: Client) -> Any:
    await client.ready()
    config = ServerConfig(port=0, served_model_name=["base"], **options)
    wish, has_started = asyncio.Event(), asyncio.Event()
    with bind(config) as sock:
        service = Service(client, config)
        await adapters.load_configured(service)
        stop = Stop(wish.wait())
        serving = asyncio.create_task(run(service, client, sock, stop, has_started.set))
        await has_started.wait()
        try:
            async with httpx.AsyncClient(base_url=url_of(config, sock), timeout=60) as http:
                return await work(http)
        finally:
            wish.set()
            assert await serving == 0


async def tokens(http: httpx.AsyncClient, model: str) -> list[int]:
    body = {**BASE, "model": model, "return_token_ids": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert answer["model"] == model
    return answer["choices"][0]["token_ids"]


def test_a_model_is_an_adapter_that_was_configured_or_loaded(
    llm: LLM, folder: Path, expected: dict[str, list[int]]
) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        assert await tokens(http, "base") == expected["base"]
        assert await tokens(http, "french") == expected["french"]
        missing = await http.post("/v1/completions", json={**BASE, "model": "german"})
        assert missing.status_code == 404
        asked = {"lora_name": "german", "lora_path": "german"}
        assert (await http.post("/v1/load_lora_adapter", json=asked)).status_code == 200
        cards = (await http.get("/v1/models")).json()["data"]
        parents = {card["id"]: card["parent"] for card in cards}
        assert parents == {"base": None, "french": "base", "german": "base"}
        assert (await http.get("/v1/models/german")).json()["parent"] == "base"
        names = ("german", "base", "french", "german")
        answers = await asyncio.gather(*(tokens(http, name) for name in names))
        assert answers == [expected[name] for name in names]
        again = await http.post("/v1/load_lora_adapter", json=asked)
        assert again.status_code == 400 and "already" in again.json()["error"]["message"]
        for _ in range(2):
            gone = await http.post("/v1/unload_lora_adapter", json={"lora_name": "german"})
        assert gone.status_code == 404
        missing = await http.post("/v1/completions", json={**BASE, "model": "german"})
        assert missing.status_code == 404

    options = {"lora_modules": [f"french={folder / 'french'}"], "allowed_lora_path": folder}
    serve(llm.engine, partial(served, work, options))


def test_folders_elsewhere_and_adapters_that_do_not_work_are_refused(
    llm: LLM, folder: Path, checkpoint: Path
) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        for path in ("..", "/etc", str(checkpoint), "missing", "french/adapter_config.json", "\0"):
            body = {"lora_name": "x", "lora_path": path}
            answer = await http.post("/v1/load_lora_adapter", json=body)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == "lora_path"
            assert error["message"] == "lora_path is not a folder below allowed_lora_path"
        body = {"lora_name": "x", "lora_path": "dora"}
        answer = await http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 400
        assert "use_dora is True: DoRA is not supported" in answer.json()["error"]["message"]
        assert len((await http.get("/v1/models")).json()["data"]) == 1

    serve(llm.engine, partial(served, work, {"allowed_lora_path": folder}))


def test_a_client_takes_adapters(llm: LLM, folder: Path, expected: dict[str, list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM, ignore_eos=True)
    french, dora = (LoRARequest(name, 70 + i, str(folder / name)) for i, name in
                    enumerate(("french", "dora")))  # fmt: skip

    async def work(client: Client) -> None:
        assert await client.add_lora(french)
        async for output in client.generate(PROMPT, params, lora_request=french):
            last = output
        assert last.outputs[0].token_ids == expected["french"]
        with pytest.raises(ValueError, match="adapter 'dora': use_dora is True"):
            await client.add_lora(dora)
        with pytest.raises(ValueError, match="lora_request is 5: it must be a LoRARequest"):
            await client.open(PROMPT, params, lora_request=5)  # type: ignore[arg-type]
        assert await client.remove_lora(70) and not await client.remove_lora(70)

    serve(llm.engine, work)


def test_loading_is_off_by_default(llm: LLM) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        body = {"lora_name": "x", "lora_path": "x"}
        for path in ("load", "unload"):
            answer = await http.post(f"/v1/{path}_lora_adapter", json=body)
            assert answer.status_code == 403
            assert "needs the options enable_lora and" in answer.json()["error"]["message"]

    serve(llm.engine, partial(served, work, {}))


def test_folders_are_checked_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "french" / CONFIG, tmp_path)
    for path, limit, reason in (
        (tmp_path / "none", 8, "adapter_config.json cannot be read"),
        (folder / "dora", 8, "use_dora is True: DoRA is not supported"),
        (folder / "french", 1, "has rank [0-9]+, but max_lora_rank is 1"),
        (tmp_path, 8, "adapter_model.safetensors cannot be read: there is no such file"),
    ):
        engine = EngineConfig("no/such-model", enable_lora=True, max_lora_rank=limit)
        with pytest.raises(ValueError, match=f"lora_modules has 'a': .*{reason}"):
            start.serve(engine, ServerConfig(lora_modules=[f"a={path}"]))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_modules needs enable_lora=True"):
        ServerConfig(lora_modules=["a=b"]).check_engine(EngineConfig("m"))
    with pytest.raises(ValueError, match="lora_modules has 'm', which is a name of the model"):
        ServerConfig(lora_modules=["m=b"]).check_engine(EngineConfig("m", enable_lora=True))
    with pytest.raises(ValueError, match="allowed_lora_path does not go with api_processes=2"):
        ServerConfig(allowed_lora_path=tmp_path, api_processes=2)
    with pytest.raises(ValueError, match="lora_modules has two adapters of one name"):
        ServerConfig(lora_modules=["a=b", "a=c"])
    with pytest.raises(ValueError, match=r"lora_modules is \['a'\]: it must be a list of NAME"):
        ServerConfig(lora_modules=["a"])
