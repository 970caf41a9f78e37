"""The checkpoint's tokenizer, and text that is decoded token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# All files of a tokenizer in transformers' layouts. One of the first four means that there is one.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
REPLACEMENT = "\ufffd"  # the decoder's output for the first bytes of an incomplete character


def load_tokenizer(folder: Path) -> Any | None:
    """The checkpoint's tokenizer. None if it has none: then only token ids work."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:4]):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class GrowingText:
    """The text of a growing list of tokens, decoded a few at a time.

    A token's text can depend on its neighbours (spaces, characters of several bytes). So each new
    piece is the difference between the texts of a short tail with and without the newest tokens.
    An incomplete character is held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._tail = 0  # index of the first token to decode
        self._shown = 0  # number of tokens whose text is in `text`
        self.text = ""

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens. Returns the new text that further tokens cannot change."""
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
        """The rest of the text after the last token, with incomplete characters."""
        piece = self._decode(self._ids[self._tail :])[
            len(self._decode(self._ids[self._tail : self._shown])) :
        ]
        self.text += piece
        self._tail, self._shown = self._shown, len(self._ids)
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
