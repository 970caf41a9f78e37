"""Long texts are encoded and decoded without the GIL, and only as far as their tokens are kept; a
tokenizer of Mistral's own format."""

from __future__ import annotations

import copy
import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from nanovllm.special_text import FREE, _Encoder
from nanovllm.tokenizer import LONG_TEXT, Decoding, Tokenizer, has_tokenizer, load_full
from tests.engines import save_tokenizer

LONG = "the theory of <end> an inn, naïve 日本 " * (LONG_TEXT // 16)


class Watched:
    """A `tokenizers.Tokenizer` whose methods that keep the GIL take no long texts."""

    def __init__(self, quick: Any) -> None:
        self._quick = quick
        self.num_chars = 0  # encoded in batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._quick, name)

    def encode(self, *texts: str, **options: Any) -> Any:
        assert sum(map(len, texts)) <= LONG_TEXT, "the GIL is kept"
        return self._quick.encode(*texts, **options)

    def encode_batch(self, texts: list[Any], **options: Any) -> Any:
        self.num_chars += sum(len(one) for one in texts if isinstance(one, str))
        return self._quick.encode_batch(texts, **options)

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


@pytest.mark.parametrize("text", [LONG * 4, "the inn" + " " * 99_999 + "on" * 9999, "ab" * 99_999])
def test_the_first_tokens_are_those_of_the_whole_text(
    tokenizer: Tokenizer, full: Any, text: str
) -> None:
    ends = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 3)])
    around = copy.deepcopy(full)
    around.backend_tokenizer.post_processor = ends
    whole = Tokenizer(lambda: around, quick=around.backend_tokenizer)
    for limit in (1, 2, 3, 9, 500):
        wanted = tokenizer.encode(text)[:limit]
        assert tokenizer.encode_first(text, limit) == wanted
        wanted = [1, *tokenizer.encode(text)[: limit - 2], 3] if limit > 2 else [1, 3][:limit]
        assert whole.encode_first(text, limit) == wanted
        assert whole.encode_many([text, text], limit) == [wanted, wanted]
    assert whole.encode_first("inn", 9) == whole.encode("inn")


@pytest.mark.parametrize("num", [1, LONG_TEXT // 8])
def test_texts_that_are_long_together_do_not_keep_the_gil(full: Any, num: int) -> None:
    watched = Watched(full.backend_tokenizer)
    tokenizer, texts = Tokenizer(lambda: full, quick=watched), ["the inn on", "an inn <end>"] * num
    for has_special in (False, True):
        wanted = [tokenizer.encode(text, add_special_tokens=has_special) for text in texts]
        assert tokenizer.encode_all(texts, add_special_tokens=has_special) == wanted
    assert watched.num_chars == (0 if num == 1 else 2 * sum(map(len, texts)))


def test_a_text_is_not_encoded_to_its_end_for_its_first_tokens(full: Any) -> None:
    watched = Watched(full.backend_tokenizer)
    tokenizer = Tokenizer(lambda: full, quick=watched)
    text = "the inn on " * 100_000
    assert len(tokenizer.encode_first(text, 500)) == 500
    assert 0 < watched.num_chars < len(text) // 50


def test_a_folder_with_tekken_json_alone_has_a_tokenizer(tmp_path: Path) -> None:
    """As several of Mistral's checkpoints. Ids of special tokens come first."""
    assert not has_tokenizer(tmp_path)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    texts = [*(bytes([byte]) for byte in range(256)), b"th"]
    content = {
        "config": {
            "pattern": r"\s?\p{L}+|\s|\p{N}", "num_vocab_tokens": len(texts), "version": "v7",
            "default_vocab_size": len(special) + len(texts),
            "default_num_special_tokens": len(special),
        },
        "vocab": [
            {"rank": rank, "token_bytes": b64encode(text).decode(), "token_str": None}
            for rank, text in enumerate(texts)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True}
            for rank, text in enumerate(special)
        ],
    }  # fmt: skip
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]")
    assert has_tokenizer(tmp_path)
    full = load_full(tmp_path)
    ids = full.encode("the é")
    assert ids == [1, *(4 + one for one in (256, ord("e"), ord(" "), *"é".encode()))]
    assert full.decode(ids, skip_special_tokens=True) == "the é" and full.eos_token_id == 2
    messages = [{"role": "user", "content": "hi"}]
    assert full.apply_chat_template(messages, tokenize=False) == "<s>[hi]"
