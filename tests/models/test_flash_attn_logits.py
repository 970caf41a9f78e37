"""With the installed flash-attn packages logits are as close to transformers' as with our kernels.

Prompts take several prefill steps, whose later ones see cached keys, and decode steps follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.kernels import flash_attention
from nanovllm.kernels.flash_attention import Flash
from tests.conftest import save_tiny
from tests.models.harness import BF16, engine_logits, load, sequences, transformers_logits

pytestmark = [pytest.mark.gpu, pytest.mark.flash_attn]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"hidden_size": 256},
    "qwen3": {"head_dim": 128},
    "granite": {"hidden_size": 256},
    "olmo2": {"hidden_size": 256},
    "qwen3_moe": {"head_dim": 128},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 117,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
LENGTHS = ((1, 6), (19, 24), (300, 310), (600, 604))
VOCAB_SIZE = 512
GRAPHS = ("qwen3", "qwen3_moe")  # the others run op by op, because programs take long to compile


def cases() -> list[tuple[str, str]]:
    """(model, package). Builds without windows do not run models that have them."""
    if not torch.cuda.is_available():
        return []
    found = [flash_attention.installed(generation) for generation in (3, 2, 4)]
    return [
        (name, flash.package)
        for name in MODELS
        for flash in found
        if isinstance(flash, Flash) and not ("layer_types" in MODELS[name] and flash.lacks)
    ]


@pytest.mark.parametrize(("name", "package"), cases())
def test_logits_are_as_close_to_those_in_fp32_as_with_our_kernels(
    name: str, package: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for generation, sources in flash_attention.SOURCES.items():
        if not any(source.package == package for source in sources):
            monkeypatch.setitem(flash_attention.SOURCES, generation, ())
    changes = {"head_dim": 64, "max_position_embeddings": 1024, **BF16, **MODELS[name]}
    folder = save_tiny(tmp_path, name, vocab_size=VOCAB_SIZE, **changes)
    known = sequences(VOCAB_SIZE, *LENGTHS)
    exact = torch.cat(transformers_logits(folder, known, device))
    errors = {}
    for backend in ("triton", "flash_attn"):
        runner = load(
            folder, device, dtype="bfloat16", attention_backend=backend, kvcache_block_size=256,
            max_model_len=1024, max_num_batched_tokens=256, graph_batch_sizes=[1, 4],
            enforce_eager=name not in GRAPHS,
        )  # fmt: skip
        found = torch.cat(engine_logits(runner, known))
        errors[backend] = float((found - exact).norm() / exact.norm())
    assert errors["flash_attn"] <= 1.1 * errors["triton"], errors
