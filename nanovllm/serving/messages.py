"""What clients and the engine's process send to each other: msgpack, in the frames of
`parallel/channel.py`.

The engine's process sends READY once, with its `Facts` as JSON, then OUTPUTS after each step, and
METRICS when a client has asked for them. Clients send ADD, END and METRICS, and before the ADD of a
prompt with images BESIDE: what `attached.dump` makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nanovllm.checks import InvalidValue
from nanovllm.replicas.messages import numbers
from nanovllm.schedule.outputs import Completion, Increment

READY, OUTPUTS, METRICS = "ready", "outputs", "metrics"
ADD, BESIDE, END = "add", "beside", "end"
ABORT, STOP = "abort", "stop"

Top = list[tuple[int, float, int]]  # the token's id, its log-probability, its rank


class Add(msgspec.Struct, array_like=True):
    """A prompt with the answers `first_id`, `first_id + 1`, …, one for each seed.

    params: the fields of `SamplingParams` that the engine needs. incremental: that of
    `Engine.add_request`. has_images: those of the BESIDE before it.
    """

    first_id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    seeds: list[int]
    incremental: bool
    priority: int
    cache_salt: str | None
    has_images: bool = False


class End(msgspec.Struct, array_like=True):
    """Answers that their client ends.

    reason: ABORT, and nothing more is sent of them, or STOP, for stop strings: the last row is.
    """

    ids: list[int]
    reason: str


class Done(msgspec.Struct, array_like=True):
    """How an answer has ended. The fields are those of `Completion`."""

    finish_reason: str
    stop_reason: int | None
    num_cached_tokens: int
    prompt_logprobs: list[Top | None] | None
    error: str | None
    error_field: str | None = None


class Row(msgspec.Struct, array_like=True):
    """New tokens of one answer, with log-probabilities if they were asked for."""

    request_id: int
    token_ids: list[int]
    logprobs: list[Top | None] | None = None  # of an answer's tokens none is None
    done: Done | None = None

    def extend(self, later: Row) -> None:
        """Add the next row of the same answer."""
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.done = later.done


class Outputs(msgspec.Struct, array_like=True):
    """The new tokens of a step for one client.

    ids, tokens: answers with one new token and nothing else, the usual case. rows: all others.
    """

    ids: list[int]
    tokens: list[int]
    rows: list[Row]


_encoder = msgspec.msgpack.Encoder()
dump = _encoder.encode
load_add = msgspec.msgpack.Decoder(Add).decode
load_end = msgspec.msgpack.Decoder(End).decode
load_outputs = msgspec.msgpack.Decoder(Outputs).decode


def row(request_id: int, one: Increment, *, incremental: bool) -> Row:
    """The row of an engine's increment. Without `incremental` it is the only one of its answer."""
    found = one.completion
    token_ids, logprobs = one.token_ids, one.logprobs
    if found is None:
        return Row(request_id, token_ids, numbers(logprobs))
    if not incremental:
        token_ids, logprobs = found.token_ids, found.logprobs
    return Row(request_id, token_ids, numbers(logprobs), _done(found))


def failed(request_id: int, error: Exception) -> Row:
    """The only row of a request that the engine has refused."""
    field = error.field if isinstance(error, InvalidValue) else None
    text = f"{type(error).__name__}: {error}" if field is None else str(error)
    return Row(request_id, [], None, Done("error", None, 0, None, text, field))


def _done(found: Completion) -> Done:
    stop = found.stop_reason
    return Done(
        found.finish_reason,
        stop if isinstance(stop, int) else None,  # clients find stop strings
        found.num_cached_tokens,
        numbers(found.prompt_logprobs),
        found.error,
        found.error_field,
    )


def outputs(ids: Sequence[int], tokens: Sequence[int], rows: Sequence[Row]) -> bytes:
    return dump(Outputs(list(ids), list(tokens), list(rows)))
