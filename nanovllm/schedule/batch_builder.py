"""Builds the plan of a step: plain data made from requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nanovllm.schedule.plan import (
    ALL_TOKENS,
    NEWEST,
    NO_DRAFTS,
    PLAIN,
    SAMPLING_FIELDS,
    EmbeddingSpan,
    NewBlock,
    PromptLogprobs,
    RowCopy,
    RowEdits,
    RowSettings,
    RowTokens,
    SamplingMetadata,
    StepDrafts,
    StepPlan,
    TokenHistory,
)
from nanovllm.schedule.request import Request

NO_TOKENS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` known tokens of a request from position `start` on.

    The first chunk of a request writes its row's state. The last one samples its next token.
    `new_blocks` are those that later chunks have been given. The first chunk may begin with the
    state in slot `restored`, and a chunk may end with a snapshot in slot `saved`.
    """

    request: Request
    start: int
    num_tokens: int
    is_first: bool
    is_last: bool
    new_blocks: list[NewBlock] = field(default_factory=list)
    restored: int | None = None
    saved: int | None = None


def sampling_metadata(requests: Sequence[Request]) -> SamplingMetadata:
    """The `SamplingMetadata` of a step in which `requests` are the rows, in this order; without
    masks, which `Engine` adds."""
    has_filters, has_penalties, has_edits = False, False, False
    masked: list[int] = []
    forbidden: list[tuple[int, int]] = []
    wanted: list[int] = []
    for row, request in enumerate(requests):
        if request.needs_temperature_alone:
            continue
        params = request.params
        if params.min_tokens and request.min_tokens_hold:
            forbidden += [(row, token_id) for token_id in request.stop_ids]
        has_edits = has_edits or request.edits is not None
        if request.constraint is not None:
            masked.append(row)
        if params.is_plain:
            continue
        has_filters = True  # filters that are off keep every token
        has_penalties = has_penalties or params.has_penalties
        if params.logprobs is not None:
            wanted.append(params.logprobs)
    if not (has_filters or has_edits or masked or forbidden):
        return PLAIN
    num_logprobs = ALL_TOKENS if ALL_TOKENS in wanted else max(wanted, default=None)
    return SamplingMetadata(has_filters, has_penalties, has_edits, forbidden, num_logprobs, masked)


def decode_plan(
    requests: Sequence[Request],
    proposals: Sequence[Sequence[int]],
    new_blocks: list[NewBlock],
    sampling: SamplingMetadata,
    drafts: StepDrafts = NO_DRAFTS,
) -> StepPlan:
    """Each request feeds its newest token and its proposals.

    `num_computed` of each request already counts these tokens.
    """
    nums = [1] * len(requests)
    token_T: np.ndarray = NO_TOKENS
    if drafts.room and not any(proposals):
        proposals = [()] * len(requests)  # a verifying step, after which there are drafts
    if any(proposals) or drafts.room:
        nums = [1 + len(proposed) for proposed in proposals]
        fed = [token_id for proposed in proposals for token_id in (NEWEST, *proposed)]
        token_T = np.array(fed, np.int64)
    return StepPlan(
        is_prefill=False,
        request_ids=[request.request_id for request in requests],
        rows=[request.row for request in requests],
        num_tokens=nums,
        seq_lens=[request.num_computed for request in requests],
        token_T=token_T,
        is_sampled=[True] * len(requests),
        new_blocks=new_blocks,
        drafts=drafts,
        sampling=sampling,
    )


def prefill_plan(chunks: Sequence[Chunk], *, has_known: bool = False) -> StepPlan:
    """The plan of a step that feeds these chunks, one after another. With `has_known` it has
    all known tokens of rows whose last chunk it feeds."""
    token_ids: list[int] = []
    prompt_logprobs: list[PromptLogprobs] = []
    embeddings: list[EmbeddingSpan] = []
    for chunk in chunks:
        request, start, end = chunk.request, chunk.start, chunk.start + chunk.num_tokens
        if request.needs_prompt_logits and start + 1 < len(request.prompt_ids):
            following = request.prompt_ids[start + 1 : end + 1]
            num_top = request.params.prompt_logprobs or 0
            wanted = (request.request_id, start + 1, len(token_ids), following, num_top)
            prompt_logprobs.append(PromptLogprobs(*wanted))
        for one in request.contents:
            first, last = max(start, one.start), min(end, one.start + one.num)
            if first < last:
                place = len(token_ids) + first - start
                embeddings.append(EmbeddingSpan(one.key, first - one.start, place, last - first))
        token_ids += request.all_token_ids[start:end]
    ending = [chunk.request for chunk in chunks if chunk.is_last]
    requests = [chunk.request for chunk in chunks]
    return StepPlan(
        is_prefill=True,
        request_ids=[request.request_id for request in requests],
        rows=[request.row for request in requests],
        num_tokens=[chunk.num_tokens for chunk in chunks],
        seq_lens=[chunk.start + chunk.num_tokens for chunk in chunks],
        token_T=np.array(token_ids, np.int64),
        is_sampled=[chunk.is_last for chunk in chunks],
        settings=[_settings(chunk) for chunk in chunks if chunk.is_first],
        new_blocks=[new for chunk in chunks for new in chunk.new_blocks],
        restores=[
            RowCopy(chunk.request.row, chunk.start, chunk.restored)
            for chunk in chunks
            if chunk.restored is not None
        ],
        snapshots=[
            RowCopy(chunk.request.row, chunk.start + chunk.num_tokens, chunk.saved)
            for chunk in chunks
            if chunk.saved is not None
        ],
        histories=[
            TokenHistory(request.row, request.prompt_ids, request.output_ids[:])
            for request in ending
            if request.params.has_penalties
        ],
        known=[
            RowTokens(request.row, np.array(request.all_token_ids, np.int32))
            for request in (ending if has_known else ())
        ],
        edits=[
            RowEdits(request.row, request.edits, _newest(request, request.edits.context_tokens))
            for request in ending
            if request.edits is not None
        ],
        sampling=_metadata_of_chunks(chunks),
        prompt_logprobs=prompt_logprobs,
        embeddings=embeddings,
        position_3T=_positions(chunks, bool(embeddings)),
    )


def _positions(chunks: Sequence[Chunk], has_embeddings: bool) -> np.ndarray | None:
    """`StepPlan.position_3T`; None if no prompt has M-RoPE positions, or if the device derives all
    of them from the state and the step has no embeddings."""
    if all(chunk.request.prompt_position_3P is None for chunk in chunks):
        return None
    spans = [(one.request, one.start, one.start + one.num_tokens) for one in chunks]
    found = [request.position_3T(*span) for request, *span in spans]
    derived = [np.arange(start, end) + request.rope_offset for request, start, end in spans]
    if not has_embeddings and all((one == own).all() for one, own in zip(found, derived)):
        return None
    return np.concatenate(found, axis=1)


def _metadata_of_chunks(chunks: Sequence[Chunk]) -> SamplingMetadata:
    """The `SamplingMetadata` of the rows that sample. Row numbers count all rows of the step."""
    if all(chunk.is_last for chunk in chunks):
        return sampling_metadata([chunk.request for chunk in chunks])
    sampling = sampling_metadata([chunk.request for chunk in chunks if chunk.is_last])
    row_of = [row for row, chunk in enumerate(chunks) if chunk.is_last]
    forbidden = [(row_of[row], token_id) for row, token_id in sampling.forbidden]
    masked = [row_of[row] for row in sampling.masked]
    return replace(sampling, forbidden=forbidden, masked=masked)


def _newest(request: Request, num: int) -> list[int]:
    """The last `num` output tokens, or all if there are fewer."""
    return request.output_ids[max(0, len(request.output_ids) - num) :]


def _settings(chunk: Chunk) -> RowSettings:
    request = chunk.request
    return RowSettings(
        row=request.row,
        pos=chunk.start,
        seed=request.seed,
        sampling=[float(getattr(request.params, name)) for name in SAMPLING_FIELDS],
        blocks=[table[:] for table in request.blocks],
        rope_offset=request.rope_offset,
        adapter=request.adapter,
    )
