"""Text in, text out: the checkpoint's own tokenizer, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Whatever a tokenizer may consist of, in any of transformers' layouts; the first four are enough to have one.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
REPLACEMENT = "\ufffd"  # what a decoder shows for the first bytes of an unfinished character


def load_tokenizer(folder: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none (token ids still work then)."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:4]):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class GrowingText:
    """The text of a growing list of tokens, decoded a few at a time.

    A token's text can depend on its neighbours (spaces, characters of several bytes), so each piece is the difference
    between decoding a short tail with and without the newest tokens; an unfinished character is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._tail = 0  # decoding starts here
        self._shown = 0  # tokens whose text is in `text`
        self.text = ""

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that has become certain."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._tail : self._shown])
        after = self._decode(self._ids[self._tail :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        piece = after[len(before) :]
        self._tail, self._shown = self._shown, len(self._ids)
        self.text += piece
        return piece

    def flush(self) -> str:
        """The rest, unfinished characters included, once no more tokens come."""
        piece = self._decode(self._ids[self._tail :])[
            len(self._decode(self._ids[self._tail : self._shown])) :
        ]
        self.text += piece
        self._tail, self._shown = self._shown, len(self._ids)
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
