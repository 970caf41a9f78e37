"""The option `deterministic`: what it does not go with, and which programs an engine gets by it.

Its effect is in the passes of the device (`Platform.ordered_passes`): products and attention become
ops whose sums have one order, and an op that may have another is an error. Eager mode runs the same
graphs, so it gives the same bits as captured steps.
"""

from __future__ import annotations

from nanovllm.compile.lower import calls
from nanovllm.compile.program import Lowering, Pass
from nanovllm.config import EngineConfig
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import Model
from nanovllm.models.schemes import UNQUANTIZED
from nanovllm.platforms.base import Platform, Traits

VOCAB_UNIT = 4


def engine_lowering(config: EngineConfig, platform: Platform) -> Lowering | None:
    """The lowering of an engine's programs; None runs regions as Python."""
    if config.deterministic:
        return calls.lower
    return None if config.enforce_eager else platform.lowering()[0]


def engine_passes(config: EngineConfig, platform: Platform) -> tuple[tuple[str, Pass], ...]:
    """The passes of an engine's programs. Raises ValueError for a device without ordered ones."""
    if not config.deterministic:
        return platform.passes(config.tuned.fuse)
    passes = platform.ordered_passes()
    if passes is None:
        raise ValueError(
            f"deterministic=True is not supported on this {platform.traits.name} device: it needs "
            "our kernels, on a CPU or on an NVIDIA GPU of compute capability 9.0"
        )
    return passes


def check_model(config: EngineConfig, model: Model, traits: Traits) -> None:
    """Raise ValueError if deterministic=True is not supported for the model on the device."""
    if not config.deterministic:
        return
    options = {
        "enable_lora=True": config.enable_lora and "adapters" not in traits.ordered,
        f"kv_cache_dtype={config.kv_cache_dtype!r}": config.kv_cache_dtype != "auto"
        and "fp8 caches" not in traits.ordered,
        f"quantization={config.quantization!r}": config.quantization is not None
        and "quantized weights" not in traits.ordered,
    }
    for option, is_used in options.items():
        if is_used:
            raise ValueError(
                f"deterministic=True does not go with {option} on a {traits.name} device yet"
            )
    vocab_size, is_quantized = model.config.vocab_size, model.scheme != UNQUANTIZED
    refused = {
        f"quantized weights ({model.scheme})": is_quantized
        and "quantized weights" not in traits.ordered,
        "recurrent layers or latents": not all(isinstance(one, PagedKV) for one in model.kept),
        "images or audio": model.takes_embeddings,
        "a pooler": model.pooler is not None,
        # torch's log_softmax on a GPU reads rows from their first multiple of 16 bytes on
        f"a vocabulary of {vocab_size} tokens, no multiple of {VOCAB_UNIT},": vocab_size
        % VOCAB_UNIT
        != 0,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"deterministic=True is not supported for {model.config.architecture} with {what} "
                "yet: the order of their sums depends on the step"
            )
