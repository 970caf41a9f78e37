"""Bytecode of installed packages where the installation has none. Does not import torch.

Some container images install packages without bytecode and set PYTHONDONTWRITEBYTECODE. Every
process that imports torch then compiles about a thousand files, for seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nanovllm import env
from nanovllm.kernels.private_files import UnsafePath, make_private

logger = logging.getLogger(__name__)
FOLDER = "bytecode"


def keep(store_folder: Callable[[], Path]) -> None:
    """Keep bytecode in the store if torch has none and Python may not write it next to torch.

    Applies to this process and those that it starts. Only our programs call it: other programs
    choose where Python writes. A PYTHONPYCACHEPREFIX set by the user stays. Nothing changes if the
    folder is not private or cannot be made.
    """
    if missing_in() is None or sys.pycache_prefix:
        return
    folder = store_folder() / FOLDER
    try:
        make_private(folder.parent, folder)
    except (OSError, UnsafePath) as error:
        logger.debug("bytecode is not kept: %s", error)
        return
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    env.keep_bytecode(folder)


def report_missing() -> None:
    """Log how to compile torch's Python files if they have no bytecode and Python cannot write
    it."""
    if (site := missing_in()) is not None:
        logger.info(
            "torch has no bytecode, so every start takes some seconds to compile it; "
            "to compile it once, run: %s -m compileall -q -j 0 %s", sys.executable, site,
        )  # fmt: skip


def missing_in() -> Path | None:
    """The folder of installed packages if torch has no bytecode there and its import would leave
    none."""
    torch = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    origin = None if torch is None else torch.origin
    if origin is None or os.path.exists(importlib.util.cache_from_source(origin)):
        return None
    site = Path(origin).parents[1]
    can_write = sys.pycache_prefix is not None or os.access(site, os.W_OK)
    return None if can_write and not sys.dont_write_bytecode else site
