"""Kernels run on the GPU where there is one, else in Triton's interpreter, which has to be asked for before the import."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]
