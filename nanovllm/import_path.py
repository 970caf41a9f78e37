"""Where `python -m nanovllm` imports from. This file imports only what Python has at its start."""

import os
import sys


def begins_with_working_directory() -> bool:
    """Whether `python -m nanovllm` is starting and would import from the working directory first.

    Not if this package is there: a checkout runs without installation.
    """
    # While Python looks for the module of -m, sys.argv[0] is still "-m".
    if not sys.argv or sys.argv[0] != "-m" or getattr(sys.flags, "safe_path", False):
        return False
    name = sys.orig_argv[-len(sys.argv)]  # "nanovllm" or "-mnanovllm"; the arguments follow it
    if name != "nanovllm" and not (name.startswith("-") and name.endswith("mnanovllm")):
        return False
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return bool(sys.path) and sys.path[0] in ("", os.getcwd()) and root != os.getcwd()
