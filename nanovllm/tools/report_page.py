"""The page of a `Report`: one file of HTML that contains its drawings, styles and script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanovllm.tools import report_format as fmt
from nanovllm.tools.device_limits import DeviceLimits
from nanovllm.tools.report_data import Padding, RegionReport, Report
from nanovllm.tools.report_experts import experts
from nanovllm.tools.report_format import kind, text
from nanovllm.tools.report_graphs import graphs

WIDTH = 1200


def page(report: Report) -> str:
    """The whole page."""
    files = (Path(__file__).with_suffix(suffix) for suffix in (".css", ".js"))
    style, script = (file.read_text(encoding="utf-8") for file in files)
    named = [f"{text(name)} <b>{text(value)}</b>" for name, value in report.facts.items()]
    facts = " &nbsp;·&nbsp; ".join(named)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{text(report.title)}</title><style>{style}</style></head><body><main>",
        f'<h1>{text(report.title)}</h1><div class="facts">{facts}</div>',
        f'<div class="cards">{_cards(report)}</div>',
        _section(
            "Where a step's time goes",
            "Calls in the order in which they run; the width of a call is its time. A layer is "
            "drawn once: the number under it is how often a step runs it.",
            _timeline(report.regions) + _legend(report.regions),
        ),
        _section(
            "Kernels",
            "Each call is timed alone, repeatedly on the same memory: data that fits a cache of "
            "the device can be read faster than its memory allows. Bytes are those that a call "
            "must at least read and write. Click on a column to sort.",
            _kernels(report.regions, report.limits),
        ),
        *_experts(report),
        _section(
            "Graphs, before and after each pass",
            "Boxes are calls. Beside them, in grey, are the weights, state and constants that they "
            "read. Left before, right after: <span style='color:var(--bad)'>dashed red</span> is "
            "removed, <span style='color:var(--good)'>green</span> is new.",
            graphs(report.regions),
        ),
        _section(
            "Padding",
            "Rows that a trace of batch sizes "
            f"({text(report.trace_name)}) needs in each bucket, and rows that fill it. "
            f"Over all steps {_total_waste(report.padding):.1%} of the rows are padding.",
            _padding(report.padding),
        ),
        f"</main><script>{script}</script></body></html>",
    ]
    return "\n".join(parts)


def _section(title: str, explanation: str, content: str) -> str:
    return f'<h2>{title}</h2>\n<p>{explanation}</p>\n<div class="panel">{content}</div>'


def _experts(report: Report) -> list[str]:
    """The section on experts, for models with experts."""
    drawn = experts(report.regions, report.limits)
    explanation = (
        "How many of the step's tokens go to each expert of a layer. A call reads the experts that "
        "its tokens choose. The weights of this report are random, and so is the choice."
    )
    return [_section("Experts", explanation, drawn)] if drawn else []


def _cards(report: Report) -> str:
    calls = [(region.times, call) for region in report.regions for call in region.calls]
    step = sum(times * call.seconds for times, call in calls)
    limit = sum(times * call.limit(report.limits) for times, call in calls)
    num_bytes = sum(times * call.num_bytes for times, call in calls)
    num_calls = sum(times for times, _ in calls)
    rates = f"{report.limits.bandwidth / 1e9:,.0f} GB/s and {fmt.flops(report.limits.flops)}/s"
    cards = [
        (fmt.duration(step), "one step: all its calls, back to back"),
        (fmt.duration(limit), f"what {rates} allow"),
        (f"{limit / step:.0%}" if step else "–", "share of the device's limit"),
        (f"{num_calls}", f"calls, {fmt.num_bytes(num_bytes)} moved"),
    ]
    card = '<div class="card"><div class="number">{}</div><div class="what">{}</div></div>'
    return "".join(card.format(number, text(what)) for number, what in cards)


def _timeline(regions: Sequence[RegionReport]) -> str:
    total = sum(region.seconds for region in regions) or 1.0
    gap, x, out = 10.0, 0.0, []
    scale = (WIDTH - gap * (len(regions) - 1)) / total
    for region in regions:
        begin = x
        for call in region.calls:
            wide = call.seconds * scale
            tip = text(f"{call.op} {call.shapes}: {fmt.duration(call.seconds)}")
            out.append(
                f'<rect x="{x:.1f}" y="0" width="{max(wide - 1, 0.6):.1f}" height="54" rx="2" '
                f'fill="{kind(call.op)[1]}"><title>{tip}</title></rect>'
            )
            if wide > 7 * len(call.op) + 6:
                middle = f'x="{x + wide / 2:.1f}" y="31" text-anchor="middle"'
                out.append(f'<text class="white" {middle}>{text(call.op)}</text>')
            x += wide
        if x - begin > 70:
            name, each = text(region.name.split("_")[0]), fmt.duration(region.seconds)
            if region.times > 1:
                name, each = f"{name} × {region.times}", f"{each} each"
            out.append(f'<text x="{begin:.1f}" y="74">{name}</text>')
            out.append(f'<text class="soft" x="{begin:.1f}" y="91">{each}</text>')
        x += gap
    return f'<svg class="fits" viewBox="0 0 {WIDTH} 98" role="img">{"".join(out)}</svg>'


def _legend(regions: Sequence[RegionReport]) -> str:
    sums: dict[tuple[str, str], float] = {}
    for region in regions:
        for call in region.calls:
            sums[kind(call.op)] = sums.get(kind(call.op), 0.0) + region.times * call.seconds
    total = sum(sums.values()) or 1.0
    parts = [
        f'<span><i style="background:{colour}"></i>{name} {seconds / total:.0%}</span>'
        for (name, colour), seconds in sorted(sums.items(), key=lambda item: -item[1])
    ]
    return f'<div class="legend">{"".join(parts)}<span>(of the whole step)</span></div>'


def _kernels(regions: Sequence[RegionReport], limits: DeviceLimits) -> str:
    heads = ("kernel", "result", "region", "times", "each", "in a step", "bytes", "flops", "limit",
             "share of limit")  # fmt: skip
    rows = []
    for region in regions:
        for call in region.calls:
            limit = call.limit(limits)
            share = limit / call.seconds if call.seconds else 0.0
            colour = kind(call.op)[1]
            in_step = call.seconds * region.times
            bar = f'<i style="width:{min(share, 1):.0%};background:{colour}"></i>'
            dot = f'<span class="dot" style="background:{colour}"></span>'
            cells: list[tuple[float | None, str]] = [
                (None, dot + text(call.op)),
                (None, text(call.shapes)),
                (None, text(region.name.split("_")[0])),
                (region.times, str(region.times)),
                (call.seconds, fmt.duration(call.seconds)),
                (in_step, fmt.duration(in_step)),
                (call.num_bytes, fmt.num_bytes(call.num_bytes)),
                (call.flops, fmt.flops(call.flops) if call.flops else "–"),
                (limit, fmt.duration(limit)),
                (share, f'{share:.0%}<span class="bar">{bar}</span>'),
            ]
            row = "".join(_cell(value, what, i == 1) for i, (value, what) in enumerate(cells))
            rows.append(f"<tr>{row}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f'<table class="sortable"><thead><tr>{head}</tr></thead>{body}</table>'


def _cell(value: float | None, content: str, is_shape: bool) -> str:
    data = "" if value is None else f' data-value="{value}"'
    return f"<td{data}{' class=shape' if is_shape else ''}>{content}</td>"


def _total_waste(padding: Sequence[Padding]) -> float:
    filled = sum(part.num_steps * part.bucket for part in padding)
    return 1 - sum(part.num_rows for part in padding) / filled if filled else 0.0


def _padding(padding: Sequence[Padding]) -> str:
    most = max((part.num_steps * part.bucket for part in padding), default=1) or 1
    scale = (WIDTH - 400) / most
    out = []
    for i, part in enumerate(padding):
        y, used, filled = i * 28, part.num_rows * scale, part.num_steps * part.bucket * scale
        out.append(f'<text x="62" y="{y + 17}" text-anchor="end">{part.bucket}</text>')
        for wide, colour in ((filled, "#f0c9c5"), (used, "#2f6fde")):
            box = f'x="74" y="{y + 4}" width="{wide:.1f}" height="18" rx="3"'
            out.append(f'<rect {box} fill="{colour}"/>')
        note = f"{part.num_steps:,} steps, {part.waste:.0%} padding"
        note = note if part.num_steps else "not used"
        out.append(f'<text class="soft" x="{82 + filled:.1f}" y="{y + 17}">{note}</text>')
    height = len(padding) * 28 + 4
    legend = (
        '<div class="legend"><span><i style="background:#2f6fde"></i>rows of requests</span>'
        '<span><i style="background:#f0c9c5"></i>padding</span><span>one line a bucket</span></div>'
    )
    return f'<svg class="fits" viewBox="0 0 {WIDTH} {height}">{"".join(out)}</svg>{legend}'
