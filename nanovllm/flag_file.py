"""Flags of a command line from the YAML file that `--config` names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.typos import nearest


def read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The values of a parser's options by their names in its namespace.

    The file has an object with options, with hyphens or underscores and without the two leading
    hyphens. True and False stand for `--x` and `--no-x`, and null for an absent option. Raises
    OSError, and ValueError for another kind of file and for a value that its flag refuses.
    """
    found: dict[str, Any] = {}
    known = parser._option_string_actions.keys() - {"--config", "--help"}
    for name, value in _content(path).items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag not in known:
            hint = nearest(flag, sorted(known), f"{parser.prog} --help")
            raise ValueError(f"{path}: unknown option {name}{hint}")
        if value is False:
            flag = f"--no-{flag[2:]}"
        action = parser._option_string_actions.get(flag)
        if value is None or action is None:
            continue  # a flag without --no-x is off
        try:
            words = _words(value)
            if not words and action.nargs not in (0, "?", "*"):
                raise argparse.ArgumentError(action, f"{value!r} is not a value")
            _check_number(action, words)
            one = argparse.Namespace()
            action(parser, one, parser._get_values(action, words), flag)
            found[action.dest] = getattr(one, action.dest)
        except argparse.ArgumentError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def _content(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{path} has no options: it must be an object, such as 'port: 8000'")
    return found or {}


def _check_number(action: argparse.Action, words: list[str]) -> None:
    if action.nargs == 0 and words:
        raise argparse.ArgumentError(action, "it must be true or false")
    if action.nargs in (None, "?") and len(words) > 1:
        raise argparse.ArgumentError(action, f"it takes one value, not {len(words)}")


def _words(value: Any) -> list[str]:
    """A value as the words of a command line."""
    if isinstance(value, bool):
        return []
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for one in value for word in _words(one)]
    return [str(value)]
