"""Ctrl-C at a chosen line of this project's code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nanovllm

PACKAGE = str(Path(nanovllm.__file__).parent)


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

    sys.settrace(at_call)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False
