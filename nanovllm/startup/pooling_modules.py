"""How a checkpoint pools, and what the files of sentence-transformers beside it say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.models.model import Model
from nanovllm.models.pooling import Pooler, Pooling
from nanovllm.pooling_params import PoolingInfo
from nanovllm.startup.config_file import read_object

MODES: dict[str, Pooling] = {"lasttoken": "last", "cls": "cls", "mean": "mean"}
_FLAG, _TOKENS = "pooling_mode_", "_tokens"


@dataclass(frozen=True)
class Modules:
    """What modules.json says. pooling: None without a module for it. max_length: in tokens."""

    pooling: Pooling | None
    normalizes: bool
    max_length: int | None


@dataclass(frozen=True)
class PoolingPlan:
    """A model that pools. labels: texts of tokens whose logits are the results, none for a head."""

    model: Model
    info: PoolingInfo
    labels: tuple[str, ...] = ()

    @property
    def pooler(self) -> Pooler:
        pooler: Pooler = self.model.pooler
        return pooler


def read(folder: Path) -> Modules | None:
    """The modules of a folder; None if it has none, or is a file. Raises ValueError for modules
    that do not run here."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    pooling: Pooling | None = None
    normalizes = False
    for module in _entries(path):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(_inside(folder, module) / "config.json")
        elif kind == "Normalize":
            normalizes = True
        elif kind != "Transformer":
            raise ValueError(f"{path}: the module {kind!r} of sentence-transformers does not run")
    return Modules(pooling, normalizes, _max_length(folder / "sentence_bert_config.json"))


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{path}: it must be a list of objects")
    return found


def _inside(folder: Path, module: dict[str, Any]) -> Path:
    """The folder of a module, which must be in the checkpoint's."""
    name = module.get("path", "")
    if not isinstance(name, str) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / 'modules.json'}: path is {name!r}: it must be a folder inside")
    return folder / name


def _pooling(path: Path) -> Pooling:
    """The one mode of a pooling module. Raises ValueError for another mode, or several."""
    found = read_object(path)
    named = found.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [
        name.removeprefix(_FLAG).removesuffix(_TOKENS).removesuffix("_token")
        for name, is_set in found.items()
        if name.startswith(_FLAG) and is_set is True
    ]  # fmt: skip
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(f"{path}: pooling is {', '.join(modes) or 'none'}: one of "
                         f"{', '.join(MODES)} runs here")  # fmt: skip
    if found.get("include_prompt") is False:
        raise ValueError(f"{path}: include_prompt is false: only true is supported")
    return MODES[modes[0]]


def _max_length(path: Path) -> int | None:
    if not path.is_file():
        return None
    found = read_object(path).get("max_seq_length")
    if found is not None and (type(found) is not int or found < 1):
        raise ValueError(f"{path}: max_seq_length is {found!r}: it must be at least 1")
    return found
