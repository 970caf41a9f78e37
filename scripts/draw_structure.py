"""Draws docs/structure.svg: the folders of the code, and their imports.

python scripts/draw_structure.py

A folder stands right below the folders that import it. Arrows that follow from others are omitted.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "structure.svg"
ROLES = {
    "cli": "the command nanovllm",
    "api": "OpenAI's HTTP API",
    "serving": "an engine for many tasks",
    "llm": "prompts in, texts out",
    "batch": "a file of prompts",
    "compat": "names of vLLM, nano-vllm",
    "replicas": "several engines as one",
    "engine": "requests, step by step",
    "pooling": "embeddings, scores",
    "tools": "report, profile, cache",
    "startup": "choose, load, build",
    "runner": "owns the device",
    "media": "images, videos",
    "structured": "grammars, masks",
    "models": "architectures, weights",
    "schedule": "which tokens run next",
    "platforms": "CUDA, CPU, NPU, MPS",
    "parallel": "ranks, collectives",
    "parsers": "tool calls, reasoning",
    "compile": "graphs to programs",
    "kernels": "ops and their meaning",
}
WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 56, 30, 46


def room_of(module: str) -> str | None:
    """The folder of our module; None for settings and for other modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nanovllm" and len(parts) > 1 and parts[1] in ROLES else None


def imports() -> dict[str, set[str]]:
    """The folders that the files of each folder import, at any depth of a file."""
    found: dict[str, set[str]] = {room: set() for room in ROLES}
    for room in ROLES:
        folder = ROOT / room if room in ("compile", "kernels") else ROOT / "nanovllm" / room
        for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    found[room] |= {one for name in names if (one := room_of(name))} - {room}
    return found


def depth(room: str, edges: dict[str, set[str]]) -> int:
    """The length of the longest chain of imports that leads to a folder."""
    above = (depth(other, edges) for other in edges if room in edges[other])
    return 1 + max(above, default=-1)


def reached(room: str, edges: dict[str, set[str]]) -> set[str]:
    return edges[room].union(*(reached(below, edges) for below in edges[room]))


def draw() -> str:
    """The picture as SVG. The same imports give the same text."""
    edges = imports()
    direct = {
        room: below - set().union(*(reached(one, edges) for one in below))
        for room, below in edges.items()
    }
    levels: dict[int, list[str]] = {}
    for room in ROLES:
        levels.setdefault(depth(room, edges), []).append(room)
    columns, bottom = max(map(len, levels.values())), max(levels)
    width = columns * (WIDTH + GAP_X) + GAP_X
    place: dict[str, tuple[float, int]] = {}
    for number, rooms in sorted(levels.items()):
        above = [place[other][0] for other in place if rooms[0] in direct[other]]
        left = (width - len(rooms) * (WIDTH + GAP_X) + GAP_X) / 2
        if len(rooms) == 1 and above:  # a single folder stands between those that import it
            left = sum(above) / len(above)
        for i, room in enumerate(rooms):
            place[room] = left + i * (WIDTH + GAP_X), GAP_Y + number * (HEIGHT + GAP_Y)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{(bottom + 1) * (HEIGHT + GAP_Y) + GAP_Y}" font-family="sans-serif">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for room, below in direct.items():
        for one in sorted(below):
            (x1, y1), (x2, y2) = place[room], place[one]
            lines.append(
                f'<line x1="{x1 + WIDTH / 2:g}" y1="{y1 + HEIGHT}" x2="{x2 + WIDTH / 2:g}" '
                f'y2="{y2}" stroke="#667" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in place.items():
        middle = x + WIDTH / 2
        lines += [
            f'<rect x="{x:g}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#eef3fb" '
            'stroke="#456"/>',
            f'<text x="{middle:g}" y="{y + 24}" text-anchor="middle" font-weight="bold" '
            f'font-size="15" fill="#123">{room}</text>',
            f'<text x="{middle:g}" y="{y + 43}" text-anchor="middle" font-size="12" '
            f'fill="#345">{ROLES[room]}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
