"""The rows of the output: an answer or an error, one JSON object per line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput

MAX_ERROR_CHARS = 500


@dataclass(frozen=True)
class Result:
    """A finished row. line: the output line, with its newline. num_tokens: generated tokens, or
    those of the prompt for a model that pools."""

    row: int
    line: bytes
    num_tokens: int
    is_error: bool


def answer(row: int, row_id: Any, done: FinishedOutput) -> Result:
    """The result of a finished request; an error if generation failed."""
    if done.error is not None:
        return failure(row, row_id, done.error)
    if done.pooled is not None:
        return _pooled(row, row_id, done)
    num_prompt, num_tokens = len(done.prompt_ids), len(done.token_ids)
    fields = {
        "row": row,
        "id": row_id,
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        },
    }
    if done.logprobs is not None:
        fields["logprobs"] = [_position(found) for found in done.logprobs]
    if done.prompt_logprobs is not None:
        fields["prompt_logprobs"] = [_position(found) for found in done.prompt_logprobs]
    return Result(row, _line(fields), num_tokens, is_error=False)


def _pooled(row: int, row_id: Any, done: FinishedOutput) -> Result:
    """The result of a model that pools: its numbers. The tokens counted are the prompt's."""
    assert done.pooled is not None
    num = len(done.prompt_ids)
    usage = {"prompt_tokens": num, "total_tokens": num}
    fields = {"row": row, "id": row_id, "data": done.pooled.tolist(), "usage": usage}
    return Result(row, _line(fields), num, is_error=False)


def failure(row: int, row_id: Any, reason: str) -> Result:
    """The result of a row with an error."""
    if len(reason) > MAX_ERROR_CHARS:
        reason = f"{reason[:MAX_ERROR_CHARS]}…"
    return Result(row, _line({"row": row, "id": row_id, "error": reason}), 0, is_error=True)


def _position(found: dict[int, Logprob] | None) -> list[dict[str, Any]] | None:
    """The log-probabilities of one position, likeliest first; None for the prompt's first token."""
    if found is None:
        return None
    return [
        {
            "token_id": token_id,
            # JSON has no infinity
            "logprob": float(value) if math.isfinite(value) else None,
            "rank": value.rank,
            "decoded_token": value.decoded_token,
        }
        for token_id, value in found.items()
    ]


def _line(fields: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # an id, for example, may contain a lone surrogate
        text = json.dumps(fields, allow_nan=False).encode()
    return text + b"\n"
