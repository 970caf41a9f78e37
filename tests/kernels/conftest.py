"""Without Triton there is nothing of its kernels to test."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]
