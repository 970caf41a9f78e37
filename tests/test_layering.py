"""Imports point from upper layers to lower ones, and few files name a device."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanovllm"

# The modules of ours that files of a layer may import, at any depth of the file.
SETTINGS = tuple(
    f"nanovllm.{name}"
    for name in (
        "checks",
        "config",
        "env",
        "extras",
        "hub",
        "log",
        "lora_request",
        "pooling_params",
        "programs",
        "progress",
        "sampling",
    )
)
BELOW_STARTUP = tuple(
    f"nanovllm.{name}"
    for name in ("kernels", "compile", "models", "platforms", "parallel", "schedule", "runner")
)
ALLOWED = {
    "kernels": ("nanovllm.kernels",),
    "compile": ("nanovllm.compile", "nanovllm.kernels"),
    "models": ("nanovllm.models", "nanovllm.kernels"),
    "platforms": ("nanovllm.platforms", "nanovllm.compile", "nanovllm.kernels"),
    "media": (
        "nanovllm.media",
        "nanovllm.confined",
        "nanovllm.env",
        "nanovllm.extras",
        "nanovllm.programs",
    ),
    "parsers": ("nanovllm.parsers",),
    "structured": (
        "nanovllm.structured",
        "nanovllm.structured_params",
        "nanovllm.checks",
        "nanovllm.confined",
        "nanovllm.env",
        "nanovllm.extras",
        "nanovllm.programs",
        "nanovllm.sampling",
        "nanovllm.tokenizer",
    ),
    "parallel": (
        "nanovllm.parallel",
        "nanovllm.env",
        "nanovllm.programs",
        "nanovllm.kernels.peers",
    ),
    "schedule": (
        "nanovllm.schedule",
        "nanovllm.checks",
        "nanovllm.sampling",
        "nanovllm.tokenizer",
        "nanovllm.wire",
    ),
    "runner": (
        "nanovllm.runner",
        "nanovllm.schedule.edit_limits",
        "nanovllm.schedule.plan",
        "nanovllm.schedule.draft_length",
        "nanovllm.schedule.pace",
        "nanovllm.schedule.prefill_latency_bound",
        "nanovllm.models",
        "nanovllm.platforms",
        "nanovllm.parallel",
        "nanovllm.compile",
        "nanovllm.kernels.collectives",
        "nanovllm.kernels.ops",
        "nanovllm.kernels.reference",
        "nanovllm.wire",
    ),
    "startup": (
        "nanovllm.startup",
        *BELOW_STARTUP,
        "nanovllm.media.settings",
        *SETTINGS,
        "nanovllm.speculative",
        "nanovllm.tokenizer",
    ),
    "engine": (
        "nanovllm.engine",
        "nanovllm.schedule",
        "nanovllm.runner",
        "nanovllm.models.experts.offloaded",
        "nanovllm.models.vision",
        "nanovllm.media",
        "nanovllm.structured",
        "nanovllm.structured_params",
        "nanovllm.startup.load",
        "nanovllm.prompts",
        "nanovllm.tokenizer",
        *SETTINGS,
    ),
    "pooling": (
        "nanovllm.pooling",
        *BELOW_STARTUP,
        "nanovllm.startup",
        "nanovllm.engine",
        "nanovllm.media.mm_inputs",
        "nanovllm.prompts",
        "nanovllm.tokenizer",
        *SETTINGS,
    ),
    "tools": ("nanovllm.tools", *BELOW_STARTUP, "nanovllm.startup", "nanovllm.engine", *SETTINGS),
    "batch": (
        "nanovllm.batch",
        "nanovllm.engine",
        "nanovllm.prompts",
        "nanovllm.chat",
        "nanovllm.models.lora.peft_config",
        "nanovllm.schedule",
        "nanovllm.startup",
        "nanovllm.replicas.cluster",
        "nanovllm.replicas.engine_factory",
        "nanovllm.tokenizer",
        *SETTINGS,
    ),
    "replicas": (
        "nanovllm.replicas",
        *BELOW_STARTUP,
        "nanovllm.startup",
        "nanovllm.engine",
        "nanovllm.pooling",
        "nanovllm.media.mm_inputs",
        "nanovllm.prompts",
        "nanovllm.tokenizer",
        "nanovllm.wire",
        *SETTINGS,
    ),
    "serving": (
        "nanovllm.serving",
        "nanovllm.replicas",
        "nanovllm.parallel",
        "nanovllm.schedule",
        "nanovllm.engine",
        "nanovllm.output_stream",
        "nanovllm.media",
        "nanovllm.outputs",
        "nanovllm.pooling_outputs",
        "nanovllm.prompts",
        "nanovllm.tokenizer",
        *SETTINGS,
    ),
    "api": (
        "nanovllm.api",
        "nanovllm.parsers",
        "nanovllm.serving",
        "nanovllm.structured_params",
        "nanovllm.structured.structural_tag",
        "nanovllm.schedule.logprobs",
        "nanovllm.media.mm_inputs",
        "nanovllm.models.lora.peft_config",
        "nanovllm.chat",
        "nanovllm.engine.metrics",
        "nanovllm.open_files",
        "nanovllm.outputs",
        "nanovllm.pairs",
        "nanovllm.prompts",
        "nanovllm.templates",
        "nanovllm.tokenizer",
        "nanovllm.__version__",
        *SETTINGS,
    ),
    "compat": ("nanovllm",),
    "cli": ("nanovllm",),
    "": ("nanovllm",),  # files at the top of the package
}
FOLDERS = {"kernels": ROOT / "kernels", "compile": ROOT / "compile", "": PACKAGE}
FOLDERS |= {name: PACKAGE / name for name in ALLOWED if name and name not in FOLDERS}
MODULES = {
    ".".join(("nanovllm", *path.relative_to(root).with_suffix("").parts))
    for root, folder in ((PACKAGE, PACKAGE), (ROOT, ROOT / "compile"), (ROOT, ROOT / "kernels"))
    for path in folder.rglob("*.py")
}
DEVICE = re.compile(r"(?<![a-z])(cuda|npu|mps)(?![a-z])", re.IGNORECASE)
# layers whose code names no device
DEVICELESS = (
    "api", "compile", "engine", "media", "models", "parallel", "parsers", "pooling", "replicas",
    "schedule", "serving", "runner", "startup", "",
)  # fmt: skip
# options of `LLM` that are named after their device
OPTIONS = ("npu_graph_mode", "npu_graph_options")
# modules that import nothing of ours except each other
LIGHT = (
    "checks", "config", "option_names", "env", "flag_file", "flags", "kernels/private_files",
    "log", "media/options", "pooling_params", "programs", "progress", "ray_note", "sampling",
    "speculative", "structured_params", "tuning", "typos",
)  # fmt: skip


def files(layer: str) -> list[Path]:
    found = FOLDERS[layer].glob("*.py") if layer == "" else FOLDERS[layer].rglob("*.py")
    return sorted(found)


def all_files() -> list[Path]:
    return [path for layer in FOLDERS for path in files(layer)]


def imports(path: Path) -> Iterator[str]:
    """Names of all modules that a file imports; `from a import b` gives a.b.

    A string that names a module of ours counts: code imports it by name, or a process runs it.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and str(node.value) in MODULES:
            yield str(node.value)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_layers_are_found() -> None:
    assert all(len(files(layer)) > 2 for layer in FOLDERS)


@pytest.mark.parametrize("layer", FOLDERS)
def test_imports_point_one_way(layer: str) -> None:
    for path in files(layer):
        for name in imports(path):
            if is_within(name, "nanovllm"):
                assert any(is_within(name, package) for package in ALLOWED[layer]), (
                    f"{path} imports {name}"
                )


def test_the_interface_of_models_knows_no_architecture() -> None:
    names = ("config", "formats", "layer_state", "param", "region_inputs", "schemes")
    below = [f"nanovllm.models.{name}" for name in names]
    for name in imports(PACKAGE / "models" / "model.py"):
        assert not is_within(name, "nanovllm") or any(is_within(name, one) for one in below), name


def test_nothing_imports_the_top_of_the_package_from_below() -> None:
    for layer in set(FOLDERS) - {"", "cli"}:
        for path in files(layer):
            for name in imports(path):
                assert not is_within(name, "nanovllm.llm"), f"{path} imports {name}"
                assert name not in ("nanovllm", "nanovllm.LLM", "nanovllm.SamplingParams"), (
                    f"{path} imports {name}"
                )


def test_options_and_environment_import_nothing_heavy() -> None:
    for stem in LIGHT:
        for name in imports(PACKAGE / f"{stem}.py"):
            assert name.split(".")[0] not in ("torch", "transformers", "numpy"), (
                f"{stem}.py imports {name}"
            )
            if is_within(name, "nanovllm"):
                light = [f"nanovllm.{one.replace('/', '.')}" for one in LIGHT]
                of_light = name in light or name.rpartition(".")[0] in light
                assert of_light or name == "nanovllm.env", f"{stem}.py imports {name}"


@pytest.mark.parametrize("root", ["nanovllm", "tests", "scripts", "."])
def test_kernels_and_compile_are_imported_through_the_package_only(root: str) -> None:
    paths = (ROOT / root).glob("*.py") if root == "." else (ROOT / root).rglob("*.py")
    for path in paths:
        for name in imports(path):
            assert name.split(".")[0] not in ("kernels", "compile"), (
                f"{path} imports {name}: a second copy would load"
            )


def test_only_env_reads_the_environment() -> None:
    for path in all_files():
        if path.name == "env.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            assert not is_environ, f"{path}:{getattr(node, 'lineno', 0)} reads the environment"


def code_strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names, attributes and string constants, except docstrings and messages of errors."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            skipped.add(id(body[0].value))
        if isinstance(node, ast.Raise) and node.exc is not None:
            skipped.update(id(child) for child in ast.walk(node.exc))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_only_platforms_kernels_and_lowerings_know_devices() -> None:
    """And the file of HCCL, which torch has no name for."""
    for layer in DEVICELESS:
        for path in files(layer):
            if path.is_relative_to(ROOT / "compile" / "lower") or path.name == "hccl.py":
                continue
            for line, text in code_strings(ast.parse(path.read_text(encoding="utf-8"))):
                assert text in OPTIONS or not DEVICE.search(text), f"{path}:{line}: {text}"


def test_the_picture_of_the_numbers_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    picture = importlib.import_module("draw_numbers")
    text = picture.PICTURE.read_text(encoding="utf-8")
    assert text == picture.draw(), "run python scripts/draw_numbers.py"


def test_the_picture_of_the_structure_shows_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    picture = importlib.import_module("draw_structure")
    assert set(picture.ROLES) == {*FOLDERS, "llm", "engine"} - {""}, "every room is drawn"
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(), (
        "run python scripts/draw_structure.py"
    )


def module_imports() -> dict[str, set[str]]:
    """The modules of ours that each module imports, also for types or inside a function."""
    modules = {name.removesuffix(".__init__") for name in MODULES}
    found: dict[str, set[str]] = {}
    for path in all_files():
        root = ROOT if path.relative_to(ROOT).parts[0] in ("compile", "kernels") else PACKAGE
        parts = path.relative_to(root).with_suffix("").parts
        below = found[".".join(("nanovllm", *parts)).removesuffix(".__init__")] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    below.add(full if full in modules else str(node.module))
    return {name: below & found.keys() for name, below in found.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of `edges` that lead to a circle; [] without one."""
    left = dict(edges)
    while ended := [node for node, below in left.items() if not (below - {node}) & left.keys()]:
        for node in ended:
            del left[node]
    return sorted(left)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(module_imports()) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    """A file at the top of the package is a room as well."""
    rooms: dict[str, set[str]] = {}
    for name, below in module_imports().items():
        own, *others = (f"{one}.".split(".")[1] for one in (name, *sorted(below)))
        rooms.setdefault(own, set()).update(others)
    rooms.pop("")  # the package itself exports what users import
    assert circle(rooms) == []
