"""Keeps configs and tokenizers in the store, so that later starts need not import transformers.

A config is kept as its attributes, a tokenizer as the description of its `tokenizers` object, each
only if that loses nothing. Their keys are digests of the files and versions of the libraries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.compile.keys import Key
from nanovllm.compile.store import Artifact, Store
from nanovllm.kernels.code_files import digest
from nanovllm.tokenizer import TOKENIZER_FILES, load_tokenizer

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER = "config", "tokenizer"
FORMAT = 1  # in every key: count up when the content changes
# A tokenizer is kept only if it treats these texts as transformers does.
PROBES = (
    "", " ", "Hello, world!", "  two  spaces\n\n\tand a tab ", "it's don't I'll",
    "naïve café — 12,345.67 €", "日本語 текст עברית", "🙂👩‍👩‍👧", "<s>[INST] x [/INST]</s>",
    "<|im_start|>user\nhi<|im_end|>\n", "def f(x):\n    return x**2  # comment\n",
)  # fmt: skip


class StoredConfig(SimpleNamespace):
    """The attributes of a transformers config, rope parameters in their standard form."""

    def standardize_rope_params(self) -> None:
        """Does nothing: stored parameters have the standard form."""


def read_config(folder: Path, store: Store | None) -> Any:
    """transformers' config of a checkpoint, or the store's copy of it."""
    key = _key(CONFIG, [folder / "config.json"], "transformers")
    if store is not None and (found := store.find(key)):
        attributes = json.loads(found.content)
        attributes["dtype"] = attributes["dtype"] and getattr(torch, attributes["dtype"])
        return StoredConfig(**attributes)
    from transformers import AutoConfig

    with _without_docstrings():
        hf = AutoConfig.from_pretrained(folder)
    if store is not None and (content := _written(hf)) is not None:
        store.save(key, Artifact(CONFIG, CONFIG, content, None, {}))
    return hf


@contextlib.contextmanager
def _without_docstrings() -> Iterator[None]:
    """Keep transformers from writing docstrings of config classes.

    Up to 5.20 it imports its generation code for them, with scipy, pandas and Dynamo: 2.3 s.
    """
    module = sys.modules.get("transformers.utils.auto_docstring")
    write = getattr(module, "auto_class_docstring", None)
    if module is None or write is None:
        yield
        return
    module.auto_class_docstring = lambda cls, **_: cls  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.auto_class_docstring = write  # type: ignore[attr-defined]


def _written(hf: Any) -> bytes | None:
    """The config's attributes as JSON; None for rope types, whose parameters need code."""
    hf.standardize_rope_params()
    if hf.rope_parameters.get("rope_type", "default") != "default":
        return None
    attributes = {name: value for name, value in vars(hf).items() if not name.startswith("_")}
    attributes["dtype"] = str(hf.dtype).removeprefix("torch.") if hf.dtype is not None else None
    plain = {name: value for name, value in attributes.items() if _is_plain(value)}
    return json.dumps(plain).encode()


def _is_plain(value: Any) -> bool:
    """Whether JSON returns the value unchanged. It does not for keys that are numbers."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


class StoredTokenizer:
    """Encodes and decodes with `tokenizers`; loads transformers' tokenizer for everything else."""

    def __init__(self, description: str, load_full: Callable[[], Any]) -> None:
        from tokenizers import Tokenizer

        self._backend: Any = Tokenizer.from_str(description)
        self._load_full = functools.cache(load_full)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around it."""
        return list(self._backend.encode(text).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load_full(), name)


def read_tokenizer(folder: Path, store: Store) -> Any | None:
    """The checkpoint's tokenizer, or None if it has none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    key = _key(TOKENIZER, [*files, folder / "config.json"], "transformers", "tokenizers")
    if found := store.find(key):
        return StoredTokenizer(found.content.decode(), functools.partial(load_tokenizer, folder))
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and (description := _description(tokenizer)):
        store.save(key, Artifact(TOKENIZER, TOKENIZER, description.encode(), None, {}))
    return tokenizer


def _description(tokenizer: Any) -> str | None:
    """The `tokenizers` object as JSON; None if it gives other ids or text than transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None
    backend.no_truncation()
    backend.no_padding()
    description = str(backend.to_str())
    stored = StoredTokenizer(description, lambda: tokenizer)
    for text in PROBES:
        ids = list(tokenizer.encode(text))
        if stored.encode(text) != ids:
            return None
        for skip in (False, True):
            if stored.decode(ids, skip) != tokenizer.decode(ids, skip_special_tokens=skip):
                return None
    return description


def _key(kind: str, files: Sequence[Path], *libraries: str) -> Key:
    digests = {f"file {path.name}": digest(path.read_bytes()) for path in files}
    versions = {f"version {name}": importlib.metadata.version(name) for name in libraries}
    return Key({"kind": f"{kind} {FORMAT}", **digests, **versions})
