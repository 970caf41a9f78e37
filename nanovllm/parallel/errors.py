"""Errors of ranks, as the process that started them raises them."""

from __future__ import annotations


class RankFailed(RuntimeError):
    """A rank has ended, hangs, or raised an error that the others did not.

    what: the rank's name and how it failed. details: texts of errors and output, which may contain
    paths and prompts.
    """

    def __init__(self, what: str, details: str = "") -> None:
        super().__init__(what, details)
        self.what, self.details = what, details

    def __str__(self) -> str:
        return self.what + self.details


class RankRefused(ValueError):
    """A rank refused user input: its name and the text of its ValueError."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.text = text

    def __str__(self) -> str:
        return ": ".join(self.args)


def without_name(error: Exception) -> Exception:
    """The error of a process that is the only rank: a user's mistake without its name."""
    return ValueError(error.text) if isinstance(error, RankRefused) else error
