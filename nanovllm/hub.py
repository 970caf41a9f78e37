"""Where a model's files are: the embedded model, a folder, or a download from the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = ("tiny-qwen3",)
CONFIG_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint; downloads a Hub id (huggingface_hub resumes and verifies). `weights` False: configs only.

    Raises ValueError for a name that is neither embedded, nor a folder with a config.json, nor a Hub id that exists.
    """
    if model in EMBEDDED:
        return Path(__file__).parent / "assets" / model
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{model!r} is a folder without a config.json, so it is no checkpoint")
        return folder
    if not HUB_ID.fullmatch(model) or folder.exists():
        raise ValueError(
            f"model {model!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder, nor a Hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = CONFIG_FILES + (["*.safetensors"] if weights else [])
    try:
        # some repositories hold a second copy of all weights under this name
        return Path(
            snapshot_download(model, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        )
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model {model!r} is no folder here and no repository on the Hub (or it is private)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {model!r} is no folder here and could not be downloaded from the Hub: {error}"
        ) from error
