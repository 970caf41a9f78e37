"""What the front and its replicas send to each other, as JSON.

A replica sends READY once with its `Facts`, then OUTPUTS. The front sends GO, ADD, ABORT, FORGET,
and asks METRICS.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nanovllm.engine.metrics import Counter, Gauge, Metric
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import Completion, Increment
from nanovllm.tokenizer import Tokenizer

READY, OUTPUTS = "ready", "outputs"
GO, ADD, ABORT, FORGET, METRICS = "go", "add", "abort", "forget", "metrics"
PREPARE_GRAMMARS = "prepare_grammars"

# `LLMEngine` reads output_kind; the front has truncated the prompt already.
_OF_FRONT = ("output_kind", "truncate_prompt_tokens")

_Top = list[tuple[int, float, int]]  # the token's id, its log-probability, its rank


@dataclass(frozen=True)
class Facts:
    """What the front must know of an engine. `num_blocks` counts blocks of its cache, `checkpoint`
    is a digest. `num_added` and `has_axes` are of `Intake`, `media_scale` has the fields of `Scale`
    in `engine/media_intake.py`."""

    checkpoint: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    hidden_size: int
    block_size: int
    num_blocks: int
    eos_ids: list[int]
    default_params: dict[str, Any]
    num_added: int = 0
    has_axes: bool = False
    has_towers: bool = False
    media_scale: Sequence[Any] | None = None


@dataclass(frozen=True)
class Addition:
    """A request, as the front gives it to a replica. `params` has a seed."""

    request_id: int
    prompt_ids: list[int]
    params: dict[str, Any]
    incremental: bool
    priority: int
    cache_salt: str | None


def params_fields(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not the default, as JSON has them."""
    return {
        field.name: value
        for field in fields(params)
        if field.name not in _OF_FRONT
        and (value := getattr(params, field.name)) is not field.default
    }


def dump(message: Facts | Addition) -> bytes:
    return json.dumps(asdict(message)).encode()


def dump_outputs(increments: Iterable[Increment]) -> bytes:
    """The prompt of a completion is left out: the front has it."""
    return json.dumps([_fields(one) for one in increments]).encode()


def outputs(payload: bytes) -> list[dict[str, Any]]:
    """The fields of increments, for `increment`."""
    return list(json.loads(payload))


def increment(
    found: dict[str, Any], prompt_ids: list[int], tokenizer: Tokenizer | None
) -> Increment:
    """The increment of a request with this prompt. `tokenizer` gives log-probabilities texts."""
    done = found["completion"]
    return Increment(
        found["request_id"],
        found["token_ids"],
        found["text"],
        logprobs(found["logprobs"], tokenizer),
        None
        if done is None
        else Completion(
            **{
                **done,
                "prompt_ids": prompt_ids,
                "logprobs": logprobs(done["logprobs"], tokenizer),
                "prompt_logprobs": logprobs(done["prompt_logprobs"], tokenizer),
            }
        ),
    )


def dump_metrics(metrics: Iterable[Metric]) -> bytes:
    found = [[isinstance(one, Counter), one.name, one.value, one.labels] for one in metrics]
    return json.dumps(found).encode()


def metrics(payload: bytes) -> list[Metric]:
    return [(Counter if counts else Gauge)(*rest) for counts, *rest in json.loads(payload)]


def _fields(one: Increment) -> dict[str, Any]:
    done = one.completion
    return {
        "request_id": one.request_id,
        "token_ids": one.token_ids,
        "text": one.text,
        "logprobs": numbers(one.logprobs),
        "completion": None
        if done is None
        else {
            **{field.name: getattr(done, field.name) for field in fields(done)},
            "prompt_ids": None,
            "logprobs": numbers(done.logprobs),
            "prompt_logprobs": numbers(done.prompt_logprobs),
        },
    }


def numbers(positions: Any) -> list[_Top | None] | None:
    """Log-probabilities of positions without their texts, in their order."""
    if positions is None:
        return None
    return [
        None if top is None else [(token, float(one), one.rank) for token, one in top.items()]
        for top in positions
    ]


def logprobs(positions: list[_Top | None] | None, tokenizer: Tokenizer | None) -> Any:
    """What `numbers` has been given."""
    if positions is None:
        return None
    return [
        None
        if top is None
        else {token: Logprob(one, rank, token, tokenizer) for token, one, rank in top}
        for top in positions
    ]
