"""Long texts are encoded and decoded without the GIL, to the same tokens and text."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.special_text import FREE, _Encoder
from nanovllm.tokenizer import LONG_TEXT, Decoding, Tokenizer, load_full
from tests.engines import save_tokenizer

LONG = "the theory of <end> an inn, naïve 日本 " * (LONG_TEXT // 16)


class Watched:
    """A `tokenizers.Tokenizer` whose methods that keep the GIL take no long texts."""

    def __init__(self, quick: Any) -> None:
        self._quick = quick

    def __getattr__(self, name: str) -> Any:
        return getattr(self._quick, name)

    def encode(self, *texts: str, **options: Any) -> Any:
        assert sum(map(len, texts)) <= LONG_TEXT, "the GIL is kept"
        return self._quick.encode(*texts, **options)

    def decode(self, ids: list[int], **options: Any) -> Any:
        assert len(ids) <= LONG_TEXT, "the GIL is kept"
        return self._quick.decode(ids, **options)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_full(folder)


@pytest.fixture
def tokenizer(full: Any) -> Tokenizer:
    return Tokenizer(lambda: full, quick=Watched(full.backend_tokenizer))


@pytest.mark.parametrize("text", ["", "the inn", LONG])
def test_no_length_keeps_the_gil_or_changes_tokens(
    tokenizer: Tokenizer, full: Any, text: str
) -> None:
    backend = full.backend_tokenizer
    for has_special in (False, True):
        expected = backend.encode(text, add_special_tokens=has_special).ids
        assert tokenizer.encode(text, add_special_tokens=has_special) == expected
    ids, second_at = tokenizer.encode_pair("a", text, None)
    assert (ids, second_at) == (backend.encode("a", text).ids, 1)
    assert tokenizer.encode_pair(text, "a", None)[0] == backend.encode(text, "a").ids
    for skip in (False, True):
        expected = backend.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, Decoding(skip)) == expected


def test_long_rendered_texts_with_marks_do_not_keep_the_gil(
    tokenizer: Tokenizer, full: Any
) -> None:
    border = FREE[0]
    made = _Encoder.made(tokenizer, full.backend_tokenizer, border)
    encoder = made._replace(quick=Watched(made.quick))
    bordered = LONG.replace("<end>", f"{border}<end>{border}")
    assert encoder.encode(bordered) == tokenizer.encode(LONG, add_special_tokens=False)
    assert len(encoder.encode(LONG)) > len(encoder.encode(bordered)), "<end> is text"
