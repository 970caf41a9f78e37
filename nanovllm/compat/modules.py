"""Aliases for import paths of vLLM and nano-vllm.

`from nanovllm.inputs import TextPrompt` works like `from vllm.inputs import TextPrompt`. These
modules, and the modules that define their names, are loaded on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = "nanovllm"
LORA = "nanovllm.lora_request"
ARGUMENTS = "nanovllm.compat.engine_args"
ASYNC_LLM = {"AsyncLLM": ROOT, "AsyncLLMEngine": ROOT}
SAMPLING = "nanovllm.sampling"
# The modules below nanovllm, and where each of their names is: "module" or "module:name". Modules
# without names are packages.
MODULES: dict[str, dict[str, str]] = {
    "sampling_params": {
        "SamplingParams": SAMPLING, "BeamSearchParams": SAMPLING, "RequestOutputKind": SAMPLING,
        "StructuredOutputsParams": "nanovllm.structured_params",
    },
    "inputs": {
        "TextPrompt": "nanovllm.prompts", "TokensPrompt": "nanovllm.prompts",
        "PromptType": "nanovllm.compat.utils",
    },
    "utils": {
        "FlexibleArgumentParser": "nanovllm.compat.utils", "random_uuid": "nanovllm.compat.utils",
    },
    "lora": {},
    "lora.request": {"LoRARequest": LORA},
    "entrypoints": {},
    "entrypoints.llm": {"LLM": ROOT},
    "engine.arg_utils": {"EngineArgs": ARGUMENTS, "AsyncEngineArgs": ARGUMENTS},
    "engine.async_llm_engine": ASYNC_LLM,
    # nano-vllm's: the base class of its LLM with the same methods; see v1 for vLLM's
    "engine.llm_engine": {"LLMEngine": "nanovllm:LLM"},
    "v1": {},
    "v1.engine": {},
    "v1.engine.async_llm": ASYNC_LLM,
    "v1.engine.llm_engine": {"LLMEngine": "nanovllm.compat.llm_engine"},
}  # fmt: skip


class Alias(ModuleType):
    """A module whose names are defined elsewhere."""

    def __getattr__(self, name: str) -> Any:
        names = MODULES[self.__name__.removeprefix(f"{ROOT}.")]
        if name in names:
            module, _, there = names[name].partition(":")
            return getattr(import_module(module), there or name)
        if name == "__all__":
            return list(names)
        if name.startswith("__"):
            raise AttributeError(name)
        has = f"it has {', '.join(names)}" if names else "it is a package"
        raise AttributeError(f"module {self.__name__!r} has no {name!r}: {has}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *MODULES[self.__name__.removeprefix(f"{ROOT}.")]]


class Finder(MetaPathFinder, Loader):
    """Finds the modules in `MODULES`, after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, name = fullname.partition(".")
        if root != ROOT or name not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=not MODULES[name])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Alias(spec.name, "vLLM's or nano-vllm's name for a module.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names are resolved on access."""


def install() -> None:
    """Make the modules importable."""
    if not any(isinstance(one, Finder) for one in sys.meta_path):
        sys.meta_path.append(Finder())
