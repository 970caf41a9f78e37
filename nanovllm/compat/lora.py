"""vLLM's LoRARequest, so that programs can import it; adapters are not supported."""

from __future__ import annotations


class LoRARequest:
    """Not supported: raises ValueError."""

    def __init__(self, *_: object, **__: object) -> None:
        """Raises ValueError."""
        raise ValueError(
            "LoRARequest: LoRA adapters are not supported. Merge the adapter into the checkpoint, "
            "as PEFT's merge_and_unload does, and load that"
        )
