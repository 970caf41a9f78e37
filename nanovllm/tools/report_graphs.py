"""Drawings of a report's graphs: each region before and after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanovllm.tools.report_data import Node, RegionReport, Stage
from nanovllm.tools.report_format import OTHER, cut, kind, tabs, text

WIDTH, HEIGHT = 200, 42  # of a box
ACROSS, DOWN = 380, 62  # from one box to the next


class _Box(NamedTuple):
    x: int
    y: int


def graphs(regions: Sequence[RegionReport]) -> str:
    """A tab per region, the one with the largest share of the step first."""
    order = sorted(regions, key=lambda region: -region.times * region.seconds)
    return tabs([(region.name, _stages(region)) for region in order])


def _stages(region: RegionReport) -> str:
    """A tab per pass, and a first one for all passes together."""
    if not region.stages:
        return ""
    first, last = region.stages[0], region.stages[-1]
    pairs = [("all passes", first, last)] if len(region.stages) > 2 else []
    adjacent = zip(region.stages, region.stages[1:])
    pairs += [(_stage_name(after), before, after) for before, after in adjacent]
    panes = []
    for name, before, after in pairs:
        changed = before.shapes_and_calls() != after.shapes_and_calls()
        note = f"{len(before.nodes)} → {len(after.nodes)}" if changed else "no change"
        drawings = _drawing(before, after, "gone")
        if changed:
            drawings += _drawing(after, before, "new")
        codes = _code(before) + _code(after)
        panes.append((f"{name} · {note}", f'<div class="pair">{drawings}</div>{codes}'))
    return tabs(panes)


def _stage_name(stage: Stage) -> str:
    return stage.name.partition("_")[2].replace("_", " ")


def _code(stage: Stage) -> str:
    summary = f"<summary>{text(_stage_name(stage))}, as code</summary>"
    return f"<details>{summary}<pre>{text(stage.code)}</pre></details>"


def _drawing(stage: Stage, other: Stage, mark: str) -> str:
    """A graph from top to bottom: a call's row is the longest path to it. Calls that the other
    stage does not have get the class `mark`."""
    depth: dict[str, int] = {}
    rows: dict[int, list[str]] = {}
    for node in stage.nodes:
        above = [depth[parent] for parent in node.parents if parent in depth]
        depth[node.name] = max(above, default=-1) + 1
        rows.setdefault(depth[node.name], []).append(node.name)
    boxes: dict[str, _Box] = {}
    for level, names in rows.items():
        boxes |= {name: _Box(8 + i * ACROSS, 8 + level * DOWN) for i, name in enumerate(names)}
    others = other.shapes_and_calls()
    edges = drawn = ""
    for node in stage.nodes:
        box = boxes[node.name]
        edges += "".join(_edge(boxes[parent], box) for parent in node.parents if parent in boxes)
        drawn += _node(node, box, "" if node.call in others else mark)
    wide = max(map(len, rows.values()), default=1) * ACROSS + 8
    high = len(rows) * DOWN or DOWN
    size = f'width="{wide}" height="{high}" viewBox="0 0 {wide} {high}"'
    return f"<svg {size}>{edges}{drawn}</svg>"


def _node(node: Node, box: _Box, mark: str) -> str:
    x, y = box
    colour = kind(node.label)[1] if node.ours else OTHER[1]
    reads = ", ".join(node.inputs)
    tip = text(f"{node.name} = {node.label}({reads})")
    label, shapes = text(cut(node.label, 26)), text(cut(node.shapes, 29))
    return (
        f'<g class="{mark}"><title>{tip}</title>'
        f'<rect class="box" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff" '
        f'stroke="{colour}"/>'
        f'<rect x="{x}" y="{y}" width="6" height="{HEIGHT}" rx="3" fill="{colour}"/>'
        f'<text x="{x + 14}" y="{y + 17}" font-weight="600">{label}</text>'
        f'<text class="soft" x="{x + 14}" y="{y + 33}">{shapes}</text>'
        f'<text class="soft" x="{x + WIDTH + 8}" y="{y + 25}">{text(cut(reads, 25))}</text></g>'
    )


def _edge(parent: _Box, child: _Box) -> str:
    x1, y1, x2, y2 = parent.x + 40, parent.y + HEIGHT, child.x + 40, child.y
    if y2 - y1 > DOWN:  # calls lie in between: pass them on the left
        bend = min(x1, x2) - 36
        path = f"M{x1 - 20},{y1} C{bend},{y1 + 40} {bend},{y2 - 40} {x2 - 20},{y2}"
    else:
        path = f"M{x1},{y1} C{x1},{(y1 + y2) / 2} {x2},{(y1 + y2) / 2} {x2},{y2}"
    return f'<path d="{path}" fill="none" stroke="#aab4c0" stroke-width="1.4"/>'
