"""Find a model's files: an embedded model, a folder, or a download from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nanovllm import progress
from nanovllm.tokenizer import has_tokenizer

SEEING = "tiny-qwen3-vl"
EMBEDDED = ("tiny-qwen3", "tiny-mixtral", SEEING)
CONFIG_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def names_model(text: str) -> bool:
    """Whether a text has the form of a model's name or path, which `resolve` can find or refuse
    with the reason."""
    starts = ("/", "./", "../", "~")
    is_name = text in EMBEDDED or HUB_ID.fullmatch(text) is not None
    is_path = text.startswith(starts) and len(text.split()) == 1
    return is_name or is_path or (bool(text) and Path(os.path.expanduser(text)).is_dir())


def resolve(model: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder of a checkpoint. Downloads a Hub id; without `weights`, its small files only.

    `revision` is a branch, tag or commit of a Hub id; None is its main branch. Raises ValueError
    for a name that is not an embedded model, a folder with a config.json, or an existing Hub id,
    and for a revision of anything but a Hub id.
    """
    if revision is not None and (model in EMBEDDED or Path(os.path.expanduser(model)).is_dir()):
        raise ValueError(
            f"revision is {revision!r}, but model {model!r} is not a Hub id, and only a Hub id has "
            "revisions"
        )
    if model in EMBEDDED:
        return Path(__file__).parent / "assets" / model
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{model!r} is not a checkpoint: the folder has no config.json")
        return folder
    if not HUB_ID.fullmatch(model) or folder.exists():
        raise ValueError(
            f"model {model!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder, "
            "nor a Hub id (owner/name)"
        )
    return download(model, weights=weights, revision=revision)


def download(model: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder of a Hub id, with the files that `resolve` names. Files that are in the Hub's
    cache are not downloaded again.

    Raises ValueError for an id or a revision that does not exist, and if the Hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = CONFIG_FILES + (["*.safetensors"] if weights else [])
    try:
        # some repositories hold a second copy of all weights in consolidated*
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["consolidated*"],
                tqdm_class=progress.silent_class(),
            )
        )
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model {model!r} is neither a local folder nor a repository on the Hub (or it is "
            "private)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model {model!r} has no revision {revision!r} on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {model!r} is not a local folder and could not be downloaded from the Hub: "
            f"{error}"
        ) from error


def resolve_tokenizer(name: str) -> Path:
    """The folder of a tokenizer: a folder with a tokenizer's files, or what `resolve` finds."""
    folder = Path(os.path.expanduser(name))
    return folder if has_tokenizer(folder) else resolve(name, weights=False)
