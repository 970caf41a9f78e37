"""python -m nanovllm: the command line (`nanovllm/cli/`)."""

import sys

from nanovllm.cli.main import main
from nanovllm.tools import command_line

if __name__ == "__main__":
    sys.exit(command_line.run(main))
