"""The format of numbers and names in a report, and the colour of each kind of call."""

from __future__ import annotations

import html

# (a part of the op's name, kind, colour)
KINDS = (
    ("attention", "attention", "#7c5cd6"),
    ("expert", "experts", "#b5452c"),
    ("topk", "routing", "#8c8a14"),
    ("linear", "products", "#2f6fde"),
    ("mm", "products", "#2f6fde"),
    ("rope", "rotation, cache write", "#c7791c"),
    ("store", "rotation, cache write", "#c7791c"),
    ("norm", "norms, activation", "#17936f"),
    ("silu", "norms, activation", "#17936f"),
    ("sampl", "sampling", "#c4416f"),
)
OTHER = ("step, embedding, glue", "#78828f")


def kind(op: str) -> tuple[str, str]:
    """(kind, colour) of a call."""
    return next(((name, colour) for part, name, colour in KINDS if part in op), OTHER)


def text(value: str) -> str:
    """`value`, escaped for HTML."""
    return html.escape(value)


def cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def num_bytes(count: float) -> str:
    return _scaled(count, ("B", "KB", "MB", "GB", "TB"))


def flops(count: float) -> str:
    return _scaled(count, ("flop", "Kflop", "Mflop", "Gflop", "Tflop"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}"


def tabs(panes: list[tuple[str, str]]) -> str:
    """Buttons with names, and the one pane of HTML that the chosen button shows."""
    buttons = contents = ""
    for i, (name, content) in enumerate(panes):
        buttons += f"<button{'' if i else ' class=on'}>{text(name)}</button>"
        contents += f'<div class="pane"{" hidden" if i else ""}>{content}</div>'
    return f'<div><div class="tabs">{buttons}</div>{contents}</div>'
