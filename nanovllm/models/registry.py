"""Which file serves which architecture."""

from __future__ import annotations

from types import ModuleType

from nanovllm.models import llama, mistral, qwen2, qwen3

ARCHITECTURES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def architecture(names: list[str] | None) -> ModuleType:
    """The model file for the first known name of a config's `architectures`; ValueError if there is none."""
    for name in names or []:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"architecture {names} is not supported: use one of {', '.join(ARCHITECTURES)}"
    )
