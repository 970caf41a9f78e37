"""Which of several GGUF files is meant: in a folder, or by a type in names on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanovllm.models.gguf.header import SPLIT, is_gguf

PROJECTOR = "mmproj"  # the beginning of names of vision towers' files
MOST_NAMED = 20  # in an error


def in_folder(folder: Path) -> Path | None:
    """The model in a folder that has GGUF files and no others with weights; None without one.

    Raises ValueError if there are several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    models = _models(path.name for path in folder.iterdir() if path.is_file())
    if len(models) > 1:
        firsts = [files[0] for files in models]
        raise ValueError(
            f"{str(folder)!r} has {len(models)} GGUF models: name the file, as in "
            f"{str(folder / firsts[0])!r} (there are {_listed(firsts)})"
        )
    return folder / models[0][0] if models else None


def of_type(model: str, names: Iterable[str], type_name: str) -> Sequence[str]:
    """The files of a repository whose names have a type: one, or the parts of one that is split.

    Raises ValueError if there is none, or if there are several.
    """
    word = re.compile(rf"(?<![a-z0-9]){re.escape(type_name)}(?![a-z0-9_])", re.IGNORECASE)
    models = _models(names)
    found = [files for files in models if word.search(files[0].rpartition("/")[2])]
    if not found:
        known = _listed([files[0] for files in models]) if models else "no GGUF file"
        raise ValueError(f"model {model!r}: no GGUF file has {type_name!r} in its name ({known})")
    if len(found) > 1:
        raise ValueError(
            f"model {model!r}: {len(found)} GGUF files have {type_name!r} in their names "
            f"({_listed([files[0] for files in found])}): download one, and name it by its path"
        )
    return found[0]


def _models(names: Iterable[str]) -> list[list[str]]:
    """The files of each model, sorted by their names."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if is_gguf(name) and not name.rpartition("/")[2].lower().startswith(PROJECTOR):
            split = SPLIT.fullmatch(name)
            found.setdefault(name if split is None else f"{split[1]} of {split[3]}", []).append(
                name
            )
    return list(found.values())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
