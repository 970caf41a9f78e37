"""Find a model's files: an embedded model, a folder, a GGUF file, or a download from the Hugging
Face Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm import gguf_files, progress
from nanovllm.models.gguf.header import is_gguf
from nanovllm.tokenizer import has_tokenizer

SEEING, HYBRID = "tiny-qwen3-vl", "tiny-qwen3.5"
EMBEDDED = ("tiny-qwen3", "tiny-mixtral", HYBRID, SEEING)
CONFIG_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_GGUF = re.compile(rf"({HUB_ID.pattern}):(\w[\w.-]*)")  # with the type of one of its GGUF files


def names_model(text: str) -> bool:
    """Whether a text has the form of a model's name or path, which `resolve` can find or refuse
    with the reason."""
    starts = ("/", "./", "../", "~")
    is_name = text in EMBEDDED or is_hub_name(text)
    is_path = text.startswith(starts) and len(text.split()) == 1
    return is_name or is_path or (bool(text) and is_local(Path(os.path.expanduser(text))))


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a Hub id, or of one with a type."""
    return any(one.fullmatch(text) for one in (HUB_ID, HUB_GGUF))


def is_local(path: Path) -> bool:
    """Whether a path is a folder or a GGUF file."""
    return path.is_dir() or (is_gguf(path) and path.is_file())


def resolve(model: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder of a checkpoint, or its GGUF file, of a split one the first. Downloads a Hub id;
    without `weights`, its small files only. Of `owner/name:TYPE` it downloads the GGUF file whose
    name has the type, which has all of a model.

    `revision` is a branch, tag or commit of a Hub id; None is its main branch. Raises ValueError
    for a name that is not an embedded model, a folder with a config.json or one GGUF model, a GGUF
    file, or an existing Hub id, and for a revision of anything but a Hub id.
    """
    if revision is not None and (model in EMBEDDED or is_local(Path(os.path.expanduser(model)))):
        raise ValueError(
            f"revision is {revision!r}, but model {model!r} is not a Hub id, and only a Hub id has "
            "revisions"
        )
    if model in EMBEDDED:
        return Path(__file__).parent / "assets" / model
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        if (found := gguf_files.in_folder(folder)) is not None:
            return found
        if not (folder / "config.json").is_file():
            raise ValueError(f"{model!r} is not a checkpoint: the folder has no config.json")
        return folder
    if is_gguf(folder) and (folder.is_file() or not HUB_ID.fullmatch(model)):
        if not folder.is_file():
            raise ValueError(f"model {model!r} does not exist")
        return folder
    if not is_hub_name(model) or folder.exists():
        raise ValueError(
            f"model {model!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder, "
            "nor a GGUF file, nor a Hub id (owner/name, or owner/name:TYPE for a GGUF file)"
        )
    return download(model, weights=weights, revision=revision)


def download(model: str, *, weights: bool = True, revision: str | None = None) -> Path:
    """The folder of a Hub id, or the GGUF file of one with a type, with the files that `resolve`
    names. Files that are in the Hub's cache are not downloaded again.

    Raises ValueError for an id or a revision that does not exist, for a type that none or several
    files have, and if the Hub does not answer.
    """
    with _hub_errors(model, revision):
        if (typed := HUB_GGUF.fullmatch(model)) is not None:
            return _download_gguf(model, typed[1], typed[2], revision)
        return _snapshot(model, revision, CONFIG_FILES + (["*.safetensors"] if weights else []))


def _download_gguf(model: str, repository: str, type_name: str, revision: str | None) -> Path:
    """The first file. Without a connection, those in the Hub's cache are known."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(repository, revision=revision)
    except HfHubHTTPError:
        raise
    except (OSError, httpx.HTTPError):  # no connection
        folder = _snapshot(repository, revision, ["*.gguf"], local_files_only=True)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_gguf(path)]
    chosen = gguf_files.of_type(model, names, type_name)
    return _snapshot(repository, revision, [glob.escape(name) for name in chosen]) / chosen[0]


def _snapshot(
    repository: str, revision: str | None, patterns: Sequence[str], **options: Any
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            # a second copy of all weights in some repositories
            ignore_patterns=["consolidated*", "original/*"],
            tqdm_class=progress.silent_class(),
            **options,
        )
    )


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Raise ValueError for what the Hub does not have."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
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
    """The folder of a tokenizer: a folder with a tokenizer's files, or what `resolve` finds, which
    may be a GGUF file."""
    folder = Path(os.path.expanduser(name))
    return folder if has_tokenizer(folder) else resolve(name, weights=False)
