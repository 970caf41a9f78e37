"""The order of sums of deterministic engines: the one place that decides it.

A result of such an engine has the same bits whatever else runs. So an order may depend on the
sizes of a weight or of a head, and on positions of tokens, but never on the number of rows, on a
bucket or on what a step holds beside. docs/determinism.md has the table of all sums.
"""

from __future__ import annotations

from typing import NamedTuple

# Keys are added in tiles of so many, and tiles in pieces of so many keys, at fixed positions. A
# piece is the smallest part of a row that one program of a decode step may take.
QUERIES = 64  # entries of a tile of queries, in every step: a token has one for each of its heads
KEY_TILE = 64
PIECE_KEYS = 128

# Our ops whose kernels, on a CPU and in Triton, give a row the same bits among any other rows.
ORDERED = frozenset({"ordered_attention", "ordered_experts", "ordered_linear"})
# The same of a CPU alone.
ORDERED_ON_CPU = frozenset({
    "adapter_tiles", "ggml_lookup", "ordered_add_lora", "ordered_fp8_linear",
    "ordered_ggml_linear", "ordered_linear_int8", "ordered_packed_linear", "packed_lookup",
})  # fmt: skip
BY_ROW = frozenset({
    "accept", "add_rms_norm", "advance", "decode_inputs", "expert_linear", "ngram_propose",
    "qk_norm_rope_store", "rms_norm", "rope", "sample", "sampling_inputs", "silu_mul",
    "span_inputs", "store_kv", "topk_softmax",
    "draft_inputs", "next_tokens", "rms_norm_each", "sample_of",  # they make drafts alone
})  # fmt: skip

LEAST_PROGRAMS = 64  # with a program for each 64 lines of a weight, which one row shall have
MOST_SHARES = 8
SHARE_UNIT = 128  # a share is a multiple of so many columns: the largest chunk of a tile


class Shares(NamedTuple):
    """The parts of a product's depth, whose sums are added in ascending order: their number, and
    the columns of each but the last, which may have fewer."""

    number: int
    columns: int


def shares_of(num_lines: int, depth: int) -> Shares:
    """The shares for a weight [num_lines, depth]: one if it has many lines. A weight of few lines
    has some, so that a product with one row, too, is spread over the device."""
    programs, number = -(-num_lines // 64), 1
    while programs * number < LEAST_PROGRAMS and number < MOST_SHARES:
        if depth < 2 * number * SHARE_UNIT:
            break
        number *= 2
    columns = -(-depth // (number * SHARE_UNIT)) * SHARE_UNIT
    return Shares(-(-depth // columns), columns)
