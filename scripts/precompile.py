"""The command `nanovllm precompile` (`nanovllm/cli/precompile.py`), without installation."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.cli.main import run
from nanovllm.tools import command_line

if __name__ == "__main__":
    sys.exit(command_line.run(partial(run, "precompile", program="precompile.py")))
