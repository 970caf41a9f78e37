"""The package works when installed from a wheel, not only from the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_holds_everything_and_imports(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            ROOT,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, target], check=True)
    source = {
        path.relative_to(ROOT)
        for folder in ("compile", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {Path("nanovllm") / path for path in source} <= {
        path.relative_to(target) for path in target.rglob("*.py")
    }
    assert {"report_page.css", "report_page.js"} <= {
        path.name for path in (target / "nanovllm" / "tools").iterdir()
    }
    script = (
        "import nanovllm, nanovllm.kernels.ops, nanovllm.compile.program;"
        "from nanovllm.hub import resolve;"
        "assert nanovllm.__file__.startswith(__import__('sys').argv[1]), nanovllm.__file__;"
        "print(sorted(path.name for path in resolve('tiny-qwen3').iterdir()))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(target)]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", script, str(target)],
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout


def test_nothing_optional_is_imported() -> None:
    script = (
        "import sys, nanovllm;"
        "absent = ('triton', 'flash_attn', 'torch_npu', 'ray', 'fastapi')\n"
        "print([name for name in absent if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
