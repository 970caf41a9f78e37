"""Checks options against the annotations of their dataclass and against rules, and converts numpy
and torch scalars.

`checked(name, value, hint)` decides whether a value is of an annotated type. `check_fields` applies
it to all fields of a dataclass.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from os import PathLike, fspath
from typing import Any, Union

Rule = tuple[str, Callable[[Any], bool]]  # the condition on a value, as text and as a function


class InvalidValue(ValueError):
    """A refused value. field: the option, or the field of a request, that has it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        # without attributes of subclasses, which may hold any object of the user's
        return InvalidValue, (self.field, str(self))


class WorkFailed(ValueError):
    """Work for a request has failed, and the request is not the cause. An OSError's paths are
    not in the message."""

    @classmethod
    def of(cls, what: str, cause: Exception) -> WorkFailed:
        """what: the work, which "has failed"."""
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": ")
        if isinstance(cause, OSError):
            reason = cause.strerror or type(cause).__name__
        found = cls(f"{what} has failed: {reason}")
        found.__cause__ = cause  # for the log
        return found


class WrongType(InvalidValue):
    """A value is not of the annotated type. `words` name the expected type."""

    def __init__(self, name: str, value: object, words: str) -> None:
        super().__init__(name, f"{name} is {value!r}: it must be {words}")
        self.words = words


def as_python(value: Any) -> Any:
    """The Python number of a numpy or torch scalar (no dimensions). Other values stay."""
    if isinstance(value, (int, float, str)) and type(value) in (int, float, bool, str):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, as types."""
    return typing.get_type_hints(cls)


def refuse_unknown(cls: Any, names: Iterable[str]) -> None:
    """Raises TypeError for names that are not fields of a dataclass."""
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")


def check_fields(config: Any, rules: Mapping[str, Rule], secrets: Collection[str] = ()) -> None:
    """Convert every field of a frozen dataclass to its annotated type. Raises ValueError for a
    value of another type or one that its rule forbids; None is also allowed where it is the
    default. Messages do not show the values of `secrets`."""
    cls: type = type(config)
    for option in fields(config):
        given = getattr(config, option.name)
        if given is option.default:
            continue
        rule, is_allowed = rules.get(option.name, ("", lambda value: True))
        shown = "secret" if option.name in secrets else repr(given)
        try:
            value = checked(option.name, given, hints(cls)[option.name])
        except WrongType as error:
            words = rule or error.words
            message = f"{option.name} is {shown}: it must be {words}"
            raise InvalidValue(option.name, message) from None
        if value is not None and not is_allowed(value):
            raise InvalidValue(option.name, f"{option.name} is {shown}: it must be {rule}")
        object.__setattr__(config, option.name, value)


def to_options(config: Any) -> dict[str, Any]:
    """The fields of a checked config as JSON values. The config's class makes an equal config of
    them in another process."""
    return asdict(config)


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as its annotated type; raises WrongType, a ValueError, if it is of another type.

    A sequence becomes a tuple of checked elements, a mapping a dict of checked keys and values, a
    path its text.
    """
    value = as_python(value)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(name, value, typing.get_args(hint))
    test, words = _kind(origin or hint)
    if not test(value):
        raise WrongType(name, value, words)
    arguments = typing.get_args(hint)
    if origin is Sequence and arguments:
        return tuple(checked(name, element, arguments[0]) for element in value)
    if origin is Mapping and arguments:
        key, element = arguments
        return {checked(name, k, key): checked(name, v, element) for k, v in value.items()}
    return _converted(name, value, hint) if hint in (int, float) or origin is PathLike else value


def _converted(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is PathLike:
        text = fspath(value)
        if not isinstance(text, str):
            raise WrongType(name, value, "a path of text, not of bytes")
        return text
    try:
        return hint(value)
    except OverflowError:
        raise WrongType(name, value, "a number within the range of a float") from None


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    words = []
    for choice in choices:
        try:
            return checked(name, value, choice)
        except WrongType as error:
            words.append(error.words)
    raise WrongType(name, value, " or ".join(words))


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (_is_whole, "a whole number"),
    float: (_is_number, "a number"),
    str: (lambda value: isinstance(value, str), "text"),
    types.NoneType: (lambda value: value is None, "None"),
    object: (lambda value: True, "anything"),
    PathLike: (lambda value: isinstance(value, PathLike), "a path"),
    Sequence: (_is_sequence, "a list"),
    Mapping: (lambda value: isinstance(value, Mapping), "a dict"),
}


def _kind(hint: Any) -> tuple[Callable[[Any], bool], str]:
    if hint in _KINDS:
        return _KINDS[hint]
    return lambda value: isinstance(value, hint), f"a {hint.__name__}"


# rules


def is_json_object(value: Any) -> bool:
    try:
        return isinstance(value, Mapping) and isinstance(json.loads(json.dumps(value)), dict)
    except (TypeError, ValueError):
        return False


def one_of(*values: str | None) -> Rule:
    return f"one of {', '.join(map(str, values))}", lambda value: value in values


def whole(low: int, high: float = math.inf, why: str = "") -> Rule:
    words = f"a whole number, at least {low}{why}"
    if high < math.inf:
        words += f", at most {high}"
    return words, lambda value: low <= value <= high


def sizes(high: int, *, may_be_empty: bool = False) -> Rule:
    def is_allowed(value: Sequence[int]) -> bool:
        return all(1 <= size <= high for size in value) and (may_be_empty or len(value) > 0)

    return f"a list of whole numbers of at least 1, at most {high}", is_allowed
