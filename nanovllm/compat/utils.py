"""The names that programs import from vLLM's `utils` and `inputs`."""

from __future__ import annotations

import uuid

from nanovllm.flags import Parser as FlexibleArgumentParser
from nanovllm.prompts import AnyPrompt as PromptType

__all__ = ["FlexibleArgumentParser", "PromptType", "random_uuid"]


def random_uuid() -> str:
    """A random id of 32 hexadecimal digits."""
    return uuid.uuid4().hex
