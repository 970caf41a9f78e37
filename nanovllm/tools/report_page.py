"""The page of a `Report`: one file of HTML with its drawings, styles and script inside, and nothing to fetch."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.tools.report_data import Limits, Padding, Region, Report, Stage

# What a call is, by words in its name, and the colour that says so everywhere on the page.
KINDS = (
    ("attention", "attention", "#7c5cd6"),
    ("linear", "products", "#2f6fde"),
    ("mm", "products", "#2f6fde"),
    ("rope", "rotation, cache write", "#c7791c"),
    ("store", "rotation, cache write", "#c7791c"),
    ("norm", "norms, activation", "#17936f"),
    ("silu", "norms, activation", "#17936f"),
    ("sampl", "sampling", "#c4416f"),
)
OTHER = ("step, embedding, glue", "#78828f")

STYLE = """
:root { --ink: #1d2430; --soft: #5d6878; --line: #dfe4ea; --paper: #f6f7f9; --card: #fff; --bad: #c8352b; --good: #17936f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1290px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 80ch; }
.facts { color: var(--soft); } .facts b { color: var(--ink); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 20px 0 0; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card .number { font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .what { color: var(--soft); font-size: 13px; }
.panel { margin-top: 10px; overflow-x: auto; }
svg { display: block; } svg.fits { width: 100%; height: auto; }
svg text { font: 12px system-ui, "Segoe UI", sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .white { fill: #fff; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 10px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: var(--soft); font-size: 12.5px; cursor: pointer; white-space: nowrap; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); } td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr:last-child td { border-bottom: 0; } td.shape { color: var(--soft); font-size: 12.5px; white-space: normal; }
th.sorted::after { content: " \\2193"; }
.bar { display: inline-block; width: 90px; height: 9px; background: #e9edf2; border-radius: 5px; margin-left: 8px; }
.bar i { display: block; height: 9px; border-radius: 5px; max-width: 100%; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
.tabs { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0; }
.tabs button { font: inherit; font-size: 13px; padding: 4px 12px; border: 1px solid var(--line); border-radius: 16px;
  background: var(--card); color: var(--soft); cursor: pointer; }
.tabs button.on { background: var(--ink); color: #fff; border-color: var(--ink); }
.pair { display: flex; gap: 28px; align-items: flex-start; } .pair svg { flex: none; }
.gone rect.box { stroke: var(--bad); stroke-dasharray: 5 3; } .new rect.box { stroke: var(--good); stroke-width: 2.5; }
pre { overflow: auto; max-height: 460px; font: 12px/1.5 ui-monospace, Consolas, monospace; margin: 8px 0 0; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-top: 10px; }
@media (max-width: 800px) { .cards { grid-template-columns: repeat(2, 1fr); } }
@media print { .panel { break-inside: avoid; } }
"""

SCRIPT = """
document.querySelectorAll('.tabs').forEach(tabs => {
  const panes = [...tabs.parentElement.querySelectorAll(':scope > .pane')], buttons = [...tabs.children];
  buttons.forEach((button, i) => button.onclick = () => {
    panes.forEach((pane, j) => pane.hidden = i !== j);
    buttons.forEach((other, j) => other.classList.toggle('on', i === j));
  });
});
document.querySelectorAll('table.sortable th').forEach((head, column) => head.onclick = () => {
  const body = head.closest('table').tBodies[0];
  const value = row => { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent; };
  const numbers = !isNaN(value(body.rows[0]));
  [...body.rows].sort((a, b) => numbers ? value(b) - value(a) : value(a).localeCompare(value(b)))
    .forEach(row => body.append(row));
  head.parentElement.querySelectorAll('th').forEach(other => other.classList.toggle('sorted', other === head));
});
"""


def page(report: Report) -> str:
    """The whole page."""
    step = sum(
        region.times * sum(call.seconds for call in region.calls) for region in report.regions
    )
    limit = sum(
        region.times * sum(map(report.limits.seconds, region.calls)) for region in report.regions
    )
    num_bytes = sum(
        region.times * sum(call.num_bytes for call in region.calls) for region in report.regions
    )
    num_calls = sum(region.times * len(region.calls) for region in report.regions)
    facts = " &nbsp;·&nbsp; ".join(
        f"{_text(name)} <b>{_text(value)}</b>" for name, value in report.facts.items()
    )
    cards = [
        (_time(step), "one step: all its calls, back to back"),
        (
            _time(limit),
            f"what {report.limits.bandwidth / 1e9:,.0f} GB/s and {_flops(report.limits.flops)}/s allow",
        ),
        (f"{limit / step:.0%}" if step else "–", "share of the device's limit"),
        (f"{num_calls}", f"calls, {_bytes(num_bytes)} moved"),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{_text(report.title)}</title><style>{STYLE}</style></head><body><main>",
            f'<h1>{_text(report.title)}</h1><div class="facts">{facts}</div><div class="cards">',
            *(
                f'<div class="card"><div class="number">{number}</div><div class="what">{_text(what)}</div></div>'
                for number, what in cards
            ),
            "</div>",
            "<h2>Where a step's time goes</h2>",
            "<p>Every call in the order in which it runs, as wide as it takes. A layer is drawn once; the number under it says "
            "how often a step runs it.</p>",
            f'<div class="panel">{_timeline(report.regions)}{_legend(report.regions)}</div>',
            "<h2>Kernels</h2>",
            "<p>Each call alone, repeated on the same memory: what fits a cache of the device can be faster than its memory "
            "allows. Bytes are what a call must at least read and write. A click on a column sorts.</p>",
            f'<div class="panel">{_kernels(report.regions, report.limits)}</div>',
            "<h2>Graphs, before and after each pass</h2>",
            "<p>Boxes are calls; grey lines beside them, weights, state and constants that they read. "
            "Left before, right after: <span style='color:var(--bad)'>dashed red</span> goes, "
            "<span style='color:var(--good)'>green</span> is new.</p>",
            f'<div class="panel">{_graphs(report.regions)}</div>',
            "<h2>Padding</h2>",
            f"<p>Rows that a trace of batch sizes ({_text(report.trace_name)}) asks of each bucket, and rows that fill it. "
            f"Over all steps {_total_waste(report.padding):.1%} of the rows are padding.</p>",
            f'<div class="panel">{_padding(report.padding)}</div>',
            f"</main><script>{SCRIPT}</script></body></html>",
        ]
    )


# Time ----------------------------------------------------------------------------------------------------------------


def _timeline(regions: Sequence[Region], width: int = 1200) -> str:
    total = sum(sum(call.seconds for call in region.calls) for region in regions) or 1.0
    gap, x, out = 10.0, 0.0, []
    scale = (width - gap * (len(regions) - 1)) / total
    for region in regions:
        begin = x
        for call in region.calls:
            wide = call.seconds * scale
            tip = f"{call.op} {call.shapes}: {_time(call.seconds)}"
            out.append(
                f'<rect x="{x:.1f}" y="0" width="{max(wide - 1, 0.6):.1f}" height="54" rx="2" fill="{_kind(call.op)[1]}">'
                f"<title>{_text(tip)}</title></rect>"
            )
            if wide > 7 * len(call.op) + 6:
                out.append(
                    f'<text class="white" x="{x + wide / 2:.1f}" y="31" text-anchor="middle">{_text(call.op)}</text>'
                )
            x += wide
        seconds = sum(call.seconds for call in region.calls)
        name = region.name.split("_")[0]
        times = f" × {region.times}" if region.times > 1 else ""
        if x - begin > 70:
            out.append(f'<text x="{begin:.1f}" y="74">{_text(name)}{times}</text>')
            out.append(
                f'<text class="soft" x="{begin:.1f}" y="91">{_time(seconds)}{times and " each"}</text>'
            )
        x += gap
    return f'<svg class="fits" viewBox="0 0 {width} 98" role="img">{"".join(out)}</svg>'


def _legend(regions: Sequence[Region]) -> str:
    sums: dict[tuple[str, str], float] = {}
    for region in regions:
        for call in region.calls:
            sums[_kind(call.op)] = sums.get(_kind(call.op), 0.0) + region.times * call.seconds
    total = sum(sums.values()) or 1.0
    parts = [
        f'<span><i style="background:{colour}"></i>{name} {seconds / total:.0%}</span>'
        for (name, colour), seconds in sorted(sums.items(), key=lambda item: -item[1])
    ]
    return f'<div class="legend">{"".join(parts)}<span>(of the whole step)</span></div>'


def _kernels(regions: Sequence[Region], limits: Limits) -> str:
    heads = (
        "kernel",
        "result",
        "region",
        "times",
        "each",
        "in a step",
        "bytes",
        "flops",
        "limit",
        "share of limit",
    )
    rows = []
    for region in regions:
        for call in region.calls:
            limit = limits.seconds(call)
            share = limit / call.seconds if call.seconds else 0.0
            colour = _kind(call.op)[1]
            cells = [
                (None, f'<span class="dot" style="background:{colour}"></span>{_text(call.op)}'),
                (None, f"{_text(call.shapes)}"),
                (None, _text(region.name.split("_")[0])),
                (region.times, str(region.times)),
                (call.seconds, _time(call.seconds)),
                (call.seconds * region.times, _time(call.seconds * region.times)),
                (call.num_bytes, _bytes(call.num_bytes)),
                (call.flops, _flops(call.flops) if call.flops else "–"),
                (limit, _time(limit)),
                (
                    share,
                    f'{share:.0%}<span class="bar"><i style="width:{min(share, 1):.0%};background:{colour}"></i></span>',
                ),
            ]
            rows.append(
                "<tr>"
                + "".join(_cell(value, text, i == 1) for i, (value, text) in enumerate(cells))
                + "</tr>"
            )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(value: float | None, text: str, is_shape: bool) -> str:
    data = "" if value is None else f' data-value="{value}"'
    return f"<td{data}{' class=shape' if is_shape else ''}>{text}</td>"


# Graphs --------------------------------------------------------------------------------------------------------------


def _graphs(regions: Sequence[Region]) -> str:
    # the layer first: it is what most of a step runs
    order = sorted(
        regions, key=lambda region: -region.times * sum(call.seconds for call in region.calls)
    )
    buttons = "".join(
        f"<button{' class=on' if i == 0 else ''}>{_text(region.name)}</button>"
        for i, region in enumerate(order)
    )
    panes = "".join(
        f'<div class="pane"{"" if i == 0 else " hidden"}>{_stages(region)}</div>'
        for i, region in enumerate(order)
    )
    return f'<div class="tabs">{buttons}</div>{panes}'


def _stages(region: Region) -> str:
    if not region.stages:
        return ""
    first, last = region.stages[0], region.stages[-1]
    pairs = [("all passes", first, last)] if len(region.stages) > 2 else []
    pairs += [
        (_stage_name(after), before, after)
        for before, after in zip(region.stages, region.stages[1:])
    ]
    buttons, panes = [], []
    for i, (name, before, after) in enumerate(pairs):
        changed = before.shapes_and_calls() != after.shapes_and_calls()
        note = f"{len(before.nodes)} → {len(after.nodes)}" if changed else "no change"
        buttons.append(f"<button{' class=on' if i == 0 else ''}>{_text(name)} · {note}</button>")
        drawings = _drawing(before, after, "gone") + (
            _drawing(after, before, "new") if changed else ""
        )
        codes = "".join(
            f"<details><summary>{_text(_stage_name(stage))}, as code</summary><pre>{_text(stage.code)}</pre></details>"
            for stage in (before, after)
        )
        panes.append(
            f'<div class="pane"{"" if i == 0 else " hidden"}><div class="pair">{drawings}</div>{codes}</div>'
        )
    return f'<div><div class="tabs">{"".join(buttons)}</div>{"".join(panes)}</div>'


def _stage_name(stage: Stage) -> str:
    return stage.name.partition("_")[2].replace("_", " ")


@dataclass(frozen=True)
class _Box:
    x: float
    y: float


WIDTH, HEIGHT, ACROSS, DOWN = 200, 42, 380, 62


def _drawing(stage: Stage, other: Stage, mark: str) -> str:
    """Calls from top to bottom by how many lie before them, those side by side that are as deep; `mark`ed those that the
    other stage has not."""
    depth: dict[str, int] = {}
    columns: dict[int, list[str]] = {}
    for node in stage.nodes:
        depth[node.name] = max(
            (depth[parent] + 1 for parent in node.parents if parent in depth), default=0
        )
        columns.setdefault(depth[node.name], []).append(node.name)
    boxes = {
        name: _Box(8 + i * ACROSS, 8 + level * DOWN)
        for level, names in columns.items()
        for i, name in enumerate(names)
    }
    others = other.shapes_and_calls()
    edges, drawn = [], []
    for node in stage.nodes:
        box = boxes[node.name]
        for parent in node.parents:
            if parent in boxes:
                edges.append(_edge(boxes[parent], box))
        state = mark if node.call not in others else ""
        colour = _kind(node.label)[1] if node.ours else OTHER[1]
        reads = ", ".join(node.inputs)
        tip = f"{node.name} = {node.label}({reads})"
        drawn.append(
            f'<g class="{state}"><title>{_text(tip)}</title>'
            f'<rect class="box" x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff" '
            f'stroke="{colour}"/>'
            f'<rect x="{box.x}" y="{box.y}" width="6" height="{HEIGHT}" rx="3" fill="{colour}"/>'
            f'<text x="{box.x + 14}" y="{box.y + 17}" font-weight="600">{_text(_cut(node.label, 26))}</text>'
            f'<text class="soft" x="{box.x + 14}" y="{box.y + 33}">{_text(_cut(node.shapes, 29))}</text>'
            f'<text class="soft" x="{box.x + WIDTH + 8}" y="{box.y + 25}">{_text(_cut(reads, 25))}</text></g>'
        )
    wide = max((len(names) for names in columns.values()), default=1) * ACROSS + 8
    high = (max(columns, default=0) + 1) * DOWN
    return f'<svg width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">{"".join(edges)}{"".join(drawn)}</svg>'


def _edge(parent: _Box, child: _Box) -> str:
    x1, y1, x2, y2 = parent.x + 40, parent.y + HEIGHT, child.x + 40, child.y
    if y2 - y1 > DOWN:  # past calls in between: to the left of them
        bend = min(x1, x2) - 36
        path = f"M{x1 - 20},{y1} C{bend},{y1 + 40} {bend},{y2 - 40} {x2 - 20},{y2}"
    else:
        path = f"M{x1},{y1} C{x1},{(y1 + y2) / 2} {x2},{(y1 + y2) / 2} {x2},{y2}"
    return f'<path d="{path}" fill="none" stroke="#aab4c0" stroke-width="1.4"/>'


# Padding -------------------------------------------------------------------------------------------------------------


def _total_waste(padding: Sequence[Padding]) -> float:
    filled = sum(part.num_steps * part.bucket for part in padding)
    return 1 - sum(part.num_rows for part in padding) / filled if filled else 0.0


def _padding(padding: Sequence[Padding], width: int = 1200) -> str:
    most = max((part.num_steps * part.bucket for part in padding), default=1) or 1
    out = []
    for i, part in enumerate(padding):
        y, scale = i * 28, (width - 400) / most
        used, filled = part.num_rows * scale, part.num_steps * part.bucket * scale
        out.append(f'<text x="62" y="{y + 17}" text-anchor="end">{part.bucket}</text>')
        out.append(
            f'<rect x="74" y="{y + 4}" width="{filled:.1f}" height="18" rx="3" fill="#f0c9c5"/>'
        )
        out.append(
            f'<rect x="74" y="{y + 4}" width="{used:.1f}" height="18" rx="3" fill="#2f6fde"/>'
        )
        note = (
            f"{part.num_steps:,} steps, {part.waste:.0%} padding" if part.num_steps else "not used"
        )
        out.append(f'<text class="soft" x="{82 + filled:.1f}" y="{y + 17}">{note}</text>')
    height = len(padding) * 28 + 4
    legend = (
        '<div class="legend"><span><i style="background:#2f6fde"></i>rows asked for</span>'
        '<span><i style="background:#f0c9c5"></i>padding</span><span>one line a bucket</span></div>'
    )
    return f'<svg class="fits" viewBox="0 0 {width} {height}">{"".join(out)}</svg>{legend}'


# Words ---------------------------------------------------------------------------------------------------------------


def _kind(op: str) -> tuple[str, str]:
    """(kind, colour)."""
    return next(((name, colour) for word, name, colour in KINDS if word in op), OTHER)


def _text(text: str) -> str:
    return html.escape(text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _flops(count: float) -> str:
    for unit in ("flop", "Kflop", "Mflop", "Gflop"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} Tflop"
