"""Flags of a command line, made from a dataclass of options: its annotations and its docstring."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from fractions import Fraction
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol, get_args, get_origin

from nanovllm import flag_file
from nanovllm.checks import hints
from nanovllm.typos import nearest

ENTRY = re.compile(r"(\w+(?:, \w+)*): ")  # names at the beginning of a docstring's paragraph
# numbers as vLLM's command line takes them: 4k is 4000, and 4K is 4096
NUMBER = re.compile(r"([+-]?\d+)(\.\d+)?([kmgtKMGT]?)", re.ASCII)
PAIR = re.compile(r"([A-Za-z]\w*)=(.+)")  # image=2
SWITCHED = {"on": True, "true": True, "off": False, "false": False}


CONFIG = "--config"


class Arguments(Protocol):
    """A parser or a group of its arguments."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


class Parser(argparse.ArgumentParser):
    """Suggests the nearest option for an unknown one, and accepts `--a_b` for `--a-b`.

    The file that an option `--config` names supplies defaults (see `flag_file`).
    Errors are one line: the usage of a command with 50 options would hide them.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = self._named(sys.argv[1:] if args is None else list(args))
        if CONFIG in self._option_string_actions:
            self._take_file(words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _take_file(self, words: list[str]) -> None:
        """Use the values of the file that `--config` names as defaults."""
        only = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        only.add_argument(CONFIG)
        path = only.parse_known_args(words)[0].config
        if path is not None:
            try:
                self.set_defaults(**flag_file.read(self, Path(path)))
            except (ValueError, OSError) as error:
                self.error(str(error))

    def _named(self, words: list[str]) -> list[str]:
        """The words with hyphens in the names of options. Ends the program for unknown names."""
        known = self._option_string_actions
        end = words.index("--") if "--" in words else len(words)
        found = []
        for word in words[:end]:
            name, mark, value = word.partition("=")
            # as in argparse, a word with a space is not an option
            if name.startswith("--") and " " not in name:
                hyphened = name.replace("_", "-")
                if hyphened not in known:
                    self.error(
                        f"unknown option {name}{nearest(hyphened, known, self.prog + ' --help')}"
                    )
                word = hyphened + mark + value
            found.append(word)
        return found + words[end:]


class Switch(argparse.Action):
    """`--x` is True, `--no-x` False, and `--x TEXT` a text; "on" and "off" are True and False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        self.negative = [f"--no-{name[2:]}" for name in option_strings]
        names = [*option_strings, *self.negative]
        super().__init__(names, dest, nargs="?", **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        is_negative = option_string in self.negative
        if is_negative and values is not None:
            parser.error(f"{option_string} takes no value")
        value = not is_negative if values is None else SWITCHED.get(values, values)
        setattr(namespace, self.dest, value)


def add_flags(
    to: Arguments,
    options: type,
    *,
    skip: Collection[str] = (),
    also: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Add a flag for each field of a dataclass except those in `skip`. An absent flag leaves
    nothing in the namespace, so the class supplies the defaults. `also`: further flags of
    fields."""
    texts = documented(options)
    for field in fields(options):
        if field.name not in skip:
            text = texts.get(field.name, "") + _default_text(field)
            hint = hints(options)[field.name]
            add_flag(to, field.name, hint, text, also=also.get(field.name, ()))


def add_flag(
    to: Arguments,
    name: str,
    hint: Any,
    text: str,
    *,
    dest: str | None = None,
    also: Sequence[str] = (),
) -> None:
    """Add the flag of one option with an annotated type, and with `also` under further names."""
    help_text = text.replace("%", "%%")
    reading = {"help": help_text, "default": argparse.SUPPRESS, **_reading(hint)}
    to.add_argument(f"--{name.replace('_', '-')}", *also, dest=dest or name, **reading)


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The options of a dataclass that were given on the command line."""
    names = {field.name for field in fields(options)}
    return {name: value for name, value in vars(args).items() if name in names}


def documented(options: type) -> dict[str, str]:
    """The description of each option in the docstring of a dataclass, as one line.

    A paragraph about options begins with their names, "a: …" or "a, b: …"; its other lines are
    indented further. A paragraph about two options describes both.
    """
    head, _, body = (options.__doc__ or "").partition("\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in [head, *textwrap.dedent(body).splitlines()]:
        if match := ENTRY.match(line):
            names, line = match[1].split(", "), line[match.end() :]
        elif not line.startswith(" "):
            names = []
        for name in names:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


def _default_text(field: Field[Any]) -> str:
    if field.default is MISSING or field.default in (None, "", ()) or field.default is False:
        return ""
    shown = "yes" if field.default is True else field.default
    return f" (default: {shown})"


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads values of an annotated type."""
    several = next((one for one in _choices(hint) if _origin(one) is Sequence), None)
    if several is not None:
        inner = _reading(get_args(several)[0])
        # an empty list is a mistake, such as an empty shell variable after --api-key
        return {**inner, "nargs": "+" if inner["type"] is str else "*"}
    kinds = {_origin(one) for one in _choices(hint)} - {type(None)}
    if kinds == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if bool in kinds:
        return {"action": Switch, "metavar": "WHAT"}
    if Mapping in kinds:
        return {"type": mapping, "metavar": "JSON"}
    if kinds == {int, str}:
        return {"type": _number_or_text, "metavar": "N"}
    for kind, reader, metavar in ((float, float, "X"), (int, whole_number, "N")):
        if kind in kinds:
            return {"type": reader, "metavar": metavar}
    return {"type": str, "metavar": "PATH" if PathLike in kinds else "TEXT"}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union; one type for any other annotation."""
    return (
        (hint,) if get_origin(hint) in (Sequence, Mapping, PathLike) else get_args(hint) or (hint,)
    )


def _origin(hint: Any) -> Any:
    return get_origin(hint) or hint


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def mapping(text: str) -> Any:
    """JSON, or pairs such as "image=4,video=0"."""
    pairs = [PAIR.fullmatch(one.strip()) for one in text.split(",")]
    if not all(pairs):
        return json_value(text)
    return {pair[1]: json_or_text(pair[2]) for pair in pairs if pair is not None}


def json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def whole_number(text: str) -> int:
    """A whole number: 4096, 4k (4000), 2.5k (2500), 4K (4096); further letters are m, g and t."""
    match = NUMBER.fullmatch(text)
    if match is not None:
        whole, part, letter = match[1], match[2] or "", match[3]
        base = 1024 if letter.isupper() else 1000
        value = Fraction(whole + part) * base ** " kmgt".index(letter.lower() or " ")
        if value.denominator == 1 and (letter.islower() or not part):
            return int(value)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a whole number, such as 4096, 4k (4000) or 4K (4096)"
    )
