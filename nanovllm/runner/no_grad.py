"""Decorators of what works on the device: without gradients, and in the group of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from nanovllm.kernels import collectives
from nanovllm.kernels.collectives import Communicator

Args = ParamSpec("Args")
Result = TypeVar("Result")


class OfRank(Protocol):
    """What has a group: None on one rank."""

    group: Communicator | None


Owner = TypeVar("Owner", bound=OfRank)


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


def in_group(
    method: Callable[Concatenate[Owner, Args], Result],
) -> Callable[Concatenate[Owner, Args], Result]:
    """A method without gradients whose steps communicate with the other ranks, if there are any."""

    @wraps(method)
    @without_grad
    def run(self: Owner, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        if self.group is None:
            return method(self, *args, **kwargs)
        with collectives.using(self.group):
            return method(self, *args, **kwargs)

    return run
