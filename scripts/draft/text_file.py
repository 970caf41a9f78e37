"""A file of texts: a line on what they are answers to, and then one on each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from draft.collect import Text


class Origin(NamedTuple):
    """What texts are answers to. prompts: a digest of the given ones. own_prompts: how many others
    the model was to make up. answers: to each prompt."""

    prompts: str
    own_prompts: int
    answers: int


def origin_of(prompts: Sequence[str], own_prompts: int, answers: int) -> Origin:
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return Origin(digest[:16], own_prompts, answers)


def write(file: Path, origin: Origin, texts: Sequence[Text]) -> None:
    head = origin._asdict() | {"texts": len(texts)}
    rows = ({"num_prompt": one.num_prompt, "tokens": one.token_T} for one in texts)
    file.write_text("".join(json.dumps(one) + "\n" for one in (head, *rows)))


def read(file: Path, origin: Origin) -> list[Text]:
    """The texts of a file of `write`. Raises ValueError if they are of another origin, or if some
    are missing."""
    head, *rows = (json.loads(line) for line in file.read_text().splitlines() or ["{}"])
    others = [
        f"{name} {head.get(name)} (here {value})"
        for name, value in origin._asdict().items()
        if head.get(name) != value
    ]
    if others:
        raise ValueError(f"{file} has texts of other {', '.join(others)}: name another file")
    if len(rows) != head["texts"]:
        raise ValueError(f"{file} has {len(rows)} of {head['texts']} texts: name another file")
    return [Text(one["tokens"], one["num_prompt"]) for one in rows]
