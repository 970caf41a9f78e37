"""The checkpoint's tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm import gguf_tokenizer
from nanovllm.models.gguf.header import is_gguf

# A folder with one of these has a tokenizer in one of transformers' layouts, or in Mistral's.
TRANSFORMERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TEKKEN = "tekken.json"
TOKENIZER_FILES = (  # all of its files
    *TRANSFORMERS, TEKKEN, "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
_importing = threading.Lock()
REPLACEMENT = "\ufffd"  # the decoder's output for the first bytes of an incomplete character
# Characters or tokens. More are encoded or decoded in a thread, so that an event loop can go on.
LONG_TEXT = 4096
# How much of a text is encoded for its first tokens: the characters of a token at first, and the
# tokens at the end of a beginning that the rest of the text could change, most of them in one word.
CHARS_PER_TOKEN, NUM_UNSURE = 8, 256


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files, or a GGUF file has one."""
    if is_gguf(folder):
        return gguf_tokenizer.has_tokenizer(folder)
    return any((folder / name).is_file() for name in (*TRANSFORMERS, TEKKEN))


def import_library() -> Any:
    """transformers' AutoTokenizer. The import takes seconds; two at once fail in transformers."""
    with _importing:
        from transformers import AutoTokenizer

        return AutoTokenizer


def load_full(folder: Path) -> Any:
    """transformers' tokenizer of a folder, or of a GGUF file. Raises ValueError for one that needs
    custom code."""
    if is_gguf(folder):
        import_library()
        return gguf_tokenizer.load(folder)
    library = import_library()
    if not any((folder / name).is_file() for name in TRANSFORMERS):
        return _of_tekken(folder / TEKKEN)
    try:
        # without a value transformers would prompt on stdin
        return library.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"the tokenizer in {folder} needs custom code, which is not run") from None


def _of_tekken(path: Path) -> Any:
    """AutoTokenizer converts the file too, but leaves out which tokens begin and end a text. Raises
    ValueError where transformers needs a package for it that is not there."""
    from transformers.integrations import mistral

    try:
        full: Any = mistral.convert_tekken_tokenizer(str(path))  # type: ignore[attr-defined]
    except ImportError as error:  # before 5.20
        raise ValueError(
            f"{path} needs a newer transformers, or the package mistral-common: {error}"
        ) from error
    full.add_bos_token = True
    return full


def encoding(quick: Any, text: str | tuple[str, str], *, add_special_tokens: bool = True) -> Any:
    """The `Encoding` of a text or a pair by a `tokenizers.Tokenizer`.

    `encode` keeps the GIL, so a long text in one thread would stop all others. `encode_batch`
    releases it, but waits for the library's threads, which a short text should not.
    """
    pair = (text,) if isinstance(text, str) else text
    if sum(map(len, pair)) > LONG_TEXT:
        return quick.encode_batch([text], add_special_tokens=add_special_tokens)[0]
    return quick.encode(*pair, add_special_tokens=add_special_tokens)


class Decoding(NamedTuple):
    """How to write special tokens. See the fields of `SamplingParams`."""

    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


DEFAULT = Decoding()


class Tokenizer:
    """Encodes and decodes for the engine.

    `full` is transformers' tokenizer, for users. `quick`, a `tokenizers.Tokenizer` with the same
    ids and text, is used until `full` is first read. From then on `full` is used, so that users'
    changes to it take effect. `for_reading` is the same object, for callers that do not change it.
    """

    def __init__(
        self, load: Callable[[], Any], *, quick: Any | None = None, eos_id: int | None = None
    ) -> None:
        self._load, self._quick, self.eos_id = load, quick, eos_id
        self._full: Any | None = load() if quick is None else None
        self._lock = threading.RLock()
        self._derived: dict[str, Any] = {}

    def use_template(self, template: str) -> None:
        """Replace the checkpoint's chat template. Call it before any other method."""
        load = self._load

        def load_with_template() -> Any:
            full = load()
            full.chat_template = template
            return full

        self._load = load_with_template
        if self._full is not None:
            self._full.chat_template = template

    @property
    def for_reading(self) -> Any:
        if self._full is None:
            with self._lock:
                if self._full is None:
                    self._full = self._load()
        return self._full

    @property
    def full(self) -> Any:
        full, self._quick = self.for_reading, None
        return full

    @full.setter
    def full(self, tokenizer: Any) -> None:
        with self._lock:
            self._full, self._quick = tokenizer, None
            self._derived.clear()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens that the model puts around it."""
        quick = self._quick
        if quick is not None:
            return list(encoding(quick, text, add_special_tokens=add_special_tokens).ids)
        with self._lock:  # transformers' tokenizers can be used by one thread at a time
            return list(self.for_reading.encode(text, add_special_tokens=add_special_tokens))

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of several texts, on several cores if the tokenizer can."""
        quick = self._quick
        if quick is None or sum(map(len, texts)) <= LONG_TEXT:  # as in `encoding`
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        found = quick.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [list(one.ids) for one in found]

    def encode_many(self, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """`encode_first` of several texts, on several cores if the tokenizer can."""
        if self._quick is None or len(texts) < 2:
            return [self.encode_first(text, limit) for text in texts]
        return [self._first(ids, limit) for ids in self.encode_all(texts)]

    def encode_first(self, text: str, limit: int | None) -> list[int]:
        """Token ids of a text; with a limit at most so many. The first tokens of the text are kept,
        and the special tokens around it as far as they fit."""
        return self.encode(text) if limit is None else self._first(self._most(text, limit), limit)

    def _most(self, text: str, limit: int) -> list[int]:
        """Token ids of a text or, if it is long, of a beginning that has more than `limit`."""
        num_tokens = limit + NUM_UNSURE
        num_chars = CHARS_PER_TOKEN * num_tokens
        while num_chars < len(text):
            found = self.encode(text[:num_chars])
            if len(found) > num_tokens:
                return found
            num_chars *= 4  # so all tries together take little more than the whole text
        return self.encode(text)

    def _first(self, found: list[int], limit: int | None) -> list[int]:
        """`encode_first`, from more token ids."""
        if limit is None or len(found) <= limit:
            return found
        num_before, num_after = self.num_around()
        after = found[len(found) - num_after :]
        return (found[: max(num_before, limit - num_after)] + after)[:limit]

    def num_around(self) -> tuple[int, int]:
        """How many special tokens stand before a text, and how many after it."""
        letter, plain = self.encode("a"), self.encode("a", add_special_tokens=False)
        num = len(letter) - len(plain)
        before = (i for i in range(num + 1) if letter[i : i + len(plain)] == plain)
        num_before = next(before, 0)
        return num_before, num - num_before

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], int]:
        """Token ids of two texts as one sequence, and where the second begins. With a limit the end
        of the second is dropped. Raises ValueError if nothing of it would be left, and for a
        tokenizer without tokenizer.json."""
        found = self._pair(first, second)
        token_ids, owners = list(found.ids), list(found.sequence_ids)
        second_at = owners.index(1) if 1 in owners else len(owners)
        if limit is None or len(token_ids) <= limit:
            return token_ids, second_at
        end = len(owners) - owners[::-1].index(1)
        num_kept = end - second_at - (len(token_ids) - limit)
        if num_kept < 1:
            raise ValueError(
                f"the first text takes {second_at} tokens: with at most {limit} none is left for "
                "the second"
            )
        return token_ids[: second_at + num_kept] + token_ids[end:], second_at

    def _pair(self, first: str, second: str) -> Any:
        quick = self._quick
        if quick is not None:
            return encoding(quick, (first, second))
        with self._lock:
            backend = self.backend()
            backend.no_truncation()  # transformers sets both at every call
            backend.no_padding()
            return encoding(backend, (first, second))

    def decode(self, token_ids: Sequence[int], how: Decoding = DEFAULT) -> str:
        """The text of tokens. Each incomplete character becomes one U+FFFD."""
        if how.skip_special_tokens or how.spaces_between_special_tokens:
            return self._decode(token_ids, how.skip_special_tokens)
        special = self.once("special", self._special_ids)
        groups = groupby(token_ids, key=lambda token_id: token_id in special)
        return "".join(
            "".join(self._decode([one], False) for one in group)
            if is_special
            else self._decode(list(group), False)
            for is_special, group in groups
        )

    def text_of(self, token_id: int) -> str:
        """The text of one token, special or not. Each token is decoded once."""
        known: dict[int, str] = self.once("texts", dict)
        if token_id not in known:
            known[token_id] = self._decode([token_id], False)
        return known[token_id]

    def has_text(self, token_id: int, how: Decoding = DEFAULT) -> bool:
        """Whether the token adds to the text. Skipped special tokens and ids without a token do
        not."""
        known: dict[tuple[int, bool], bool] = self.once("has text", dict)
        key = token_id, how.skip_special_tokens
        if key not in known:
            letter = self.once("letter", lambda: self.encode("a", add_special_tokens=False))
            between = self._decode([*letter, token_id, *letter], how.skip_special_tokens)
            known[key] = between != self._decode([*letter, *letter], how.skip_special_tokens)
        return known[key]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token's text. A token of a byte vocabulary can be a part of a character,
        which `decode` shows as U+FFFD."""
        known: dict[int, bytes] = self.once("raw", dict)
        if token_id not in known:
            known[token_id] = self._bytes_of(token_id)
        return known[token_id]

    def _bytes_of(self, token_id: int) -> bytes:
        text = self._decode([token_id], False)
        byte_tokens = self.once("bytes", self._byte_tokens)
        if byte_tokens is not None and token_id in byte_tokens[0]:
            return bytes([byte_tokens[0][token_id]])
        written = self._written(token_id)
        table = self.once("alphabet", _bytes_of_characters)
        if REPLACEMENT not in text or not all(one in table for one in written):
            return text.encode()
        found = bytes(table[one] for one in written)
        return found if found.decode("utf-8", "replace") == text else text.encode()

    def _written(self, token_id: int) -> str:
        """A token in the form of the vocabulary."""
        quick = self._quick
        if quick is not None:
            return quick.id_to_token(token_id) or ""
        return str(self.for_reading.convert_ids_to_tokens(token_id))

    def as_json(self) -> str:
        """The tokenizer in the form of tokenizer.json. Raises ValueError for one without it."""
        return str(self.backend().to_str())

    def num_tokens(self) -> int:
        """One more than the largest id. Raises ValueError as `as_json` does."""
        return max(self.backend().get_vocab(with_added_tokens=True).values()) + 1

    def special_tokens(self) -> dict[int, str]:
        """The texts of special tokens by their ids. Raises ValueError as `as_json` does."""
        added = self.backend().get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that does the work. Raises ValueError if there is none."""
        quick = self._quick
        found = quick if quick is not None else self.for_reading
        found = getattr(found, "backend_tokenizer", found)
        if not hasattr(found, "to_str"):
            raise ValueError("the tokenizer has no tokenizer.json, so its tokens are unknown")
        return found

    def once(self, name: str, derive: Callable[[], Any]) -> Any:
        """The result of `derive`, computed once per tokenizer."""
        if name not in self._derived:
            self._derived[name] = derive()
        return self._derived[name]

    def _special_ids(self) -> frozenset[int]:
        quick = self._quick
        if quick is None:
            return frozenset(self.for_reading.all_special_ids)
        added = quick.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        mended = self._mended(list(token_ids))
        quick = self._quick  # another thread may read `full` meanwhile
        if quick is not None and len(mended) > LONG_TEXT:  # as in `encoding`
            return str(quick.decode_batch([mended], skip_special_tokens=skip_special_tokens)[0])
        reader = quick if quick is not None else self.for_reading
        return str(reader.decode(mended, skip_special_tokens=skip_special_tokens))

    def _mended(self, token_ids: list[int]) -> list[int]:
        """The ids with incomplete characters of byte tokens replaced by those of U+FFFD.

        A decoder with byte tokens ("<0xE4>") makes U+FFFD of every byte in a run of bytes if one of
        its characters is incomplete.
        """
        byte_tokens = self.once("bytes", self._byte_tokens)
        if byte_tokens is None or byte_tokens[0].keys().isdisjoint(token_ids):
            return token_ids
        byte_of, id_of = byte_tokens
        found: list[int] = []
        for is_byte, group in groupby(token_ids, key=byte_of.__contains__):
            if is_byte:
                raw = bytes(map(byte_of.__getitem__, group))
                found += [id_of[one] for one in raw.decode("utf-8", "replace").encode()]
            else:
                found += group
        return found

    def _byte_tokens(self) -> tuple[dict[int, int], list[int]] | None:
        """({token id: byte}, token id of each byte) if the decoder joins byte tokens."""
        quick = self._quick
        reader = quick if quick is not None else self.for_reading
        look_up = quick.token_to_id if quick is not None else reader.convert_tokens_to_ids
        ids = [look_up(f"<0x{byte:02X}>") for byte in range(256)]
        if None in ids or len(set(ids)) < 256:
            return None
        if reader.decode([ids[0xC3], ids[0xA9]]).strip() != "\u00e9":
            return None
        return {token_id: byte for byte, token_id in enumerate(ids)}, ids


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character stands for in vocabularies of GPT-2's kind: itself where it can
    be printed, and for the others the characters from U+0100 on, in their order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }
