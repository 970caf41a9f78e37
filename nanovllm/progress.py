"""Progress bars on stderr, which are drawn on terminals and in notebooks only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanovllm import env

if TYPE_CHECKING:
    from tqdm import tqdm

UseTqdm = bool | Callable[..., Any]  # True, False, or a function with tqdm's arguments


def bar(iterable: Any = None, *, disable: bool = False, **options: Any) -> tqdm[Any]:
    """A bar of tqdm, with the arguments of tqdm. It draws nothing unless `is_drawn`."""
    from tqdm import tqdm  # as slow as all other imports of the package

    options = {"dynamic_ncols": True, **options}
    return tqdm(iterable, disable=disable or not is_drawn(), **options)


def silent_class() -> Any:
    """A class of bars for libraries: one that draws nothing, or None (the library's own class)
    where bars are drawn."""
    if is_drawn():
        return None
    from tqdm.auto import tqdm as base

    class Silent(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def is_drawn() -> bool:
    """Whether stderr shows bars: a file or a pipe gets none, and neither does a user who has set
    tqdm's variable TQDM_DISABLE, as --quiet does."""
    return not env.hides_bars() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
