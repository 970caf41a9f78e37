"""Logits at every position of given sequences, from an engine's runner and from transformers.

The harness drives the runner as the engine does: padded prefill steps that split and mix prompts,
then decode steps from the device state, one known token at a time. Cache blocks are assigned in
random order and start as NaN, so every wrong read is visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.models.model import CacheAndStates
from nanovllm.runner.inputs import span_arrays
from nanovllm.runner.runner import Runner
from nanovllm.runner.state import Span
from nanovllm.startup import load as startup

# Smaller weights than elsewhere; with those, transformers' bf16 logits differ by 0.3 from fp32.
BF16 = {"dtype": "bfloat16", "initializer_range": 0.1}


MAX_GROUPS = 5


class Known(NamedTuple):
    """Known tokens: the first `num_prompt` are a prompt, the others are inputs of decode steps."""

    token_ids: list[int]
    num_prompt: int


def sequences(vocab_size: int, *lengths: tuple[int, int]) -> list[Known]:
    """Random sequences with the given numbers of (prompt, total) tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        Known(torch.randint(vocab_size, (total,), generator=generator).tolist(), num_prompt)
        for num_prompt, total in lengths
    ]


def load(folder: Path, device: str, **options: Any) -> Runner:
    """A warm runner with small sizes; `options` are fields of EngineConfig."""
    sizes = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "kvcache_block_size": 16,
    }
    # for every group of layers
    blocks_per_row = -(-(options.get("max_model_len") or 128) // 16)
    sizes["num_kvcache_blocks"] = 1 + 4 * MAX_GROUPS * blocks_per_row
    config = EngineConfig.from_options(
        str(folder), {"device": device, "dtype": "float32", **sizes, **options}
    )
    return startup.load(config).runner


@torch.no_grad()
def engine_logits(runner: Runner, known: Sequence[Known]) -> list[Tensor]:
    """For each sequence, the logits [length, V] after each token, in fp32 on the host."""
    _poison(runner)
    _admit(runner, known)
    logits = [[torch.empty(0)] * len(sequence.token_ids) for sequence in known]
    for chunks in _prefill_steps(known, runner):
        _prefill(runner, known, chunks, logits)
    for pos in range(max(len(sequence.token_ids) for sequence in known)):
        rows = [row for row, (ids, num_prompt) in enumerate(known) if num_prompt <= pos < len(ids)]
        for start in range(0, len(rows), runner.layout.decode_rows[-1]):
            _decode(runner, known, rows[start : start + runner.layout.decode_rows[-1]], pos, logits)
    return [torch.stack(rows) for rows in logits]


@torch.no_grad()
def transformers_logits(
    folder: Path, known: Sequence[Known], device: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The same logits from transformers: one forward pass over each whole sequence."""
    model = transformers_model(folder, device, dtype)
    return [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids, _ in known]


def transformers_model(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model in plain torch."""
    from transformers import AutoModelForCausalLM

    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **plain).to(device).eval()


def max_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite if either side contains NaN."""
    return max(
        (a - b).abs().nan_to_num(torch.inf).max().item() for a, b in zip(left, right, strict=True)
    )


def check_bf16(folder: Path, device: str, known: list[Known], **options: Any) -> None:
    """`assert_bf16` for an engine's logits."""
    runner = load(folder, device, dtype="bfloat16", **options)
    assert runner.params.embed_VD.dtype == torch.bfloat16
    ours = torch.cat(engine_logits(runner, known))
    theirs = torch.cat(transformers_logits(folder, known, device, torch.bfloat16))
    assert_bf16(ours, theirs, torch.cat(transformers_logits(folder, known, device)))


def assert_bf16(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Logits [T, V] in bf16: close to transformers', and as close as these to the fp32 logits."""
    greedy = ours.argmax(-1, keepdim=True)
    # among their two largest, up to their own rounding: several logits may be nearly equal
    rounding = (theirs - exact).abs().mean()
    assert (theirs.gather(-1, greedy) >= theirs.topk(2).values[:, 1:] - 4 * rounding).all()
    difference = ours.log_softmax(-1).gather(-1, greedy) - theirs.log_softmax(-1).gather(-1, greedy)
    assert difference.abs().max() <= 0.1
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def _poison(runner: Runner) -> None:
    # flash-attn multiplies slots past a row's end by zero, so they must be finite
    value = 1000.0 if runner.spec.attention.generation() else torch.nan
    for kept in runner.steps.caches:
        cache = kept.cache[:2] + kept.states if isinstance(kept, CacheAndStates) else kept[:2]
        for stored in cache:  # keys and values, or states of rows
            assert stored is not None
            stored.fill_(value)


def _admit(runner: Runner, known: Sequence[Known]) -> None:
    """Give each sequence a row of the state, with blocks for all its tokens."""
    block_size, state = runner.layout.block_size, runner.state
    num_blocks = runner.steps.pages.shape_CB[0]
    free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(2)) + 1).tolist()
    for row, (ids, _) in enumerate(known):
        for table_SP in state.block_tables:
            blocks = [free.pop() for _ in range(-(-len(ids) // block_size))]
            table_SP[row, : len(blocks)] = runner.platform.upload(blocks, torch.int32)


class Chunk(NamedTuple):
    row: int
    start: int
    num_tokens: int


def _prefill_steps(known: Sequence[Known], runner: Runner) -> Iterator[list[Chunk]]:
    """Pack prompts into steps of the largest size, one after another, and split at a full step."""
    layout = runner.layout
    chunks: list[Chunk] = []
    budget = layout.prefill_tokens[-1]
    for row, (_, num_prompt) in enumerate(known):
        start = 0
        while start < num_prompt:
            num_tokens = min(budget, num_prompt - start)
            chunks.append(Chunk(row, start, num_tokens))
            start += num_tokens
            budget -= num_tokens
            if not budget or len(chunks) == layout.max_prefill_rows:
                yield chunks
                chunks, budget = [], layout.prefill_tokens[-1]
    if chunks:
        yield chunks


def _prefill(
    runner: Runner, known: Sequence[Known], chunks: list[Chunk], logits: list[list[Tensor]]
) -> None:
    layout, upload, state = runner.layout, runner.platform.upload, runner.state
    nums = [chunk.num_tokens for chunk in chunks]
    num_tokens, num_rows = layout.prefill_bucket(sum(nums), len(chunks))
    rows = [chunk.row for chunk in chunks]
    state.pos_S[upload(rows, torch.int64)] = upload([chunk.start for chunk in chunks], torch.int64)
    ids = [known[row].token_ids[start : start + num] for row, start, num in chunks]
    token_ids = np.array([token_id for part in ids for token_id in part])
    sizes = {"num_tokens": num_tokens, "num_rows": num_rows, "pad_row": state.pad_row}
    arrays = span_arrays(rows, nums, token_ids, **sizes)
    span = Span(*(upload(array, torch.int64) for array in arrays))
    with runner.snapshots.restoring(span.row_idx_R):  # a second step with these tokens follows
        hidden = runner.steps.hidden(span)
    where = [(chunk.row, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]
    for start in range(0, len(where), num_rows):
        group = where[start : start + num_rows]
        index = [start + min(i, len(group) - 1) for i in range(num_rows)]
        logits_RW = runner.steps.logits_at(hidden, upload(index, torch.int64))
        logits_RV = runner.steps.gathered(logits_RW).float().cpu()
        for (row, pos), logits_V in zip(group, logits_RV):
            logits[row][pos] = logits_V
    # the last tokens' logits, as in a step without prompt logprobs; it writes the same cache again
    last_RV = runner.steps.gathered(runner.steps.prefill_logits(span)).float().cpu()
    for chunk, logits_V in zip(chunks, last_RV):
        logits[chunk.row][chunk.start + chunk.num_tokens - 1] = logits_V


def _decode(
    runner: Runner, known: Sequence[Known], rows: list[int], pos: int, logits: list[list[Tensor]]
) -> None:
    """One decode step, in which the input of each of `rows` is its token at `pos`."""
    state, upload = runner.state, runner.platform.upload
    row_idx_R = upload(rows, torch.int64)
    state.token_S[row_idx_R] = upload([known[row].token_ids[pos] for row in rows], torch.int64)
    state.pos_S[row_idx_R] = pos
    padding = [state.pad_row] * (runner.layout.decode_bucket(len(rows)) - len(rows))
    logits_RW = runner.steps.decode_logits(upload(rows + padding, torch.int64))
    logits_RV = runner.steps.gathered(logits_RW).float().cpu()
    for row, logits_V in zip(rows, logits_RV):
        logits[row][pos] = logits_V
