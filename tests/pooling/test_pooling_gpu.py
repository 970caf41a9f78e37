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
    cosines: list[float]  # the least that ours may have with these
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
    model.to(torch.bfloat16)  # its own rounding, which for long prompts costs more than 1e-4
    rounded = [unit(hidden(model, prompt)[chosen].float()) for prompt in PROMPTS]
    cosines = [min(0.9999, float(one @ other)) for one, other in zip(wanted, rounded)]
    llm = pooling_llm(
        folder, device="cuda", dtype=dtype, enforce_eager=False, max_model_len=MAX_LEN,
        max_num_batched_tokens=1024, max_num_seqs=6, compile_cache=folder / "store",
    )  # fmt: skip
    yield Made(llm, wanted, cosines, dtype)
    llm.close()


def assert_parity(found: list[Tensor], made: Made) -> None:
    for one, other, cosine in zip(found, made.wanted, made.cosines, strict=True):
        if made.dtype == "float32":
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        least = 0.9999 if made.dtype == "float32" else cosine
        assert float(one @ other / one.norm() / other.norm()) >= least


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
    assert_parity(embeddings(made.llm, PROMPTS), made)
    assert_parity(embeddings(made.llm, PROMPTS[::-1])[::-1], made)
    assert runner.compiler.num_compiled + runner.compiler.num_loaded == num


def test_a_replay_is_the_step_op_by_op(made: Made) -> None:
    """Of every bucket, with several sequences and with few. In a capture cuBLAS may sum in another
    order."""
    runner = made.llm.engine.runner
    assert isinstance(runner, PoolRunner)
    for num_tokens in runner.layout.prefill_tokens:
        longest, half = min(num_tokens, MAX_LEN), num_tokens // 2
        for sizes in ([longest] * (num_tokens // longest), [half - 3, 1, half]):
            sequences = [PoolSequence(one) for one in random_prompts(sizes)]
            found = torch.from_numpy(runner.launch(sequences).numpy().copy())
            step = runner._step(num_tokens, len(sizes))
            with torch.no_grad():
                step.launch()
            torch.cuda.synchronize()
            again = step.result_RO[: len(sizes)].cpu()
            if made.dtype == "float32":
                torch.testing.assert_close(again, found, atol=1e-5, rtol=0)
            else:
                cosine = torch.nn.functional.cosine_similarity(again.float(), found.float())
                assert float(cosine.min()) >= min(made.cosines)


def test_a_second_start_compiles_nothing(made: Made) -> None:
    config = made.llm.engine.config
    second = LLM(
        config.model, task="embed", device="cuda", dtype=made.dtype, max_model_len=MAX_LEN,
        max_num_batched_tokens=1024, max_num_seqs=6, compile_cache=config.compile_cache,
        compile_cache_mode="require",
    )  # fmt: skip
    runner = second.engine.runner
    assert isinstance(runner, PoolRunner) and runner.compiler.num_compiled == 0
    assert_parity(embeddings(second, PROMPTS), made)
    second.close()
