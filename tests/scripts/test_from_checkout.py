"""Scripts run from a checkout without installation, from any working directory."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for place in (ROOT / "scripts", ROOT / "scripts" / "bench")
    for path in sorted(place.glob("*.py"))
    if "__main__" in path.read_text() and "nanovllm." in path.read_text()
]
# Python's -S hides all installed packages. The folders of this list are found again, but not a
# package that is installed as editable.
RUN = """
import runpy, sys
script, *packages = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
sys.path += packages
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(sys.modules["nanovllm"].__file__)
"""


def test_a_script_finds_the_package_beside_it(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "accuracy.py"
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    command = [sys.executable, "-S", "-E", "-c", RUN, str(script), *packages]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: accuracy.py")
    assert done.stdout.splitlines()[-1] == str(ROOT / "nanovllm" / "__init__.py")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_looks_for_it_there_first(script: Path) -> None:
    """To run them all would take a minute: most import torch."""
    places = {"Path": Path, "__file__": str(script), "ROOT": ROOT, "str": str}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        found = ast.unparse(node) if isinstance(node, ast.Call) else ""
        if found.startswith("sys.path.insert(0, "):
            assert eval(found.removeprefix("sys.path.insert(0, ")[:-1], places) == str(ROOT)
            return
    pytest.fail(f"{script} imports nanovllm from wherever it is installed")
