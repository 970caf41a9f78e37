"""Caches configs and tokenizers in the store, so that later starts need not import transformers.

A config is kept as its attributes, a tokenizer as the description of its `tokenizers` object, each
only if that loses nothing. Their keys are digests of the files and versions of the libraries.
Importing this module does not import torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nanovllm import hub
from nanovllm.compile.key import Key
from nanovllm.compile.store import Artifact, Store
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import digest
from nanovllm.models.gguf import header
from nanovllm.models.gguf.header import is_gguf
from nanovllm.models.quant_config import MODELOPT_FILE
from nanovllm.tokenizer import TOKENIZER_FILES, Tokenizer, has_tokenizer, load_full

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER = "config", "tokenizer"
UNREAD = ("id2label", "label2id", "ignore_keys_at_rope_validation")  # no model reads them
FORMAT = 4  # in every key: increment when the content changes
# A tokenizer is kept only if it encodes and decodes these texts as transformers does.
PROBES = (
    "", " ", "Hello, world!", "  two  spaces\n\n\tand a tab ", "it's don't I'll",
    "naïve café — 12,345.67 €", "日本語 текст עברית", "🙂👩‍👩‍👧", "<s>[INST] x [/INST]</s>",
    "<|im_start|>user\nhi<|im_end|>\n", "def f(x):\n    return x**2  # comment\n",
)  # fmt: skip


class StoredConfig(SimpleNamespace):
    """The attributes of a transformers config, rope parameters in their standard form."""

    def standardize_rope_params(self) -> None:
        """Does nothing: stored parameters have the standard form."""


def read_config(
    folder: Path, store: Store | None, overrides: Mapping[str, object] | None = None
) -> Any:
    """transformers' config of a folder or a GGUF file with `overrides`, or the store's copy of it.

    Errors are those of `transformers_config`.
    """
    path = folder if is_gguf(folder) else folder / "config.json"
    changes = json.dumps(overrides or {}, sort_keys=True)
    of_modelopt = path.with_name(MODELOPT_FILE)
    paths = [path, of_modelopt] if of_modelopt.is_file() else [path]
    key = _key(CONFIG, paths, "transformers", overrides=changes)
    if store is not None and (found := store.find(key)):
        attributes = json.loads(found.content)
        import torch

        attributes["dtype"] = attributes["dtype"] and getattr(torch, attributes["dtype"])
        return StoredConfig(**attributes)
    from nanovllm.startup.config_file import transformers_config  # imports torch

    hf = transformers_config(path, overrides or {})
    if store is not None and (content := _written(hf)) is not None:
        store.save(key, Artifact(CONFIG, CONFIG, content, None, {}))
    return hf


def _written(hf: Any) -> bytes | None:
    """The config's attributes as JSON; None if JSON loses one, or for rope types with code."""
    if getattr(hf, "is_heterogeneous", False):
        return None
    if hasattr(hf, "rope_parameters") and not _has_plain_ropes(hf):
        return None
    kept = {name: value for name, value in vars(hf).items() if not name.startswith("_")}
    kept = {name: value for name, value in kept.items() if name not in UNREAD}
    aliases: dict[str, str] = type(hf).attribute_map
    kept |= {alias: getattr(hf, name) for alias, name in aliases.items() if name in kept}
    kept["model_type"] = hf.model_type
    kept["dtype"] = str(hf.dtype).removeprefix("torch.") if hf.dtype is not None else None
    return json.dumps(kept).encode() if all(map(_is_plain, kept.values())) else None


def _has_plain_ropes(hf: Any) -> bool:
    """Whether no rope type has code, after giving the parameters their standard form."""
    hf.standardize_rope_params()
    nested = [value for value in hf.rope_parameters.values() if isinstance(value, dict)]
    ropes = nested or [hf.rope_parameters]
    return all(rope.get("rope_type", "default") == "default" for rope in ropes)


def _is_plain(value: Any) -> bool:
    """Whether the value survives JSON unchanged. Keys that are numbers do not."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def read_tokenizer_of(config: EngineConfig, folder: Path, store: Store) -> Tokenizer | None:
    """The tokenizer of the options; `folder` is the checkpoint's. None if there is none."""
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is not None:
        folder = hub.resolve_tokenizer(str(config.tokenizer))
    found = read_tokenizer(folder, store)
    if config.template is not None:
        if found is None:
            raise ValueError(f"{folder} has no tokenizer, which chat_template needs")
        found.use_template(config.template)
    return found


def read_tokenizer(folder: Path, store: Store) -> Tokenizer | None:
    """The tokenizer of a folder or a GGUF file, or None if it has none."""
    if not has_tokenizer(folder):
        return None
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    files = [folder] if is_gguf(folder) else files
    config = [folder / "config.json"] if (folder / "config.json").is_file() else []
    key = _key(TOKENIZER, [*files, *config], "transformers", "tokenizers")
    if found := store.find(key):
        quick = _quick(found.content.decode())
        load = functools.partial(load_full, folder)
        return Tokenizer(load, quick=quick, eos_id=found.result["eos_id"])
    full = load_full(folder)
    eos_id, description = full.eos_token_id, _description(full)
    if description is None:
        return Tokenizer(lambda: full, eos_id=eos_id)
    result = {"eos_id": eos_id}
    store.save(key, Artifact(TOKENIZER, TOKENIZER, description.encode(), result, {}))
    return Tokenizer(lambda: full, quick=_quick(description), eos_id=eos_id)


def _quick(description: str) -> Any:
    from tokenizers import Tokenizer as Quick

    return Quick.from_str(description)


def _description(full: Any) -> str | None:
    """The `tokenizers` object as JSON; None if it gives other ids or text than transformers."""
    backend = getattr(full, "backend_tokenizer", None)
    if backend is None or getattr(full, "clean_up_tokenization_spaces", False):
        return None
    copied = _quick(str(backend.to_str()))
    copied.no_truncation()
    copied.no_padding()
    for text in PROBES:
        ids = list(full.encode(text))
        if list(copied.encode(text).ids) != ids:
            return None
        for skip in (False, True):
            if copied.decode(ids, skip) != full.decode(ids, skip_special_tokens=skip):
                return None
    return str(copied.to_str())


def _key(kind: str, files: Sequence[Path], *libraries: str, **others: str) -> Key:
    digests = {
        f"file {path.name}": header.read(path).digest
        if is_gguf(path)
        else digest(path.read_bytes())
        for path in files
    }
    versions = {f"version {name}": importlib.metadata.version(name) for name in libraries}
    return Key({"kind": f"{kind} {FORMAT}", **digests, **versions, **others})
