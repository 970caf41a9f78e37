"""Without Triton its kernels cannot be imported, so their tests are not collected. Its interpreter,
which runs them on a machine without a GPU, is made quicker."""

import functools
import importlib.util
import inspect
import os
from types import SimpleNamespace
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_triton_*.py"]


def hasten_interpreter() -> None:
    """At each launch, and at each call of a function in it, the interpreter looks for the builtins
    of Triton's language among all members of its modules, and replaces them. This took half of the
    time of most tests. The names of builtins stay the same, so they are found once. In a launch
    they have been replaced, so a call of a function replaces nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def getmembers(parent: Any) -> list[tuple[str, Any]]:
        if parent not in names:
            names[parent] = [name for name, _ in inspect.getmembers(parent, tl.core.is_builtin)]
        return [(name, getattr(parent, name)) for name in names[parent]]

    @functools.cache
    def languages(fn: Any) -> list[Any]:
        values = fn.__globals__.values()
        return [lang for lang in (tl, tl.core) if any(lang is value for value in values)]

    replace = interpreter._patch_lang

    def replace_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(lang.load) for lang in languages(fn)):
            return replace(fn)
        return None  # a launch would fail without the way back: only calls ignore the result

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})
    interpreter._patch_lang = replace_once


if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    hasten_interpreter()
