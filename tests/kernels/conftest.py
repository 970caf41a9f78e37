"""Without Triton its kernels cannot be imported, so their tests are not collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]
