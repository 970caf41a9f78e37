"""The options of an engine on the command line: flags made from `EngineConfig`, and the model."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from nanovllm.compat.engine_args import DEFAULT_MODEL, add_engine_flags, given_engine_options
from nanovllm.config import EngineConfig
from nanovllm.flags import CONFIG, Parser

# options of `LLM` that benchmarks set themselves, or give another form
SET_BY_BENCH = ("model", "random_weights", "load_format", "max_num_seqs")
MODEL_HELP = "an embedded model, a folder or a Hub id"


class _Model(argparse.Action):
    """The model, as a word or as an option. Two different models are an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values is self.default:
            return  # no word; an option file may have set this default
        earlier = getattr(namespace, "given_model", values)
        if earlier != values:
            parser.error(f"MODEL is {earlier!r} and {values!r}: use one of them")
        namespace.model = namespace.given_model = values


def add_engine_options(
    parser: Parser, *, positional: bool = False, skip: Collection[str] = ()
) -> None:
    """Add the model, as --model or, with `positional`, also as the first word, and all options of
    `LLM` except those in `skip`."""
    default = f"{MODEL_HELP} (default: {DEFAULT_MODEL})"
    if positional:
        parser.add_argument("model", metavar="MODEL", nargs="?", action=_Model, help=default)
        default = "the same as MODEL"
    parser.add_argument("--model", metavar="MODEL", action=_Model, help=default)
    text = "a YAML file of options, such as `port: 8000`; options on the command line override it"
    parser.add_argument(CONFIG, metavar="FILE", help=text)
    group = parser.add_argument_group(
        "options of the engine", "The options of LLM. vLLM's names for them also work."
    )
    add_engine_flags(group, skip={"model", *skip})


def engine_options(
    args: argparse.Namespace, *, skip: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
    """(model, options that were set)."""
    options = given_engine_options(args, skip={"model", *skip})
    return args.model or DEFAULT_MODEL, options


def engine_config(args: argparse.Namespace, *, skip: Collection[str] = ()) -> EngineConfig:
    """The checked options except those in `skip`. Raises ValueError for an invalid value."""
    model, options = engine_options(args, skip=skip)
    return EngineConfig.from_options(model, options)
