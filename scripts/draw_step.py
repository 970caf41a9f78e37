"""Draws docs/step.svg: two layers of a decode step as one kernel, multiprocessors by time.

python scripts/bench/persistent_step.py --models 0.6b --rows 1 --out step.json
python scripts/draw_step.py step.json "0.6b 1"
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.tools import command_line

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "step.svg"
WAIT = "#e25c4a"
COLORS = {
    "product qkv": "#2b6cb0", "attend keys": "#38a169", "merge": "#d69e2e",
    "product out": "#63b3ed", "product gate_up": "#553c9a", "product down": "#9f7aea",
}  # fmt: skip
LEFT, TOP, BAR, EVERY = 40, 44, 7, 4  # one of EVERY multiprocessors is drawn
WIDTH = 1000


def draw(timeline: dict[str, Any]) -> str:
    """The picture as SVG."""
    programs = timeline["programs"][::EVERY]
    end = max(task[-1] for tasks in programs for task in tasks)
    scale, height = WIDTH / end, TOP + BAR * len(programs) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *legend(),
    ]
    for row, tasks in enumerate(programs):
        y = TOP + BAR * row
        for name, start, ready, finished in tasks:
            parts = ((start, ready, WAIT), (ready, finished, COLORS[name]))
            lines += [
                f'<rect x="{LEFT + begin * scale:.1f}" y="{y}" '
                f'width="{max(0.0, (to - begin) * scale):.1f}" height="{BAR - 1}" fill="{color}"/>'
                for begin, to, color in parts
            ]
    for at in range(0, int(end) + 1, 5):
        x = LEFT + at * scale
        lines.append(
            f'<text x="{x:.0f}" y="{height - 10}" text-anchor="middle" fill="#234">{at} µs</text>'
        )
    return "\n".join([*lines, "</svg>\n"])


def legend() -> list[str]:
    """The colours, from left to right."""
    lines = []
    for place, (name, color) in enumerate({"waits": WAIT, **COLORS}.items()):
        x = LEFT + place * 135
        lines += [
            f'<rect x="{x}" y="14" width="12" height="12" fill="{color}"/>',
            f'<text x="{x + 18}" y="24" fill="#234">{name}</text>',
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="of persistent_step.py")
    parser.add_argument("size", help="the name of a model and rows there")
    args = parser.parse_args()
    found = json.loads(args.results.read_text())[args.size]
    PICTURE.write_text(draw(found["timeline"]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
