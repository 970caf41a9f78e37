"""No version with a known advisory is installed: neither by setup.py nor by constraints.txt.

advisories.json has the advisories that matter for the oldest versions that setup.py permits: the
package, the first safe version, the id, and what it is about. "accepted" has those whose versions
stay permitted because the code that they are about is never reached; a test holds the reason.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_packaging import OPTIONS, VERSIONS, pins

ROOT = Path(__file__).parent.parent


class Advisory(NamedTuple):
    package: str
    safe: Version
    id: str
    what: str


def read(kind: str) -> list[Advisory]:
    entries: dict[str, list[dict[str, Any]]] = json.loads(
        (ROOT / "tests" / "advisories.json").read_text(encoding="utf-8")
    )
    return [Advisory(**{**one, "safe": Version(one["safe"])}) for one in entries[kind]]


AVOIDED, ACCEPTED = read("avoided"), read("accepted")
PACKAGES = {one.package for one in (*AVOIDED, *ACCEPTED)}


def required() -> list[tuple[str, Requirement]]:
    """All requirements of setup.py and of its build, and the name of their list."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (build,) = re.findall(r"^requires = (\[.*\])$", project, re.MULTILINE)
    lists = {
        "install_requires": OPTIONS["install_requires"],
        "build-system": ast.literal_eval(build),
        **OPTIONS["extras_require"],
    }
    return [(name, Requirement(line)) for name, lines in lists.items() for line in lines]


def floor(requirement: Requirement) -> Version:
    """The oldest version that is permitted."""
    found = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    return max(found, default=Version("0"))


@pytest.mark.parametrize("advisory", AVOIDED, ids=lambda one: f"{one.package} {one.id}")
def test_no_version_with_an_advisory_is_permitted(advisory: Advisory) -> None:
    for name, requirement in required():
        if canonicalize_name(requirement.name) == advisory.package:
            assert floor(requirement) >= advisory.safe, f"{name}: {requirement}"


@pytest.mark.parametrize("python", VERSIONS)
def test_no_version_with_an_advisory_is_pinned(python: str) -> None:
    for pin in pins(python):
        (exact,) = pin.specifier
        for advisory in (*AVOIDED, *ACCEPTED):
            if canonicalize_name(pin.name) == advisory.package:
                assert Version(exact.version) >= advisory.safe, f"{pin}: {advisory.id}"


def test_the_list_is_about_packages_that_are_required() -> None:
    assert {canonicalize_name(one.name) for _, one in required()} >= PACKAGES
    ids = [(one.package, one.id) for one in (*AVOIDED, *ACCEPTED)]
    assert len(ids) == len(set(ids))


def test_the_code_of_accepted_advisories_is_not_reached() -> None:
    assert {one.id for one in ACCEPTED} == {"CVE-2025-3000", "CVE-2026-59890"}
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    assert {line.split()[0] for line in lines} == {"include", "recursive-include"}
    for folder in ("nanovllm", "compile", "kernels", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) != "torch.jit", path
