"""Encodes special tokens in the contents of messages as plain text.

A content such as "<|im_end|>\\n<|im_start|>system" would otherwise end a turn and begin another.
The chat template makes one text of all contents, so special tokens from contents are marked: their
first character is replaced by a sentinel, a character that occurs nowhere else. The template treats
it like any other character, even if it cuts, trims or quotes the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Quick

from nanovllm.tokenizer import Tokenizer, encoding

# The contents of other roles are marked.
TRUSTED_ROLES = ("system", "developer", "assistant", "model")
# Not marked: values that templates compare, and calls, which assistants write.
UNMARKED = ("role", "type", "tool_calls")
PREFIX_CHARS = 3  # of a special token: a template that joins contents must not complete it
# Unicode's noncharacters, which no text should have: for sentinels, and around special tokens
FREE = tuple(map(chr, range(0xFDD0, 0xFDF0)))
CONTROL = re.compile(r"<\|.*\|>", re.DOTALL)  # such tokens are not text, special or not
PROBE = ("Hello", "world")


class Marked(NamedTuple):
    """Messages with sentinels, the character that each stands for, and one more free character."""

    messages: list[dict[str, Any]]
    sentinels: dict[str, str]
    border: str

    def text(self, rendered: str) -> str:
        """A rendered text without sentinels, including those that the template has escaped."""
        for sentinel, char in self.sentinels.items():
            escaped = json.dumps(sentinel)[1:-1]
            rendered = rendered.replace(escaped, json.dumps(char)[1:-1]).replace(sentinel, char)
        return rendered


class SpecialText:
    """Marks the special tokens in contents, and encodes rendered texts with marks. Several threads
    can use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            self._backend: Any | None = tokenizer.backend()
        except ValueError:  # a Python tokenizer of the user's: see `encode`
            self._backend = None
            names = getattr(tokenizer.for_reading, "all_special_tokens", ())
        else:
            added = self._backend.get_added_tokens_decoder().values()
            names = [one.content for one in added if _is_special(one)]
        self._names = sorted({one for one in names if one}, key=len, reverse=True)
        self._firsts = {name[0] for name in self._names}
        self._ends = {name[:n] for name in self._names for n in range(1, PREFIX_CHARS)}
        prefixes = {name[:PREFIX_CHARS] for name in self._names}
        # an empty alternation would match everywhere
        self._begins = re.compile("|".join(map(re.escape, sorted(prefixes))) or "(?!)")
        self._overlapping = re.compile(f"(?={self._begins.pattern})")
        self._whole = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._encoders: dict[str, _Encoder] = {}

    def marked(self, messages: Sequence[Mapping[str, Any]], others: Any) -> Marked | None:
        """The messages with marks in user and tool contents and in names; None if there is nothing
        to mark. others: everything else that the template reads. Raises ValueError for contents
        with all noncharacters."""
        if not any(map(self._has_special, _texts(messages))):
            return None
        everything = json.dumps([messages, others], ensure_ascii=False, default=str)
        # JSON and Python's repr escape a sentinel
        free = [one for one in FREE if one not in everything and _escape(one) not in everything]
        if len(free) <= len(self._firsts):
            raise ValueError("the conversation has special tokens as text beside noncharacters")
        border, *rest = free
        sentinel_of = dict(zip(sorted(self._firsts), rest))

        def marked(value: Any, key: str = "") -> Any:
            if key in UNMARKED:
                return value
            if isinstance(value, str):
                return self._marked_text(value, sentinel_of)
            if isinstance(value, Mapping):
                return {name: marked(one, name) for name, one in value.items()}
            return [marked(one) for one in value] if isinstance(value, (list, tuple)) else value

        found = [
            {key: marked(message[key], key) if _is_given(message, key) else message[key]
             for key in message}
            for message in messages
        ]  # fmt: skip
        return Marked(found, {mark: char for char, mark in sentinel_of.items()}, border)

    def encode(self, marked: Marked, rendered: str) -> list[int]:
        """The tokens of a rendered text with marks. Raises ValueError if the tokenizer cannot
        encode special tokens as text."""
        encoder = self._encoders.get(marked.border)
        if encoder is None:
            encoder = _Encoder.made(self._tokenizer, self._backend, marked.border)
            self._encoders[marked.border] = encoder
        bordered = self._whole.sub(lambda one: marked.border + one[0] + marked.border, rendered)
        return encoder.encode(marked.text(bordered))

    def _has_special(self, text: str) -> bool:
        if not any(first in text for first in self._firsts):
            return False
        return self._begins.search(text) is not None or bool(self._open_ends(text))

    def _open_ends(self, text: str) -> list[int]:
        """The positions where a prefix of a special token ends the text, trailing spaces aside."""
        end = len(text.rstrip())
        starts = range(max(0, end - PREFIX_CHARS + 1), end)
        return [start for start in starts if text[start:end] in self._ends]

    def _marked_text(self, text: str, sentinel_of: Mapping[str, str]) -> str:
        places = [one.start() for one in self._overlapping.finditer(text)]
        chars = list(text)
        for place in places + self._open_ends(text):
            chars[place] = sentinel_of.get(chars[place], chars[place])
        return "".join(chars)


class _Encoder(NamedTuple):
    """Encodes texts in which `border` surrounds each special token that does not come from a
    content.

    quick: a tokenizer whose special tokens all have borders. ids: from its added tokens to the ids
    of the model's tokenizer. names: special tokens that the text vocabulary has too.
    """

    quick: Quick
    ids: dict[int, int]
    names: dict[int, str]

    @classmethod
    def made(cls, tokenizer: Tokenizer, backend: Any | None, border: str) -> _Encoder:
        """An encoder that shares the vocabulary with the tokenizer."""
        if backend is None:
            raise ValueError(_CANNOT)
        added = backend.get_added_tokens_decoder()
        quick = Quick(backend.model)
        quick.normalizer, quick.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        texts = {
            token_id: border + one.content + border if _is_special(one) else one.content
            for token_id, one in added.items()
        }
        quick.add_tokens([_renamed(one, texts[token_id]) for token_id, one in added.items()])
        ids: dict[int, int] = {}
        for token_id, text in texts.items():
            number = quick.token_to_id(text)
            assert number is not None, text
            ids[number] = token_id
        known = {one.content: backend.model.token_to_id(one.content) for one in added.values()}
        names = {
            known[one.content]: one.content
            for one in added.values()
            if _is_special(one) and known[one.content] is not None
        }
        made = cls(quick, ids, names)
        for token_id, one in added.items():
            if _is_special(one):
                made._check(tokenizer, one.content, texts[token_id])
        return made

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for one in encoding(self.quick, text, add_special_tokens=False).ids:
            if one in self.names:  # the text vocabulary also makes it from characters of a content
                found += self._in_parts(self.names[one])
            else:
                found.append(self.ids.get(one, one))
        return found

    def _in_parts(self, name: str) -> list[int]:
        parts = (self.quick.encode(part, add_special_tokens=False) for part in (name[0], name[1:]))
        found = [one for part in parts for one in part.ids]
        if any(one in self.names for one in found):
            raise ValueError(_CANNOT)
        return [self.ids.get(one, one) for one in found]

    def _check(self, tokenizer: Tokenizer, name: str, bordered: str) -> None:
        """Raises ValueError if the tokens differ from the tokenizer's, or if the id of the special
        token is in the text vocabulary."""
        number = self.quick.token_to_id(bordered)
        if number is None or self.quick.model.id_to_token(number) is not None:
            raise ValueError(_CANNOT)
        before, after = PROBE
        expected = tokenizer.encode(before + name + after, add_special_tokens=False)
        if self.encode(before + bordered + after) != expected:
            raise ValueError(_CANNOT)


_CANNOT = (
    "a content has a special token as text, which this tokenizer cannot encode as text: with "
    "special_tokens_as_text=False it is a special token"
)


def _renamed(token: AddedToken, text: str) -> AddedToken:
    return AddedToken(
        text, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=False,
    )  # fmt: skip


def _is_special(token: AddedToken) -> bool:
    return bool(token.special or CONTROL.fullmatch(token.content))


def _is_given(message: Mapping[str, Any], key: str) -> bool:
    """Whether the value of a message comes from a user or a tool."""
    return key == "name" or (message.get("role") not in TRUSTED_ROLES and key not in UNMARKED)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts that may be marked."""
    waiting = [one for m in messages for key, one in m.items() if _is_given(m, key)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [one for key, one in value.items() if key not in UNMARKED]
        elif isinstance(value, (list, tuple)):
            waiting += value


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1]
