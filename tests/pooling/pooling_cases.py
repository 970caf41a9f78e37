"""Small checkpoints of models that pool, engines on them, and transformers' results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm import LLM
from tests.conftest import tiny_config
from tests.engines import VOCAB_SIZE, save_tokenizer

LENGTHS = [1, 19, 99, 33, 5, 64]
MAX_LEN = 128


def fill(model: Any) -> Any:
    """A model of transformers with random norms and biases, which it initializes to 1 and 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name.lower():
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.eval()


def save_decoder(folder: Path, kind: str = "qwen3", head: str = "CausalLM", **changes: Any) -> Any:
    """Save a tiny decoder with a tokenizer; returns transformers' model of it. head: the end of
    transformers' class: "CausalLM", "SequenceClassification", or "" for the model alone."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(kind, **{"vocab_size": VOCAB_SIZE, **changes})
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = fill(auto.from_config(config))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def write_modules(folder: Path, mode: str, *, normalize: bool, **others: Any) -> None:
    """The files of sentence-transformers."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
         "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(types)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({mode: True, **others}))


def pooling_llm(folder: Path, task: str = "embed", **options: Any) -> LLM:
    defaults: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "enforce_eager": True, "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 160, "max_num_seqs": 5,
    }  # fmt: skip
    return LLM(str(folder), task=task, **{**defaults, **options})


def hidden(model: Any, token_ids: Sequence[int], **inputs: Any) -> Tensor:
    """transformers' last hidden states [T, D] of one prompt."""
    with torch.no_grad():
        base = getattr(model, "model", model)
        return base(torch.tensor([list(token_ids)]), **inputs).last_hidden_state[0]


def logits(model: Any, token_ids: Sequence[int], **inputs: Any) -> Tensor:
    """transformers' logits of classes [C] of one prompt."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)]), **inputs).logits[0]


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def embeddings(llm: LLM, prompts: Any, **options: Any) -> list[Tensor]:
    found = llm.embed(prompts, use_tqdm=False, **options)
    return [torch.tensor(one.outputs.embedding) for one in found]


def assert_near(found: Sequence[Tensor], wanted: Sequence[Tensor], atol: float = 1e-4) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)
