"""Clients of an engine that pools: the results of `LLM`, refusals, and other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from nanovllm import LLM, PoolingParams, SamplingParams
from nanovllm.pooling.engine import PoolingEngine
from nanovllm.serving.client import Client
from tests.engines import random_prompts
from tests.pooling.pooling_cases import LENGTHS, assert_near, embeddings, pooling_llm, save_decoder
from tests.serving.served import serve

PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_decoder(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = pooling_llm(folder)
    yield llm
    llm.close()


def engine_of(llm: LLM) -> PoolingEngine:
    assert isinstance(llm.engine, PoolingEngine)
    return llm.engine


async def encoded(client: Client, prompt: list[int], **params: int) -> Tensor:
    async for found in client.encode(prompt, PoolingParams(**params)):
        return found.outputs.data
    raise AssertionError("no result")


def test_a_client_gets_the_embeddings_of_llm(llm: LLM) -> None:
    async def work(client: Client) -> list[Tensor]:
        return await asyncio.gather(*(encoded(client, one, dimensions=9) for one in PROMPTS))

    wanted = embeddings(llm, PROMPTS, pooling_params=PoolingParams(dimensions=9))
    assert_near(serve(engine_of(llm), work), wanted, atol=1e-6)


def test_a_client_refuses_what_the_model_does_not_do(llm: LLM) -> None:
    async def work(client: Client) -> None:
        await client.ready()
        with pytest.raises(ValueError, match="generating needs task='generate'"):
            await client.open(PROMPTS[0], SamplingParams())
        with pytest.raises(ValueError, match="dimensions is 65: embeddings of this model have 64"):
            await client.open(PROMPTS[0], PoolingParams(dimensions=65))

    serve(engine_of(llm), work)


def test_replicas_give_the_embeddings_of_one_engine(folder: Path, llm: LLM) -> None:
    both = pooling_llm(folder, data_parallel_size=2)
    assert_near(embeddings(both, PROMPTS), embeddings(llm, PROMPTS), atol=1e-6)
    both.close()
