"""Ctrl-C at a chosen line of this project's code, or at a chosen call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanovllm

PACKAGE = str(Path(nanovllm.__file__).parent)


def has_call(call: Callable[[], object], nth: int) -> bool:
    """Call, with an interrupt where the nth Python function of anyone's code begins, which is where
    Python handles signals. False if there are fewer. A generator that is being closed swallows it.
    """
    num_calls = 0

    def at_call(frame: Any, event: str, arg: object) -> None:
        nonlocal num_calls
        # before 3.11 such an error ends a resumed generator without its `finally` blocks; a signal
        # does not
        if sys.version_info < (3, 11) and frame.f_lasti >= 0:
            return
        num_calls += 1
        if num_calls == nth:
            sys.settrace(None)
            raise KeyboardInterrupt

    _is_interrupted(call, at_call)
    return num_calls == nth


def is_interrupted(
    call: Callable[[], object], nth: int, *, begin: Any = None, end: Any = None
) -> bool:
    """Call, with an interrupt at the nth line of this project's code. False if there are fewer.

    Lines count from the call of the function `begin` on, and until that of `end`.
    """
    num_lines, counts = 0, begin is None

    def at_line(frame: Any, event: str, arg: object) -> Any:
        nonlocal num_lines
        if event == "line" and counts:
            num_lines += 1
            if num_lines == nth:
                sys.settrace(None)
                raise KeyboardInterrupt
        return at_line

    def at_call(frame: Any, event: str, arg: object) -> Any:
        nonlocal counts
        counts |= begin is not None and frame.f_code is begin.__code__
        if end is not None and frame.f_code is end.__code__:
            sys.settrace(None)
        return at_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    return _is_interrupted(call, at_call)


def _is_interrupted(call: Callable[[], object], trace: Callable[..., Any]) -> bool:
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False
