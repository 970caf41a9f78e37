"""vLLM's EngineArgs: the options of an engine as an object, and as command-line arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from nanovllm import tuning
from nanovllm.checks import hints
from nanovllm.config import EngineConfig
from nanovllm.flags import Arguments, add_flag, add_flags
from nanovllm.option_names import LOAD_FORMATS, ONE_VALUE, SAME_MEANING, SHORT
from nanovllm.tuning import Tuning

DEFAULT_MODEL = "tiny-qwen3"
OURS = tuple(option.name for option in fields(EngineConfig))
THEIRS = (*SAME_MEANING, "load_format", *(name for name in ONE_VALUE if name not in OURS))


@dataclass(frozen=True, init=False)
class EngineArgs(EngineConfig):
    """An `EngineConfig` that also takes vLLM's option names."""

    def __init__(self, model: str | PathLike[str] = DEFAULT_MODEL, **options: Any) -> None:
        config = EngineConfig.from_options(model, options)
        for option in fields(EngineConfig):
            object.__setattr__(self, option.name, getattr(config, option.name))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an argument for each option, under our name and vLLM's."""
        parser.add_argument("--model", default=DEFAULT_MODEL, help="see `LLM`")
        add_engine_flags(parser, skip=("model",))
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """The options from the command line. Other arguments are ignored."""
        return cls(**given_engine_options(args))


class AsyncEngineArgs(EngineArgs):
    """vLLM's name for the options of `AsyncLLM`."""


def add_engine_flags(to: Arguments, *, skip: Collection[str] = ()) -> None:
    """Add flags for the engine's options except those in `skip`, under our names and vLLM's."""
    add_flags(to, EngineConfig, skip=skip, also=SHORT)
    add_flags(to, Tuning, skip=skip)
    for theirs, ours in SAME_MEANING.items():
        if theirs not in skip and ours not in skip:
            text = f"the same as --{ours.replace('_', '-')}"
            add_flag(to, theirs, hints(EngineConfig)[ours], text)
    if "load_format" not in skip:
        to.add_argument("--load-format", choices=LOAD_FORMATS, default=argparse.SUPPRESS,
                        help="dummy: the same as --random-weights")  # fmt: skip
    for name in set(THEIRS) & ONE_VALUE.keys() - set(skip):
        is_switch = any(isinstance(value, bool) for value in ONE_VALUE[name])
        reading = {"action": argparse.BooleanOptionalAction} if is_switch else {"type": _value}
        # for command lines written for vLLM; hidden from the help, because they have one value
        flag = f"--{name.replace('_', '-')}"
        names = flag, *SHORT.get(name, ())
        to.add_argument(
            *names, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **reading
        )


def given_engine_options(args: argparse.Namespace, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """The engine options that were set, under our names or vLLM's. Those of `Tuning` are in
    `tuning`."""
    names = {*OURS, *tuning.NAMES, *THEIRS} - set(skip)
    given = {name: value for name, value in vars(args).items() if name in names}
    return tuning.moved(given, warn=False)


def _value(text: str) -> Any:
    """A number or other JSON value, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text
