"""Turns gradients off while the engine works on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Args = ParamSpec("Args")
Result = TypeVar("Result")


def without_grad(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """A function that runs without gradients and restores the mode of its caller's thread.

    `torch.no_grad` can leave gradients off after Ctrl-C: it is written in Python, and the exception
    may be raised in its `__exit__` before the mode is set. Python handles signals where a Python
    function begins and after a C function returns, so the C function in `finally` always runs.
    """

    @wraps(function)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return run
