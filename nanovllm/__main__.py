"""python -m nanovllm: the command line (`nanovllm/cli/`)."""

import sys

from nanovllm.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
