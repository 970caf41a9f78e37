"""The options of an engine on the command line: flags made from `EngineConfig`, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from nanovllm.compat.engine_args import DEFAULT_MODEL, add_engine_flags, given_engine_options
from nanovllm.config import EngineConfig
from nanovllm.flags import Parser

MODEL_HELP = "an embedded model, a folder or a Hub id"


def add_engine_options(
    parser: Parser, *, positional: bool = False, skip: Collection[str] = ()
) -> None:
    """Add the model, as --model or, with `positional`, also as the first word, and all options of
    `LLM` but those in `skip`."""
    default = f"{MODEL_HELP} (default: {DEFAULT_MODEL})"
    if positional:
        parser.add_argument("model_word", metavar="MODEL", nargs="?", help=default)
        default = "the same as MODEL"
    parser.add_argument("--model", metavar="MODEL", help=default)
    group = parser.add_argument_group(
        "options of the engine", "Those of LLM. Names of vLLM's for them are understood, too."
    )
    add_engine_flags(group, skip={"model", *skip})


def engine_options(
    args: argparse.Namespace, *, skip: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
    """(model, options that were given). Raises ValueError for two different models."""
    word = getattr(args, "model_word", None)
    if word is not None and args.model not in (None, word):
        raise ValueError(f"MODEL is {word!r}, but --model is {args.model!r}: give one of them")
    options = given_engine_options(args, skip={"model", *skip})
    return word or args.model or DEFAULT_MODEL, options


def engine_config(args: argparse.Namespace, *, skip: Collection[str] = ()) -> EngineConfig:
    """The checked options but those in `skip`. Raises ValueError for a wrong value."""
    model, options = engine_options(args, skip=skip)
    return EngineConfig.from_options(model, options)
