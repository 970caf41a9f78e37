"""The package can be installed: as a wheel, on every Python version that it names, or it says why
not."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from nanovllm.cli import serve
from nanovllm.hub import EMBEDDED

ROOT = Path(__file__).parent.parent
CLASSIFIER = "Programming Language :: Python :: 3."


def setup_options() -> dict[str, Any]:
    """The literal arguments of `setup` in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (setup,) = (call for call in calls if ast.unparse(call.func) == "setup")
    found: dict[str, Any] = {}
    for keyword in setup.keywords:
        if keyword.arg not in (None, "long_description", "project_urls"):
            found[keyword.arg] = ast.literal_eval(keyword.value)
    return found


OPTIONS = setup_options()
VERSIONS = [
    name.rpartition(" ")[2] for name in OPTIONS["classifiers"] if name.startswith(CLASSIFIER)
]


def pins(python: str) -> Iterator[Requirement]:
    """The lines of constraints.txt that apply to a version of Python."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                yield pin


def required(python: str) -> list[Requirement]:
    """What the package and its tests require on Linux with a version of Python."""
    environment = {"python_version": python, "platform_system": "Linux"}
    lines = [*OPTIONS["install_requires"], *OPTIONS["extras_require"]["test"]]
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


@pytest.mark.parametrize("python", VERSIONS)
def test_each_package_has_one_pin_for_a_version_of_python(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in pins(python)]
    assert len(names) == len(set(names))
    (transformers,) = (pin for pin in pins(python) if pin.name == "transformers")
    assert str(transformers.specifier).startswith("==")


@pytest.mark.parametrize("python", VERSIONS)
def test_pins_are_what_the_package_requires(python: str) -> None:
    wanted = {canonicalize_name(one.name): one.specifier for one in required(python)}
    for pin in pins(python):
        (exact,) = pin.specifier
        assert exact.version in wanted.get(canonicalize_name(pin.name), SpecifierSet()), str(pin)


@pytest.mark.parametrize("python", VERSIONS)
def test_pinned_packages_allow_the_version_of_python(python: str) -> None:
    """Checked for the packages that are installed here in their pinned versions. The other lines
    are av 17.1.0, compressed-tensors 0.19.0, numpy 2.2.6, pillow 12.3.0 and transformers 5.20.2,
    which PyPI offers for Python 3.10 and later."""
    for pin in pins(python):
        try:
            found = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(found.version).public in pin.specifier:
            allowed = SpecifierSet(found.metadata.get("Requires-Python") or "")
            assert f"{python}.9" in allowed, f"{pin} allows Python {allowed}"


def test_the_oldest_python_is_the_same_everywhere() -> None:
    """pip, ruff, mypy and readers are told the versions of the classifiers."""
    oldest = VERSIONS[0]
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert OPTIONS["python_requires"] == f">={oldest}"
    assert f'target-version = "py{oldest.replace(".", "")}"' in settings
    assert f'python_version = "{oldest}"' in settings
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"Python (3\.10.*)", readme)
    assert re.findall(r"3\.\d+", line) == VERSIONS


@pytest.fixture
def without_links(tmp_path: Path) -> Path:
    """A copy of the files that git leaves where it makes no symlinks."""
    folder = tmp_path / "copy"
    (folder / "nanovllm").mkdir(parents=True)
    modules = (f"nanovllm/{name}.py" for name in ("__init__", "checkout", "import_path"))
    for name in ("setup.py", "README.md", *modules):
        shutil.copy(ROOT / name, folder / name)
    for name in ("compile", "kernels"):
        (folder / name).mkdir()
        (folder / "nanovllm" / name).write_text(f"../{name}")
    return folder


@pytest.mark.parametrize("command", [["-c", "import nanovllm"], ["setup.py", "--version"]])
def test_a_copy_without_symlinks_says_what_to_do(without_links: Path, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=without_links, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"nanovllm/compile and nanovllm/kernels in {without_links} must be links" in last
    assert "git config core.symlinks true" in last
    for name in ("compile", "kernels"):
        (without_links / "nanovllm" / name).unlink()
        (without_links / "nanovllm" / name).symlink_to(f"../{name}")
    script = "import runpy; print(repr(runpy.run_path('nanovllm/checkout.py')['problem']()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=without_links, capture_output=True, text=True
    )
    assert done.stdout.strip() == "''"


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
        "from nanovllm.hub import EMBEDDED, resolve;"
        "assert nanovllm.__file__.startswith(__import__('sys').argv[1]), nanovllm.__file__;"
        "[print(name, sorted(path.name for path in resolve(name).iterdir())) for name in EMBEDDED]"
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
    for name in EMBEDDED:
        assert re.search(rf"^{name} .*'model.safetensors'", done.stdout, re.MULTILINE)


def test_nothing_optional_is_imported() -> None:
    script = (
        "import sys, nanovllm;"
        "absent = ('triton', 'flash_attn', 'torch_npu', 'ray', 'fastapi', 'PIL', 'av')\n"
        "print([name for name in absent if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_serve_asks_for_the_packages_of_its_extra() -> None:
    extra = [Requirement(line).name for line in OPTIONS["extras_require"]["serve"]]
    assert sorted(extra) == sorted(serve.NEEDED)


def test_all_folders_with_code_are_packages() -> None:
    found = {
        path.relative_to(ROOT).parent.parts
        for folder in ("nanovllm", "compile", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    names = {
        ".".join(("nanovllm", *(one for one in parts if one != "nanovllm"))) for parts in found
    }
    assert set(OPTIONS["packages"]) == names


def copy_of_tree(folder: Path) -> Path:
    """The files that git has, in a folder that packaging may fill."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def test_a_source_distribution_has_all_tests_and_links_that_work(tmp_path: Path) -> None:
    tree = copy_of_tree(tmp_path / "tree")
    (tree / ".git").mkdir()
    config = '[remote "origin"]\n\turl = git@example.org:team/nanovllm.git\n'
    (tree / ".git" / "config").write_text(config)
    script = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tree, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
        (info,) = (one for one in content.getmembers() if one.name.count("/") == 1
                   and one.name.endswith("/PKG-INFO"))  # fmt: skip
        text = content.extractfile(info).read().decode()  # type: ignore[union-attr]
    tests = {str(path.relative_to(tree)) for path in (tree / "tests").rglob("*") if path.is_file()}
    assert tests <= names and {"constraints.txt", "Makefile", "docs/shapes.png"} <= names
    assert "Project-URL: Source, https://example.org/team/nanovllm" in text
    assert "License-Expression: MIT" in text and "Keywords: " in text
    assert "(https://example.org/team/nanovllm/raw/HEAD/docs/numbers.svg)" in text
    assert "(https://example.org/team/nanovllm/blob/HEAD/docs/tutorial.md)" in text
    assert not re.search(r"\]\((?!https?:|#)", text)
