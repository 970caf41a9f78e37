"""Cache salts, so that holders of different API keys share no prefix cache.

A prompt with a cached prefix is answered sooner, and its usage reports the cached tokens. With a
shared cache, the holder of one key could guess another's prompts block by block (compare
CVE-2025-46570).
"""

from __future__ import annotations

import hmac

from nanovllm.api.config import ServerConfig


class CacheSalts:
    """Derives a prompt's `cache_salt` from the request's API key and salt."""

    def __init__(self, config: ServerConfig, secret: bytes) -> None:
        """secret: random bytes, the same in all API processes of a server. Without them a salt does
        not reveal the key."""
        self._secret = secret
        self._is_shared = len(set(config.api_key)) < 2 or config.share_cache_between_keys

    def of(self, key: str, given: str | None) -> str | None:
        """The salt for a request with this key ("" for none) and the salt that it sent."""
        if self._is_shared:
            return given
        # keys contain no NUL, so the text is unique for a pair
        text = f"{key}\0{given or ''}"
        return hmac.digest(self._secret, text.encode(errors="surrogatepass"), "sha256").hex()
