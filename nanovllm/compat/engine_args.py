"""vLLM's EngineArgs: the options of an engine as an object, and as command-line arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, get_args, get_origin

from nanovllm.checks import hints
from nanovllm.compat.options import LOAD_FORMATS, SAME_MEANING
from nanovllm.config import EngineConfig

DEFAULT_MODEL = "tiny-qwen3"


@dataclass(frozen=True, init=False)
class EngineArgs(EngineConfig):
    """An `EngineConfig` that also takes vLLM's option names."""

    def __init__(self, model: str | PathLike[str] = DEFAULT_MODEL, **options: Any) -> None:
        config = EngineConfig.from_options(model, options)
        for option in fields(EngineConfig):
            object.__setattr__(self, option.name, getattr(config, option.name))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an argument for each option, under its own name and vLLM's."""
        names = {option.name: option.name for option in fields(EngineConfig)} | SAME_MEANING
        for name, ours in names.items():
            hint = hints(EngineConfig)[ours]
            default = DEFAULT_MODEL if ours == "model" else argparse.SUPPRESS
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, dest=name, default=default, **_reading(hint))
        parser.add_argument("--load-format", choices=LOAD_FORMATS, default=argparse.SUPPRESS)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """The options that were given on the command line. Other arguments are left alone."""
        known = {option.name for option in fields(EngineConfig)} | set(SAME_MEANING)
        known.add("load_format")
        return cls(**{name: value for name, value in vars(args).items() if name in known})


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads values of an annotated type."""
    choices = get_args(hint) or (hint,)
    origins = {get_origin(choice) or choice for choice in (hint, *choices)}
    if bool in origins:
        return {"action": argparse.BooleanOptionalAction}
    if Sequence in origins:
        return {"type": int, "nargs": "*"}
    if Mapping in origins:
        return {"type": json.loads, "metavar": "JSON"}
    for kind in (int, float):
        if kind in origins:
            return {"type": kind}
    return {"type": str}
