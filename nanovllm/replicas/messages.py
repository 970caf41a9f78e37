"""The messages between clients and an engine process: msgpack, in the frames of
`parallel/channel.py`. A client is a task of an event loop, or the router of `LLM`.

The engine process sends READY once with its `EngineInfo`, OUTPUTS after each step, and the replies
to METRICS, ADD_LORA and REMOVE_LORA. Clients send these, ADD and END, and MEDIA before the ADD of a
prompt with media, embeddings or positions. Only the parent process sends GO, FORGET and
PREPARE_GRAMMARS.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from nanovllm.checks import InvalidValue
from nanovllm.engine.metrics import Counter, Gauge, Metric
from nanovllm.engine.request import EngineInfo, EngineRequest, Forms
from nanovllm.lora_request import LoRARequest
from nanovllm.pooling_params import PoolingParams
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta
from nanovllm.schedule.request import MMSpan
from nanovllm.tokenizer import Tokenizer
from nanovllm.wire import Array, array, decoder, tensor
from nanovllm.wire import dump as dump

READY, OUTPUTS, METRICS = "ready", "outputs", "metrics"
MEDIA, ADD, END = "media", "add", "end"
ADD_LORA, REMOVE_LORA = "add_lora", "remove_lora"
GO, FORGET, PREPARE_GRAMMARS = "go", "forget", "prepare_grammars"
ABORT, STOP = "abort", "stop"

# The client handles output_kind and has truncated the prompt. Seeds and prompt_logprobs have fields
# of their own.
OF_CLIENT = frozenset(("n", "seed", "output_kind", "truncate_prompt_tokens", "prompt_logprobs"))
# for clients that detokenize
OF_TEXT = OF_CLIENT | {"stop", "detokenize", "include_stop_str_in_output"}

Top = list[tuple[int, float, int]]  # token id, log-probability, rank


class MediaItem(msgspec.Struct, array_like=True):
    """An image, a frame or a clip, with its digest: the fields of `MMItem`."""

    digest: bytes
    values: Array
    grid: list[int]
    tower: str


class MediaMessage(msgspec.Struct, array_like=True):
    """The multimodal inputs of this client's next prompt. The fields are those of `EngineRequest`;
    contents are (start, number of tokens, digest)."""

    contents: list[tuple[int, int, bytes]]
    embeddings: list[tuple[bytes, Array]]
    media: list[MediaItem]
    positions: Array | None


class Add(msgspec.Struct, array_like=True):
    """A prompt and its answers: one for each of `ids` (chosen by the client) and `seeds`.

    params: those of `packed_params`. has_media: the MEDIA before it belong to it. prompt_logprobs:
    of the first answer; those of others would be equal. The other fields are those of
    `EngineRequest`.
    """

    ids: list[int]
    seeds: list[int]
    prompt_ids: list[int]
    params: msgspec.Raw
    incremental: bool
    priority: int
    cache_salt: str | None
    detokenizes: bool = False
    has_media: bool = False
    adapter: LoRARequest | None = None
    pooling: PoolingParams | None = None
    second_at: int = 0
    prompt_logprobs: int | None = None


class End(msgspec.Struct, array_like=True):
    """Answers that the client ends.

    reason: ABORT sends nothing more of them. STOP, for stop strings, sends their last row.
    """

    ids: list[int]
    reason: str


class Done(msgspec.Struct, array_like=True):
    """The end of an answer. The fields are those of `FinishedOutput`.

    prompt_logprobs: packed `numbers`. Each takes 1 to 2 us to become an object, so a client can
    build the objects of a long prompt in a thread.
    """

    finish_reason: str
    stop_reason: int | str | None
    num_cached_tokens: int
    prompt_logprobs: bytes | None
    error: str | None
    error_field: str | None = None
    pooled: Array | None = None


class RowTokens(msgspec.Struct, array_like=True):
    """New tokens of one answer, with log-probabilities if requested.

    text: the new text in UTF-8, if the engine detokenizes. May contain surrogates.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[Top | None] | None = None  # no entry of an answer is None
    done: Done | None = None
    text: bytearray = bytearray()

    def extend(self, later: RowTokens) -> None:
        """Append the next row of the same answer, without copying the existing values."""
        self.token_ids += later.token_ids
        self.text += later.text
        if self.logprobs is None:
            self.logprobs = later.logprobs
        elif later.logprobs is not None:
            self.logprobs += later.logprobs
        self.done = later.done


class Outputs(msgspec.Struct, array_like=True):
    """A step's new tokens for one client.

    ids, tokens: answers with exactly one new token, the usual case. rows: all others.
    """

    ids: list[int]
    tokens: list[int]
    rows: list[RowTokens]


class LoraReply(msgspec.Struct, array_like=True):
    """The reply to ADD_LORA and REMOVE_LORA: their result, or why they were refused."""

    found: bool
    error: str | None = None


load_lora = decoder(LoRARequest)
load_lora_id = decoder(int)
load_lora_reply = decoder(LoraReply)
load_info = decoder(EngineInfo)
load_add = decoder(Add)
load_end = decoder(End)
load_outputs = decoder(Outputs)
_load_fields = decoder(dict[str, Any])
_load_positions = decoder(list[Top | None])
_load_media = decoder(MediaMessage)
_load_metrics = decoder(list[tuple[bool, str, float, dict[str, str]]])


# requests -----------------------------------------------------------------------------------------


def packed_params(params: SamplingParams, *, detokenizes: bool) -> msgspec.Raw:
    """The parameters that the engine needs: the fields that differ from their defaults.
    detokenizes: whether the engine makes the text."""
    found = params.non_default(without=OF_CLIENT if detokenizes else OF_TEXT)
    if found.get("stop"):
        found["stop"] = [text.encode("utf-8", "surrogatepass") for text in found["stop"]]
    return msgspec.Raw(dump(found))


def load_params(packed: bytes) -> tuple[SamplingParams, Forms]:
    """The inverse of `packed_params`, with forms to be found. Raises ValueError."""
    found = _load_fields(packed)
    if stop := found.get("stop"):
        found = {**found, "stop": [text.decode("utf-8", "surrogatepass") for text in stop]}
    return SamplingParams(**found), Forms()


def dump_media(request: EngineRequest) -> bytes:
    """The payload of MEDIA; empty for a prompt that needs none."""
    if not request.contents and request.positions is None:
        return b""
    positions = request.positions
    return dump(
        MediaMessage(
            [(one.start, one.num, one.digest) for one in request.contents],
            [(bytes.fromhex(key), array(one)) for key, one in request.embeddings.items()],
            [
                MediaItem(bytes.fromhex(key), array(one.values), list(one.grid), one.tower)
                for key, one in request.media.items()
            ],
            None if positions is None else array(positions),
        )
    )


def load_request(
    found: Add, media: bytes, load: Callable[[bytes], tuple[SamplingParams, Forms]] = load_params
) -> EngineRequest:
    """The request from an ADD and the MEDIA before it. load: `load_params`, which may share its
    results between requests. Raises ValueError."""
    params, forms = load(bytes(found.params))
    request = EngineRequest(
        found.prompt_ids,
        params,
        found.incremental,
        found.priority,
        found.cache_salt,
        detokenizes=found.detokenizes,
        adapter=found.adapter,
        pooling=found.pooling,
        second_at=found.second_at,
        forms=forms,
    )
    return with_media(request, media) if found.has_media else request


def of_answer(request: EngineRequest, found: Add, index: int) -> EngineRequest:
    """The request for one of the answers of an ADD, from that for all of them."""
    params = request.params
    if index == 0 and found.prompt_logprobs is not None:
        params = replace(params, prompt_logprobs=found.prompt_logprobs)
    return replace(request, params=params, seed=found.seeds[index])


def with_media(request: EngineRequest, payload: bytes) -> EngineRequest:
    """The request with the payload of `dump_media`."""
    from nanovllm.runner.encoders import MMItem  # imports torch

    found = _load_media(payload)
    return replace(
        request,
        contents=tuple(MMSpan(*one) for one in found.contents),
        embeddings={digest.hex(): tensor(one) for digest, one in found.embeddings},
        media={
            one.digest.hex(): MMItem(tensor(one.values), tuple(one.grid), one.tower)
            for one in found.media
        },
        positions=None if found.positions is None else tensor(found.positions).numpy(),
    )


# answers ------------------------------------------------------------------------------------------


def row(request_id: int, one: OutputDelta, *, incremental: bool) -> RowTokens:
    """The row of an engine's increment. Without `incremental` it is the answer's only one."""
    found = one.completion
    token_ids, logprobs, text = one.token_ids, one.logprobs, one.text
    if found is not None and not incremental:
        token_ids, logprobs, text = found.token_ids, found.logprobs, found.text
    done = None if found is None else _done(found)
    return RowTokens(request_id, token_ids, numbers(logprobs), done, _utf8(text))


def failed(request_id: int, error: Exception) -> RowTokens:
    """The single row of a request that the engine refused."""
    field = error.field if isinstance(error, InvalidValue) else None
    text = f"{type(error).__name__}: {error}" if field is None else str(error)
    return RowTokens(request_id, [], None, Done("error", None, 0, None, _clean(text), field))


def text_of(found: RowTokens) -> str:
    return found.text.decode("utf-8", "surrogatepass") if found.text else ""


def completion(
    end: Done, row_of_all: RowTokens, prompt_ids: list[int], tokenizer: Tokenizer | None
) -> FinishedOutput:
    """A whole answer. row_of_all: everything sent of it. tokenizer: for the texts of
    log-probabilities."""
    return FinishedOutput(
        text_of(row_of_all),
        row_of_all.token_ids,
        end.finish_reason,
        end.stop_reason,
        prompt_ids,
        end.num_cached_tokens,
        logprobs(row_of_all.logprobs, tokenizer),
        prompt_logprobs(end, tokenizer),
        end.error,
        end.error_field,
        pooled_of(end),
    )


def prompt_logprobs(end: Done, tokenizer: Tokenizer | None) -> Any:
    """The log-probabilities of the prompt; None without any."""
    found = end.prompt_logprobs
    return None if found is None else logprobs(_load_positions(found), tokenizer)


def pooled_of(end: Done) -> np.ndarray | None:
    """The result of a model that pools, over the bytes of the message."""
    found = end.pooled
    if found is None:
        return None
    return np.frombuffer(found.data, np.dtype(found.dtype)).reshape(found.shape)


def _utf8(text: str) -> bytearray:
    return bytearray(text.encode("utf-8", "surrogatepass"))


def _clean(text: str) -> str:
    """A message without surrogates, which it may quote."""
    return text.encode("utf-8", "replace").decode()


def _done(found: FinishedOutput) -> Done:
    return Done(
        found.finish_reason,
        found.stop_reason,
        found.num_cached_tokens,
        None if found.prompt_logprobs is None else dump(numbers(found.prompt_logprobs)),
        None if found.error is None else _clean(found.error),
        found.error_field,
        None if found.pooled is None else array(found.pooled),
    )


def numbers(positions: Any) -> list[Top | None] | None:
    """Log-probabilities per position without texts, in order."""
    if positions is None:
        return None
    return [
        None if top is None else [(token, float(one), one.rank) for token, one in top.items()]
        for top in positions
    ]


def logprobs(positions: list[Top | None] | None, tokenizer: Tokenizer | None) -> Any:
    """The inverse of `numbers`."""
    if positions is None:
        return None
    return [
        None
        if top is None
        else {token: Logprob(one, rank, token, tokenizer) for token, one, rank in top}
        for top in positions
    ]


# metrics ------------------------------------------------------------------------------------------


def dump_metrics(metrics: Iterable[Metric]) -> bytes:
    return dump([(isinstance(one, Counter), one.name, one.value, one.labels) for one in metrics])


def load_metrics(payload: bytes) -> list[Metric]:
    return [
        (Counter if counts else Gauge)(name, value, labels)
        for counts, name, value, labels in _load_metrics(payload)
    ]
