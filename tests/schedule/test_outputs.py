"""Streamed text equals text decoded at once and never contains a part of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanovllm.schedule.outputs import TextStream
from nanovllm.tokenizer import GrowingText, load_tokenizer
from tests.engines import save_tokenizer

TEXTS = [
    "",
    "a",
    "the thin man on another inn",
    "  two  spaces\n\n and\tlines ",
    "naïve café, ½ price – “quoted”",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦🇩🇪 family and flag 🎉",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u0301 combining",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def grow(tokenizer: Any, token_ids: list[int], sizes: list[int]) -> list[str]:
    growing, pieces, start = GrowingText(tokenizer), [], 0
    for size in sizes:
        pieces.append(growing.append(token_ids[start : start + size]))
        start += size
    pieces += [growing.append(token_ids[start:]), growing.flush()]
    assert growing.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_characters_across_tokens_grow_to_the_full_text(tokenizer: Any, text: str) -> None:
    token_ids = tokenizer.encode(text)
    pieces = grow(tokenizer, token_ids, [1] * len(token_ids))
    assert "".join(pieces) == text == tokenizer.decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_grow_to_what_decoding_at_once_gives(tokenizer: Any, seed: int) -> None:
    """Random tokens, with incomplete characters, special tokens (not shown) and merges."""
    rng = random.Random(seed)
    for num in (1, 2, 19, 99):
        token_ids = [rng.randrange(0, 280) for _ in range(num)]
        sizes = [rng.choice([1, 1, 2, 5]) for _ in range(num)]
        assert "".join(grow(tokenizer, token_ids, sizes)) == tokenizer.decode(
            token_ids, skip_special_tokens=True
        )


def test_an_unfinished_character_is_shown_once_no_more_tokens_come(tokenizer: Any) -> None:
    token_ids = tokenizer.encode("aé")[:-1]
    growing = GrowingText(tokenizer)
    assert [growing.append([token_id]) for token_id in token_ids] == ["a", ""]
    assert growing.flush() == "\ufffd" and growing.flush() == ""


def test_spaces_of_a_sentencepiece_style_decoder() -> None:
    from tokenizers import Tokenizer, decoders, models

    words = ["▁a", "▁b", "c", "▁", "<0xC3>", "<0xA9>"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    token_ids = [0, 2, 1, 3, 2, 4, 5, 0]
    assert (
        "".join(grow(tokenizer, token_ids, [1] * 8)) == tokenizer.decode(token_ids) == "ac b cé a"
    )


# stop strings -------------------------------------------------------------------------------------


def feed(
    tokenizer: Any, text: str, stops: tuple[str, ...], *, min_tokens: int = 0, size: int = 1
) -> tuple[list[str], str, bool]:
    """Feed `size` tokens at a time; returns (pieces, final text, whether it stopped)."""
    stream = TextStream(tokenizer, stops, incremental=True)
    token_ids = tokenizer.encode(text)
    pieces: list[str] = []
    for start in range(0, len(token_ids), size):
        if stream.push(token_ids[start : start + size], may_stop=start + size >= min_tokens):
            pieces.append(stream.take(last=True))
            return pieces, stream.text, True
        pieces.append(stream.take(last=False))
    pieces.append(stream.take(last=True))
    return pieces, stream.text, False


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("xyz",), None),
        ("one two", ("one",), ""),
        ("aaab", ("aab",), "a"),
        ("abababc", ("ababc",), "ab"),
        ("### no\n### Human: x", ("### Human:", "### Assistant:"), "### no\n"),
        ("grüße 日本", ("ße 日",), "grü"),
        ("end.", (".",), "end"),
    ],
)
def test_stop_strings_cut_the_text(
    tokenizer: Any, text: str, stops: tuple[str, ...], expected: str | None, size: int
) -> None:
    pieces, final, stopped = feed(tokenizer, text, stops, size=size)
    assert stopped == (expected is not None)
    assert final == "".join(pieces) == (text if expected is None else expected)


def test_what_could_begin_a_stop_string_is_held_back_and_no_more(tokenizer: Any) -> None:
    pieces, final, stopped = feed(tokenizer, "xSTxSTOy", ("STOP", "STEP"))
    assert (
        pieces == ["x", "", "", "STx", "", "", "", "STOy", ""]
        and final == "xSTxSTOy"
        and not stopped
    )


@pytest.mark.parametrize("seed", range(20))
def test_streams_never_show_any_part_of_a_stop_string(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(99))
    stops = tuple({"".join(rng.choice("ab") for _ in range(rng.randrange(4, 8))) for _ in range(2)})
    pieces, final, stopped = feed(tokenizer, text, stops)
    # character by character: the text ends at the first complete match; of several, at the earliest
    end = next((i for i in range(len(text) + 1) if text[:i].endswith(stops)), None)
    assert stopped == (end is not None)
    if end is None:
        assert final == "".join(pieces) == text
    else:
        assert (
            final
            == "".join(pieces)
            == text[: min(text[:end].find(s) for s in stops if s in text[:end])]
        )


def test_a_stop_string_before_min_tokens_stays_and_does_not_stop_later(tokenizer: Any) -> None:
    pieces, final, stopped = feed(tokenizer, "ab ab xy", ("ab", "a long stop string"), min_tokens=3)
    assert stopped and final == "".join(pieces) == "ab "
    # the stop string ends before min_tokens; the longer stop string could still match
    pieces, final, stopped = feed(tokenizer, "abxy", ("ab", "a long stop string"), min_tokens=3)
    assert not stopped and final == "".join(pieces) == "abxy"


def test_nothing_is_decoded_before_the_end_unless_needed(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, (), incremental=False)
    assert not stream.push([50], may_stop=True) and stream.take(last=False) == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, (), incremental=True)
    assert not stream.push([1, 2], may_stop=True)
    assert stream.take(last=False) == "" == stream.take(last=True)
