"""A server's API keys: from options, a file, or the environment."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from os import PathLike

from nanovllm import env
from nanovllm.api.config import ServerConfig

MAX_FILE_BYTES = 1 << 20
OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def with_keys(config: ServerConfig) -> ServerConfig:
    """The options with all keys in `api_key`: those of `api_key` and `api_key_file`; if neither is
    set, those of the environment. Raises ValueError and OSError for an unusable file."""
    keys = list(config.api_key)
    found = env.server_api_keys()  # also removes them from the environment
    if config.api_key_file is not None:
        keys += of_file(config.api_key_file)
    elif not keys:
        keys = found
    return replace(config, api_key=keys, api_key_file=None)


def of_file(path: str | PathLike[str]) -> list[str]:
    """The keys in a file, one per line. Raises OSError, and ValueError if other users have access
    to the file, or if it has no keys or is not text. Errors never contain keys."""
    name = os.fspath(path)
    with open(name, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & OF_OTHERS:
            raise ValueError(
                f"api_key_file {name!r} has the mode {mode:04o}: only its owner may have access to "
                "it (chmod 600)"
            )
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"api_key_file {name!r} has more than {MAX_FILE_BYTES} bytes")
    try:
        keys = [line.strip() for line in data.decode("ascii").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"api_key_file {name!r} must have visible ASCII characters") from None
    if not any(keys):
        raise ValueError(f"api_key_file {name!r} has no key")
    return [key for key in keys if key]
