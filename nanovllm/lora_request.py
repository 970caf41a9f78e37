"""`LoRARequest`: the adapter of a request, under vLLM's name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike

from nanovllm.checks import InvalidValue, as_python

FIELD = "lora_request"
MAX_ID = (1 << 31) - 1


@dataclass(frozen=True)
class LoRARequest:
    """An adapter in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

    lora_name: its name in messages and in a server's list of models.
    lora_int_id: a whole number above 0. Two adapters of an engine have two numbers.
    lora_path: the folder, as text or as a path.

    Raises ValueError for other values. The files are read by the engine.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        number = as_python(self.lora_int_id)
        if type(number) is not int or not 0 < number <= MAX_ID:
            words = f"it must be a whole number, 1 … {MAX_ID}"
            raise InvalidValue(FIELD, f"lora_int_id is {self.lora_int_id!r}: {words}")
        for name in ("lora_name", "lora_path"):
            value = getattr(self, name)
            text = os.fspath(value) if isinstance(value, PathLike) else value
            if not isinstance(text, str) or not text or "\0" in text:
                raise InvalidValue(FIELD, f"{name} is {value!r}: it must be a text, and not empty")
            object.__setattr__(self, name, text)
        object.__setattr__(self, "lora_int_id", number)

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path


def checked(given: object, *, is_enabled: bool) -> LoRARequest | None:
    """The adapter of a request, None for none. Raises ValueError for other types, and for an
    adapter if the engine takes none."""
    if given is None:
        return None
    if not isinstance(given, LoRARequest):
        raise InvalidValue(FIELD, f"{FIELD} is {given!r}: it must be a LoRARequest, or None")
    if not is_enabled:
        words = "adapters need the option enable_lora=True"
        raise InvalidValue(FIELD, f"{FIELD} is {given.lora_name!r}: {words}")
    return given
