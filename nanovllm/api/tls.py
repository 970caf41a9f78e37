"""The files of a TLS certificate and its key: checks before anything starts, and their context."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from nanovllm.api.config import ServerConfig

if TYPE_CHECKING:
    from ssl import SSLContext


def check(config: ServerConfig) -> None:
    """Raises ValueError for files that cannot be read, are not a matching certificate and key, or
    need a passphrase, which cannot be entered in every process."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    import ssl  # few servers need it

    certificate, key = os.fspath(config.ssl_certfile), os.fspath(config.ssl_keyfile)
    for name, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ValueError(f"{name} is {path!r}: {error.strerror}") from None

    def refuse() -> NoReturn:
        raise ValueError(f"ssl_keyfile is {key!r}: a key with a passphrase is not supported")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        raise ValueError(
            f"ssl_certfile {certificate!r} and ssl_keyfile {key!r} are not a certificate and its "
            f"key in PEM form: {error.reason or error}"
        ) from None


def context(config: ServerConfig) -> SSLContext | None:
    """None without TLS. The files must have passed `check`."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    import ssl  # few servers need it

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    return made
