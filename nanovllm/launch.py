"""Runs a module of the package, like `python -m`: `python launch.py MODULE ARGUMENTS`.

Python puts the folder of this file first in `sys.path` where `python -m` puts the working
directory. This file removes it before it imports anything but `os`, which Python has imported
already.
"""

import os
import sys

if __name__ == "__main__":
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder and folder != own]

    import runpy

    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
