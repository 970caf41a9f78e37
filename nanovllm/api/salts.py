"""Cache salts of requests: holders of different API keys must not share a cache.

A prompt whose beginning is in the cache is answered sooner, and its usage counts cached tokens.
With a shared cache the holder of one key could guess the prompts of another, block by block
(compare CVE-2025-46570).
"""

from __future__ import annotations

import hmac

from nanovllm.api.config import ServerConfig


class CacheSalts:
    """Makes the `cache_salt` of prompts from the key and the salt of a request."""

    def __init__(self, config: ServerConfig, secret: bytes) -> None:
        """secret: random bytes, equal in all API processes of a server. A salt does not reveal the
        key without them."""
        self._secret = secret
        self._is_shared = len(set(config.api_key)) < 2 or config.share_cache_between_keys

    def of(self, key: str, given: str | None) -> str | None:
        """The salt for a request with this key, "" for none, and with this salt of its own."""
        if self._is_shared:
            return given
        # a key has no NUL, so no other pair gives the same text
        text = f"{key}\0{given or ''}"
        return hmac.digest(self._secret, text.encode(errors="surrogatepass"), "sha256").hex()
