"""The command `nanovllm bench throughput` (`nanovllm/cli/bench/`), without installation.

python bench.py --random-weights Qwen3-0.6B --bs 256
"""

from __future__ import annotations

import sys
from functools import partial

from nanovllm.cli.main import run
from nanovllm.tools import command_line

if __name__ == "__main__":
    sys.exit(command_line.run(partial(run, "bench throughput", program="bench.py")))
