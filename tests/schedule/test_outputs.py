"""Streamed text equals text decoded at once and never contains a part of a stop string."""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

import pytest

from nanovllm.sampling import SamplingParams
from nanovllm.schedule.incremental_text import IncrementalText
from nanovllm.schedule.outputs import TextStream
from nanovllm.tokenizer import Decoding, Tokenizer, load_full
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
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer(lambda: load_full(folder))


def grow(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    growing, pieces, start = IncrementalText(tokenizer), [], 0
    for size in sizes:
        pieces.append(growing.append(token_ids[start : start + size]))
        start += size
    return [*pieces, growing.append(token_ids[start:]), growing.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_across_tokens_grow_to_the_full_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    pieces = grow(tokenizer, token_ids, [1] * len(token_ids))
    assert "".join(pieces) == text == tokenizer.decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_grow_to_what_decoding_at_once_gives(tokenizer: Tokenizer, seed: int) -> None:
    """Random tokens, with incomplete characters, special tokens (not shown) and merges."""
    rng = random.Random(seed)
    for num in (1, 2, 19, 99):
        token_ids = [rng.randrange(0, 280) for _ in range(num)]
        sizes = [rng.choice([1, 1, 2, 5]) for _ in range(num)]
        assert "".join(grow(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


def test_an_unfinished_character_is_shown_once_no_more_tokens_come(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("aé")[:-1]
    growing = IncrementalText(tokenizer)
    assert [growing.append([token_id]) for token_id in token_ids] == ["a", ""]
    assert growing.flush() == "\ufffd" and growing.flush() == ""


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
WORDS = {word: 256 + i for i, word in enumerate(["▁a", "▁b", "c", "▁"])}


@pytest.fixture(scope="module", params=["quick", "full"])
def byte_fallback(request: pytest.FixtureRequest) -> Tokenizer:
    return sentencepiece(is_quick=request.param == "quick")


def sentencepiece(*, is_quick: bool) -> Tokenizer:
    """A tokenizer in the style of SentencePiece: ids 0 … 255 are the bytes."""
    from tokenizers import Tokenizer as Quick
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    quick = Quick(models.BPE({**BYTES, **WORDS}, []))
    quick.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    full = PreTrainedTokenizerFast(tokenizer_object=quick)
    return Tokenizer(lambda: full, quick=quick if is_quick else None)


def test_spaces_of_a_sentencepiece_style_decoder(byte_fallback: Tokenizer) -> None:
    token_ids = [256, 258, 257, 259, 258, 0xC3, 0xA9, 256]
    pieces = grow(byte_fallback, token_ids, [1] * 8)
    assert "".join(pieces) == byte_fallback.decode(token_ids) == "ac b cé a"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("né日本".encode()[:-1], "né日\ufffd"),
        ("né日本".encode()[:-2], "né日\ufffd"),
        ("🎉".encode()[:3], "\ufffd"),
        ("日".encode()[:2] + "本".encode(), "\ufffd本"),
        (b"\xff\xfe!", "\ufffd\ufffd!"),
        ("ok \ufffd".encode(), "ok \ufffd"),
    ],
)
def test_whole_characters_of_cut_bytes_stay(
    byte_fallback: Tokenizer, raw: bytes, text: str
) -> None:
    """One U+FFFD for each incomplete character, streamed or decoded at once, wherever it is."""
    for token_ids, expected in ((list(raw), text), ([256, *raw, 257], f"a{text} b")):
        assert byte_fallback.decode(token_ids) == expected
        for sizes in ([1] * len(token_ids), [2] * len(token_ids)):
            assert "".join(grow(byte_fallback, token_ids, sizes)) == expected


LONE = [0xE4, 0xB8, 0x80, 0xF0, 0x9F, 0xFF, 0xC3]  # bytes that are no whole characters


def byte_ids(tokenizer: Tokenizer, raw: list[int]) -> list[int]:
    """The tokens of single bytes in a vocabulary of bytes."""
    known = {tokenizer.bytes_of(token_id): token_id for token_id in range(280)}
    return [known[bytes([byte])] for byte in raw]


def special_id(tokenizer: Tokenizer) -> int:
    return next(iter(tokenizer.special_tokens()))


@pytest.fixture(params=["bytes", "quick", "full"])
def any_bytes(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> tuple[str, Tokenizer]:
    """A vocabulary of bytes, and one with tokens for bytes."""
    if request.param == "bytes":
        return "bytes", tokenizer
    return "fallback", sentencepiece(is_quick=request.param == "quick")


@pytest.mark.parametrize("kind", ["lone", "whole", "several", "special", "unknown"])
def test_text_that_stays_incomplete_decodes_each_token_a_few_times(
    any_bytes: tuple[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, tokenizer = any_bytes
    num = 2000
    raw = {"lone": [0xE4], "whole": [0xEF, 0xBF, 0xBD], "several": [0xB8, 0xE4]}.get(kind)
    if raw is not None:
        ids = raw if name == "fallback" else byte_ids(tokenizer, raw)
    elif kind == "special":
        ids = [special_id(tokenizer)] if name == "bytes" else [256]
    else:
        ids = [100_000]
    token_ids = (ids * num)[:num]
    decoded, decode = [], tokenizer._decode

    def counted(some: Any, skip_special_tokens: bool) -> str:
        decoded.append(len(some))
        return decode(some, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "_decode", counted)
    pieces = grow(tokenizer, token_ids, [1] * num)
    assert sum(decoded) < 25 * num
    monkeypatch.undo()
    assert "".join(pieces) == tokenizer.decode(token_ids)
    if raw is not None:  # it is also sent, and not held back until the end
        assert len("".join(pieces[:-1])) >= len("".join(pieces)) - 1


@pytest.mark.parametrize("seed", range(20))
def test_text_of_cut_characters_does_not_depend_on_the_pieces(
    any_bytes: tuple[str, Tokenizer], seed: int
) -> None:
    """Mostly parts of characters, with tokens between them that have no text."""
    name, tokenizer = any_bytes
    rng = random.Random(seed)
    parts = LONE if name == "fallback" else byte_ids(tokenizer, LONE)
    silent = [100_000] if name == "fallback" else [100_000, special_id(tokenizer)]
    others = [256, 257, 259] if name == "fallback" else tokenizer.encode("a é日🎉")
    weights = rng.choice([(20, 1, 1), (5, 5, 1), (1, 9, 0), (9, 0, 9)])
    token_ids = [rng.choice(rng.choices([parts, silent, others], weights)[0]) for _ in range(200)]
    sizes = [rng.choice([1, 1, 1, 2, 19]) for _ in range(200)]
    assert "".join(grow(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


def test_special_tokens_are_written_on_request() -> None:
    from tokenizers import Tokenizer as Quick
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    # this tokenizer has no decoder: it puts a space between any two tokens
    quick = Quick(models.WordLevel({"a": 0, "b": 1, "<x>": 2, "<y>": 3}, unk_token="a"))
    full = PreTrainedTokenizerFast(
        tokenizer_object=quick, bos_token="<x>", additional_special_tokens=["<y>"]
    )
    for tokenizer in (
        Tokenizer(lambda: full),
        Tokenizer(lambda: full, quick=full.backend_tokenizer),
    ):
        ids = [0, 1, 2, 3, 0]
        assert tokenizer.decode(ids) == "a b a"
        shown = Decoding(skip_special_tokens=False)
        assert tokenizer.decode(ids, shown) == "a b <x> <y> a"
        joined = shown._replace(spaces_between_special_tokens=False)
        assert tokenizer.decode(ids, joined) == "a b<x><y>a"


# stop strings -------------------------------------------------------------------------------------


def feed(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], *, size: int = 1, **options: Any
) -> tuple[list[str], str, bool]:
    """Feed `size` tokens at a time; returns (pieces, final text, whether it stopped)."""
    params = SamplingParams(stop=stops, **options)
    stream = TextStream(tokenizer, params, incremental=True)
    token_ids = tokenizer.encode(text)
    pieces: list[str] = []
    for start in range(0, len(token_ids), size):
        if stream.push(token_ids[start : start + size]):
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
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], expected: str | None, size: int
) -> None:
    pieces, final, stopped = feed(tokenizer, text, stops, size=size)
    assert stopped == (expected is not None)
    assert final == "".join(pieces) == (text if expected is None else expected)


def test_what_could_begin_a_stop_string_is_held_back_and_no_more(tokenizer: Tokenizer) -> None:
    pieces, final, stopped = feed(tokenizer, "xSTxSTOy", ("STOP", "STEP"))
    assert (
        pieces == ["x", "", "", "STx", "", "", "", "STOy", ""]
        and final == "xSTxSTOy"
        and not stopped
    )


@pytest.mark.parametrize("seed", range(20))
def test_streams_never_show_any_part_of_a_stop_string(tokenizer: Tokenizer, seed: int) -> None:
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


def test_a_stop_string_before_min_tokens_stays_and_does_not_stop_later(
    tokenizer: Tokenizer,
) -> None:
    pieces, final, stopped = feed(tokenizer, "ab ab xy", ("ab", "a long stop string"), min_tokens=3)
    assert stopped and final == "".join(pieces) == "ab "
    # the stop string ends before min_tokens; the longer stop string could still match
    pieces, final, stopped = feed(tokenizer, "abxy", ("ab", "a long stop string"), min_tokens=3)
    assert not stopped and final == "".join(pieces) == "abxy"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, "x"), (2, "x"), (3, "xabay"), (6, "xabay"), (7, None), (8, None)],
)
def test_a_stop_string_ends_after_the_first_min_tokens_and_may_begin_within(
    tokenizer: Tokenizer, min_tokens: int, expected: str | None, size: int
) -> None:
    """Each character is a token."""
    text = "xabayaba"
    pieces, final, stopped = feed(tokenizer, text, ("ab",), size=size, min_tokens=min_tokens)
    assert stopped == (expected is not None)
    assert final == "".join(pieces) == (expected or text)


def test_nothing_is_decoded_before_the_end_unless_needed(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(), incremental=False)
    assert not stream.push([50]) and stream.take(last=False) == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, SamplingParams(), incremental=True)
    assert not stream.push([1, 2])
    assert stream.take(last=False) == "" == stream.take(last=True)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_stop_string_stays_on_request(tokenizer: Tokenizer, size: int) -> None:
    pieces, final, stopped = feed(
        tokenizer, "one two three", ("two", "xyz"), size=size, include_stop_str_in_output=True
    )
    assert stopped and final == "".join(pieces) == "one two"


def test_the_stop_string_that_ended_the_text_is_known(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=["wo", "two t"]), incremental=True)
    assert stream.push(tokenizer.encode("one two three"))
    assert stream.stop_string == "two t" and stream.text == "one "


@pytest.mark.parametrize(
    ("stops", "incremental"), [((), True), (("xyz",), True), (("xyz",), False)]
)
def test_a_long_text_is_not_copied_for_each_token(
    tokenizer: Tokenizer, stops: tuple[str, ...], incremental: bool
) -> None:
    """A copy would be there beside the text, for a moment."""
    params = SamplingParams(stop=list(stops))
    stream = TextStream(tokenizer, params, incremental=incremental)
    token_ids = tokenizer.encode("the thin man on another inn " * 20)
    num_characters = 0
    tracemalloc.start()
    try:
        for _ in range(500):
            stream.push(token_ids)
            if incremental:
                num_characters += len(stream.take(last=False))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stream.finish(token_ids)
    num_characters += len(stream.take(last=True))
    assert num_characters == len(stream.text) > 200_000
    assert most < 1.5 * num_characters


def test_many_long_stop_strings_cost_little(tokenizer: Tokenizer) -> None:
    """The cost of a token, in processor time, hardly depends on the number and the length of the
    strings."""
    text = "the thin man on another inn " * 40
    token_ids = tokenizer.encode(text)

    def seconds(stops: list[str]) -> float:
        stream = TextStream(tokenizer, SamplingParams(stop=stops), incremental=True)
        start = time.thread_time()
        for token_id in token_ids:
            assert not stream.push([token_id])
            stream.take(last=False)
        return time.thread_time() - start

    long = [f"{i} {text}"[:500] for i in range(200)]
    few = min(seconds(["xyz"]) for _ in range(3))
    assert min(seconds(long) for _ in range(3)) < 3 * few + 0.02
