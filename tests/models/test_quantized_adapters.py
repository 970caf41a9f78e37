"""Adapters on quantized bases give the logits of the bases' real values with W + scale · B · A."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from tests.conftest import save_tiny
from tests.models import lora_cases, test_gguf, test_shards
from tests.models.gguf_cases import in_turns
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits
from tests.models.test_quantized_checkpoints import BY_NAME, pack
from tests.models.thread_ranks import ThreadGroup, on_ranks

TOLERANCE = 1e-4
VOCAB_SIZE = 99
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 5}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graph": {"graph_batch_sizes": [4], "max_num_batched_tokens": 16},
}
Base = tuple[Path, Path]


def packed(name: str) -> Callable[[Path], Base]:
    def made(folder: Path) -> Base:
        saved = save_tiny(folder, vocab_size=VOCAB_SIZE, num_hidden_layers=1)
        found = pack(BY_NAME[name], saved)
        return found, found / "real"

    return made


def gguf(folder: Path) -> Base:
    """Its file has the rows of q and k in another order."""
    written = test_gguf.small(folder, in_turns("Q4_0", "Q4_K", "Q8_0"))
    return written.path, written.real


# A base, and the folder of its real values. The columns of "gptq ordered" are in another order.
BASES: dict[str, Callable[[Path], Base]] = {
    **{name: packed(name) for name in ("fp8 blocks", "gptq ordered", "awq")},
    "gguf": gguf,
}


class Case:
    """A quantized base, an adapter in fp32 of its linear layers, and the merged model's logits."""

    def __init__(self, name: str, root: Path) -> None:
        self.base, real = BASES[name](root / "model")
        self.adapter = lora_cases.save_adapter(root / "adapter", real, std=0.1)
        merged = lora_cases.save_merged(root / "merged", real, self.adapter)
        self.known = sequences(VOCAB_SIZE, (1, 4), (19, 22))
        self.expected = transformers_logits(merged, self.known, "cpu")
        self.plain = transformers_logits(real, self.known, "cpu")


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_merged_real_values(mode: str, case: Case) -> None:
    runner = load(case.base, "cpu", **MODES[mode], **LORA)
    lora_cases.use(runner, case.adapter, 2)
    assert max_difference(engine_logits(runner, case.known), case.expected) < TOLERANCE
    assert max_difference(case.expected, case.plain) > 100 * TOLERANCE
    assert runner.state.adapter_S is not None
    runner.state.adapter_S.fill_(0)
    assert max_difference(engine_logits(runner, case.known), case.plain) < TOLERANCE


def test_four_ranks_have_their_parts_beside_packed_weights(tmp_path: Path) -> None:
    """Rows of q, k, v, gate and up, and columns of o and down; key-value heads are there twice."""
    case = Case("awq", tmp_path)
    config = EngineConfig.from_options(str(case.base), test_shards.options(4, **LORA))

    def logits(group: ThreadGroup) -> Any:
        runner = test_shards.load_rank(config, group)
        lora_cases.use(runner, case.adapter)
        return engine_logits(runner, case.known)

    for found in on_ranks(4, logits):
        assert max_difference(found, case.expected) < TOLERANCE
