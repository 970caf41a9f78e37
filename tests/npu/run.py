"""Run pytest on tests/npu in an environment where torch_npu loads without an NPU:

    python tests/npu/run.py FOLDER [pytest's arguments]

FOLDER/site contains torch_npu, FOLDER/lib the libraries that replace CANN (see cann_stub/build.py).
`make test-npu` makes both. They are not in the virtual environment, because torch would load an
installed torch_npu in every test.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def problem() -> str:
    """Why these tests cannot run here; "" if they can."""
    if sys.platform != "linux":
        return "the tests of the NPU are left out: they run on Linux only"
    torch = importlib.util.find_spec("torch")
    folder = Path("" if torch is None or torch.origin is None else torch.origin).parent
    if (folder / "lib" / "libtorch_cuda.so").exists():
        return (
            "the tests of the NPU are left out: torch_npu needs torch's CPU build, since a CUDA "
            "build registers the same allocator options"
        )
    return ""


def environment(folder: Path) -> dict[str, str]:
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("torch is not installed here: make test-npu")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder / 'lib'}:{Path(torch.origin).parent / 'lib'}",
        "PYTHONPATH": f"{ROOT}:{folder / 'site'}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "NANOVLLM_CANN_STUB": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def main(folder: Path, arguments: list[str]) -> None:
    for name in ("site", "lib"):
        if not (folder / name).is_dir():
            raise SystemExit(f"{folder / name} is not there: make test-npu")
    given = any(
        not argument.startswith("-") and (ROOT / argument.split("::")[0]).exists()
        for argument in arguments
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        *([] if given else [str(ROOT / "tests" / "npu")]),
        *arguments,
    ]
    # the dynamic loader reads LD_LIBRARY_PATH when a process starts
    os.execve(sys.executable, command, environment(folder))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[1] == "--problem":
        print(problem())
        raise SystemExit
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
