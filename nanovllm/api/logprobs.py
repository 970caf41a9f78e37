"""Log-probabilities in the formats of OpenAI's API and vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nanovllm.outputs import TopLogprobs
from nanovllm.schedule.logprobs import Logprob

LOWEST = -9999.0  # OpenAI's value for an impossible token: JSON has no infinity


def token_text(token_id: int, value: Logprob, as_id: bool) -> str:
    text = None if as_id else value.decoded_token
    return f"token_id:{token_id}" if text is None else text


def of_chat(
    token_ids: Sequence[int], found: Sequence[TopLogprobs], num_top: int, as_ids: bool
) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for token_id, top in zip(token_ids, found):
        entry = _entry(token_id, top[token_id], as_ids)
        entry["top_logprobs"] = [_entry(one, top[one], as_ids) for one in _likeliest(top, num_top)]
        content.append(entry)
    return {"content": content, "refusal": None}


def of_completion(
    token_ids: Sequence[int],
    found: Sequence[TopLogprobs | None],
    num_top: int,
    as_ids: bool,
    offset: int,
    first: str = "",
) -> dict[str, Any]:
    """`logprobs` of a completion choice.

    found: None for a prompt's first token, whose text is `first`. offset: the characters of the
    answer before these tokens.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[msgspec.Raw | None] = []
    offsets: list[int] = []
    for token_id, top in zip(token_ids, found):
        text = first if top is None else token_text(token_id, top[token_id], as_ids)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if top is None else _finite(top[token_id]))
        named = None
        if top is not None:
            shown = {**dict.fromkeys(_likeliest(top, num_top)), token_id: None}
            named = _encoded(
                {token_text(one, top[one], as_ids): _finite(top[one]) for one in shown}
            )
        tops.append(named)
    return {
        "text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops
    }  # fmt: skip


def of_prompt(found: Sequence[TopLogprobs | None]) -> list[msgspec.Raw | None]:
    """vLLM's `prompt_logprobs`: for each position, entries by token id."""
    return [
        None
        if top is None
        else _encoded({
            str(token_id): {
                "logprob": _finite(value), "rank": value.rank,
                "decoded_token": value.decoded_token,
            }
            for token_id, value in top.items()
        })
        for top in found
    ]  # fmt: skip


def _encoded(position: dict[str, Any]) -> msgspec.Raw:
    """The JSON of one position. A prompt has many, and no other thread could run while all of them
    were encoded at once."""
    return msgspec.Raw(msgspec.json.encode(position))


def _likeliest(top: Mapping[int, Logprob], num: int) -> Iterator[int]:
    return (token_id for token_id, value in top.items() if value.rank <= num)


def _entry(token_id: int, value: Logprob, as_id: bool) -> dict[str, Any]:
    text = token_text(token_id, value, as_id)
    raw = text.encode() if as_id else value.token_bytes
    return {"token": text, "logprob": _finite(value), "bytes": list(raw)}


def _finite(value: float) -> float:
    return max(float(value), LOWEST)
