"""How to install an optional part of this package. The package is not on an index, so a command
names the folder or repository that it was installed from (PEP 610). Does not import other modules
of the package."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]  # of a checkout


def install(extra: str) -> str:
    """The command that installs an extra of setup.py in the same environment."""
    return _command(extra, _origin(), ROOT)


def _command(extra: str, origin: dict[str, Any], root: Path) -> str:
    url = str(origin.get("url", ""))
    if vcs := origin.get("vcs_info"):
        revision = vcs.get("requested_revision") or vcs.get("commit_id", "HEAD")
        source = f"nanovllm[{extra}] @ {vcs.get('vcs', 'git')}+{url}@{revision}"
        return f"pip install {shlex.quote(source)}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    for folder in (Path(unquote(urlsplit(url).path)) if url.startswith("file:") else root, root):
        if (folder / "setup.py").is_file():
            return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install '.[{extra}]' in a clone of nanovllm's repository"


def _origin() -> dict[str, Any]:
    """Where pip has installed this package from; {} if that is not recorded."""
    try:
        found = json.loads(metadata.distribution("nanovllm").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
