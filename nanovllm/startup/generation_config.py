"""A checkpoint's generation_config.json: default sampling parameters, and what ends an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.models.gguf.header import is_gguf
from nanovllm.sampling import SamplingParams
from nanovllm.startup.config_file import read_object

logger = logging.getLogger(__name__)

# Keys that are sampling parameters, by the field's name.
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}


def generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; {} if there is none. Raises ValueError."""
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def default_params(content: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters for requests without any. Raises ValueError for invalid values."""
    given = {name: content[key] for name, key in FIELDS.items() if content.get(key) is not None}
    if content.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**given)


def eos_token_ids(folder: Path, hf: Any) -> frozenset[int]:
    """The ids in generation_config.json, or else in config.json, that end an answer. The one of the
    tokenizer does too (`startup.load`).

    Raises ValueError, with the file's name, for values that are not ids.
    """
    path = folder / "generation_config.json"
    found = generation_config(folder).get("eos_token_id")
    if found is None:
        path, found = folder if is_gguf(folder) else folder / "config.json", hf.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id is {found!r}: it must be a token id, or a list")
    return frozenset(ids)
