"""Drawings of a report's layers with experts: tokens of each expert, bytes, share of the limit."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.tools import report_format as fmt
from nanovllm.tools.device_limits import DeviceLimits
from nanovllm.tools.report_data import MeasuredCall, RegionReport
from nanovllm.tools.report_format import text

WIDTH, HEIGHT = 1200, 120  # of the bars


def experts(regions: Sequence[RegionReport], limits: DeviceLimits) -> str:
    """A drawing for each region with experts; empty if there are none."""
    drawn = ""
    for region in regions:
        calls = [call for call in region.calls if call.tokens_per_expert]
        if calls:
            drawn += f"<h3>{text(region.name)}, {region.times} in a step</h3>"
            drawn += f"<p>{_sentence(calls, limits)}</p>{_bars(calls[0].tokens_per_expert)}"
    return drawn


def _sentence(calls: Sequence[MeasuredCall], limits: DeviceLimits) -> str:
    """A sentence about the calls of one layer that multiply by its experts."""
    tokens = calls[0].tokens_per_expert
    chosen, seconds = sum(num > 0 for num in tokens), sum(call.seconds for call in calls)
    limit = sum(call.limit(limits) for call in calls)
    share = f"{limit / seconds:.0%} of the device's limit" if seconds else "–"
    return (
        f"<b>{chosen} of {len(tokens)} experts</b> are chosen, by {max(tokens)} tokens at most. "
        f"The layer's calls with experts move <b>{fmt.num_bytes(sum(c.num_bytes for c in calls))}"
        f"</b> in {fmt.duration(seconds)}: <b>{share}</b>."
    )


def _bars(tokens: Sequence[int]) -> str:
    """A bar for each expert, as high as the number of tokens that go to it; a line at the mean."""
    step, most = WIDTH / len(tokens), max(tokens)
    out = []
    for expert, num in enumerate(tokens):
        high = HEIGHT * num / most
        box = f'x="{expert * step:.1f}" y="{HEIGHT - high:.1f}" width="{max(step - 1, 0.6):.1f}"'
        tip = f"<title>expert {expert}: {num} tokens</title>"
        out.append(f'<rect {box} height="{high:.1f}" fill="{fmt.kind("expert")[1]}">{tip}</rect>')
    mean = sum(tokens) / len(tokens)
    y = HEIGHT * (1 - mean / most)
    out.append(f'<path d="M0,{y:.1f} H{WIDTH}" fill="none" stroke="#20262e" stroke-dasharray="4"/>')
    note = f"experts 0 to {len(tokens) - 1}; dashed: {mean:.3g} tokens, the mean"
    out.append(f'<text class="soft" x="0" y="{HEIGHT + 18}">{note}</text>')
    return f'<svg class="fits" viewBox="0 0 {WIDTH} {HEIGHT + 26}" role="img">{"".join(out)}</svg>'
