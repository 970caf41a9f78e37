"""The checkpoint's generation_config.json: its default sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
