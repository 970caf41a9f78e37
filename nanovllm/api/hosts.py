"""Which names clients may call the server by: the check of the header Host.

A web page of another origin can reach a server on loopback under a name of the page's own, which
its DNS server lets point to 127.0.0.1 once the page is loaded ("DNS rebinding"). The browser then
takes the server for the page's own origin, so neither CORS nor the content type protects it. The
header Host still has the page's name.
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


class Hosts:
    """The hosts of one server. Ports are not compared: a tunnel may have another one."""

    def __init__(self, config: ServerConfig, address: str) -> None:
        """address: where the server is bound."""
        is_local, named = is_loopback(address), config.allowed_hosts
        self._has_any = ANY in named or not (is_local or named)
        self._names = {LOCAL_NAME, *(plain(name) for name in (config.host, *named))}

    def check(self, given: Sequence[str]) -> None:
        """Raises ApiError unless the values of a request's headers Host are one that is allowed.

        The status is 421 (RFC 9110, 15.5.20): the server does not answer for the host that the
        request is directed at. With 403 it would say that the client lacks a permission, such as a
        key of its own. No client library tries again after a 421.
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
    """A name or an address as it is compared: in lower case, without brackets and a last dot, an
    IPv6 address in its shortest form."""
    bare = name.lower().strip("[]").removesuffix(".")
    try:
        return ip_address(bare).compressed
    except ValueError:
        return bare


def is_loopback(name: str) -> bool:
    """Whether it is an address of loopback. Names are not."""
    try:
        address = ip_address(name)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
