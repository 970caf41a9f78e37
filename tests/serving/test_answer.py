"""A client's side of one answer, whose tokens come one by one or several at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.replicas.messages import Done, RowTokens
from nanovllm.sampling import SamplingParams
from nanovllm.serving.answer import Answer
from nanovllm.tokenizer import Tokenizer, load_full
from tests.engines import save_tokenizer


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize(("min_tokens", "num_kept"), [(0, 3), (2, 3), (3, 7), (6, 7), (7, 8)])
def test_a_stop_string_within_min_tokens_ends_nothing(
    size: int, min_tokens: int, num_kept: int, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer(lambda: load_full(tmp_path))
    text = "xabayaba"  # each character is a token
    ids = tokenizer.encode(text)
    params = SamplingParams(stop="ab", min_tokens=min_tokens)
    answer = Answer(0, params, [5], tokenizer, incremental=True)
    for start in range(0, len(ids), size):
        answer.add(RowTokens(0, ids[start : start + size]))
    answer.add(RowTokens(0, [], done=Done("length", None, 0, None, None)))
    answer.take()
    assert answer.done is not None and answer.done.token_ids == ids[:num_kept]
    assert answer.done.text == (text if num_kept == 8 else text[: num_kept - 2])
    assert answer.done.stop_reason == (None if num_kept == 8 else "ab")
