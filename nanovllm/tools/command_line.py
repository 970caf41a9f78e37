"""Exit of command-line tools: a user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from nanovllm.tools.terminal import printable

logger = logging.getLogger(__name__)

# The engine's errors for wrong options, models and files.
MISTAKES = (ValueError, TypeError, OSError)
STATUS = 2  # argparse's own, for arguments that it refuses


def run(main: Callable[[], int | None]) -> int:
    """Call a tool's `main` and return its exit status; None counts as 0.

    MISTAKES are printed in argparse's form; NANOVLLM_LOG_LEVEL=DEBUG adds the traceback. Other
    errors are bugs and are raised.
    """
    try:
        return main() or 0
    except MISTAKES as error:
        logger.debug("the error below was raised here", exc_info=True)
        # the text may quote a server, a file or an argument
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"{_program()}: error: {reason}", file=sys.stderr)
        return STATUS


def _program() -> str:
    """The script that runs, or the package that `python -m` runs."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name
