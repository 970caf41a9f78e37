"""The architectures that the engine knows, by the name that a checkpoint's config gives."""

from __future__ import annotations

from collections.abc import Callable

from nanovllm.models import llama, mistral, qwen2, qwen3
from nanovllm.models.interface import Model

# (transformers' config, dtype=…, max_model_len=…) -> Model
Architecture = Callable[..., Model]

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": llama.model,
    "MistralForCausalLM": mistral.model,
    "Qwen2ForCausalLM": qwen2.model,
    "Qwen3ForCausalLM": qwen3.model,
}


def architecture(names: list[str] | None) -> Architecture:
    """The first known name of a config's `architectures`. Raises ValueError if none is known."""
    for name in names or []:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    known = ", ".join(ARCHITECTURES)
    raise ValueError(f"architecture {names} is not supported: use one of {known}")
