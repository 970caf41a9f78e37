"""Draws docs/numbers.svg: the first table of docs/benchmarks.md as bars.

python scripts/draw_numbers.py
"""

from __future__ import annotations

import html
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE, TABLE = ROOT / "docs" / "numbers.svg", ROOT / "docs" / "benchmarks.md"
COLORS = ("#2b6cb0", "#a0aec0", "#b7c0cd", "#cbd2db")
LEFT, RIGHT, BAR, GAP, TOP, LONGEST = 190, 70, 15, 22, 46, 440


def rows() -> tuple[list[str], list[tuple[str, list[float]]]]:
    """The engines, and (workload, tokens per second of each engine) for each row of the table."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and "tok/s" in line)
    heads = [cell.strip() for cell in lines[first].strip("|").split("|")]
    engines = ["nanovllm", *heads[4:]]
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [float(re.sub(r"[*,]", "", cell)) for cell in (cells[1], *cells[4:])]
        found.append((cells[0].split(", 128")[0], numbers))
    return engines, found


def draw() -> str:
    """The picture as SVG. The same table gives the same text."""
    engines, workloads = rows()
    step = len(engines) * BAR + GAP
    width, height = LEFT + LONGEST + RIGHT, TOP + len(workloads) * step
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for i, engine in enumerate(engines):
        x = LEFT + i * 115
        lines += [
            f'<rect x="{x}" y="14" width="12" height="12" fill="{COLORS[i]}"/>',
            f'<text x="{x + 18}" y="24" fill="#234">{html.escape(engine)}</text>',
        ]
    lines.append('<text x="12" y="24" fill="#234">tokens per second</text>')
    for number, (workload, values) in enumerate(workloads):
        top = TOP + number * step
        middle = top + len(engines) * BAR / 2 + 4
        lines.append(
            f'<text x="{LEFT - 10}" y="{middle:g}" text-anchor="end" fill="#123">'
            f"{html.escape(workload)}</text>"
        )
        for i, value in enumerate(values):
            length, y = LONGEST * value / max(values), top + i * BAR
            lines += [
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" '
                f'fill="{COLORS[i]}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + 11}" fill="#345">{value:,.0f}</text>',
            ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
