"""Models that pool on a GPU, with captured steps, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm import LLM
from nanovllm.runner.pool_runner import PoolRunner, PoolSequence
from tests.engines import random_prompts
from tests.pooling.pooling_cases import embeddings, hidden, pooling_llm, save_decoder, unit
from tests.pooling.test_encoders import save_encoder

LENGTHS = [1, 19, 511, 33, 130, 64, 257]
MAX_LEN = 512
PROMPTS = random_prompts(LENGTHS)
# weights as small as those of published models: larger ones make differences of bf16 larger
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.02
}  # fmt: skip
CASES = [(kind, dtype) for kind in ("qwen3", "bert", "modernbert") for dtype in
         ("float32", "bfloat16")]  # fmt: skip

pytestmark = pytest.mark.gpu


class Made(NamedTuple):
    llm: LLM
    wanted: list[Tensor]  # of transformers in fp32
    dtype: str


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    kind, dtype = request.param
    folder: Path = tmp_path_factory.mktemp(kind)
    if kind == "qwen3":  # heads of 128 have a kernel of their own
        model = save_decoder(folder, head="", head_dim=128, num_hidden_layers=3, **SIZES,
                             max_position_embeddings=MAX_LEN)  # fmt: skip
    else:
        model = save_encoder(folder, kind, **SIZES, max_position_embeddings=MAX_LEN)
    chosen = -1 if kind == "qwen3" else 0
    wanted = [unit(hidden(model, prompt)[chosen]) for prompt in PROMPTS]
    llm = pooling_llm(
        folder, device="cuda", dtype=dtype, enforce_eager=False, max_model_len=MAX_LEN,
        max_num_batched_tokens=1024, max_num_seqs=6, compile_cache=folder / "store",
    )  # fmt: skip
    yield Made(llm, wanted, dtype)
    llm.close()


def assert_parity(found: list[Tensor], wanted: list[Tensor], dtype: str) -> None:
    for one, other in zip(found, wanted, strict=True):
        if dtype == "float32":
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        assert float(one @ other / one.norm() / other.norm()) >= 0.9999


def test_captured_steps_give_the_embeddings_of_transformers(made: Made) -> None:
    runner = made.llm.engine.runner
    assert isinstance(runner, PoolRunner) and runner.captures
    assert sorted(runner._steps) == [
        (num_tokens, num_rows)
        for num_tokens in runner.layout.prefill_tokens
        for num_rows in runner.row_counts(num_tokens)
    ]
    assert all(step.replay != step.launch for step in runner._steps.values())
    num = runner.compiler.num_compiled + runner.compiler.num_loaded
    assert_parity(embeddings(made.llm, PROMPTS), made.wanted, made.dtype)
    assert_parity(embeddings(made.llm, PROMPTS[::-1]), made.wanted[::-1], made.dtype)
    assert runner.compiler.num_compiled + runner.compiler.num_loaded == num


def test_a_replay_is_the_step_op_by_op(made: Made) -> None:
    """Of every bucket, with several sequences and with one."""
    runner = made.llm.engine.runner
    assert isinstance(runner, PoolRunner)
    for num_tokens in runner.layout.prefill_tokens:
        size = min(num_tokens, MAX_LEN) // 2
        for sizes in ([min(num_tokens, MAX_LEN)], [size - 3, 1, size]):
            sequences = [PoolSequence(one) for one in random_prompts(sizes)]
            found = torch.from_numpy(runner.launch(sequences).numpy().copy())
            step = runner._step(num_tokens, len(sizes))
            with torch.no_grad():
                step.launch()
            torch.cuda.synchronize()
            assert torch.equal(step.result_RO[: len(sizes)].cpu(), found)


def test_a_second_start_compiles_nothing(made: Made) -> None:
    config = made.llm.engine.config
    second = LLM(
        config.model, task="embed", device="cuda", dtype=made.dtype, max_model_len=MAX_LEN,
        max_num_batched_tokens=1024, max_num_seqs=6, compile_cache=config.compile_cache,
        compile_cache_mode="require",
    )  # fmt: skip
    runner = second.engine.runner
    assert isinstance(runner, PoolRunner) and runner.compiler.num_compiled == 0
    assert_parity(embeddings(second, PROMPTS), made.wanted, made.dtype)
    second.close()
