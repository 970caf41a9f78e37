"""Checks the Host header: protection against DNS rebinding.

A web page can use a host name of its own and, once loaded, let its DNS server resolve the name to
127.0.0.1. The browser then treats a server on loopback as the page's origin, so neither CORS nor
the content type protects the server. The Host header still has the page's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError

ANY = "*"
LOCAL_NAME = "localhost"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]/@,]+)(?::[0-9]*)?", re.ASCII)  # in lower case
MAX_SHOWN_CHARS = 64


class TrustedHosts:
    """The host names that a server accepts. Ports are not compared: a tunnel may use another."""

    def __init__(self, config: ServerConfig, address: str) -> None:
        """address: the address that the server is bound to."""
        is_local, named = is_loopback(address), config.allowed_hosts
        self._has_any = ANY in named or not (is_local or named)
        self._names = {LOCAL_NAME, *(plain(name) for name in (config.host, *named))}

    def check(self, given: Sequence[str]) -> None:
        """Raises ApiError unless there is exactly one Host header, with an allowed host.

        The status is 421 (RFC 9110, 15.5.20): the server is not responsible for that host. 403
        would mean a missing permission, such as a key. No client library retries after 421.
        """
        if self._has_any:
            return
        found = HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
        name = "" if found is None else plain(found[1])
        if not name or (name not in self._names and not is_loopback(name)):
            shown = " and ".join(given)[:MAX_SHOWN_CHARS]
            words = f"this server does not answer for the host {shown!r}: see allowed_hosts"
            raise ApiError(421, words, code="unknown_host")


def plain(name: str) -> str:
    """A name or address normalized for comparison: lower case, no brackets, no trailing dot, IPv6
    in its shortest form."""
    bare = name.lower().strip("[]").removesuffix(".")
    try:
        return ip_address(bare).compressed
    except ValueError:
        return bare


def is_loopback(name: str) -> bool:
    """Whether it is a loopback address. Names are not."""
    try:
        address = ip_address(name)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
