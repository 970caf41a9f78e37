"""The order of sums of deterministic engines: the one place that decides it.

A result of such an engine has the same bits whatever else runs. So an order may depend on the
sizes of a weight or of a head, and on positions of tokens, but never on the number of rows, on a
bucket or on what a step holds beside. docs/determinism.md has the table of all sums.
"""

from __future__ import annotations

# Keys are added in tiles of so many, and tiles in pieces of so many keys, at fixed positions. A
# piece is the smallest part of a row that one program of a decode step may take.
QUERIES = 64  # entries of a tile of queries, in every step: a token has one for each of its heads
KEY_TILE = 64
PIECE_KEYS = 256

# Our ops whose kernels, on a CPU and in Triton, give a row the same bits among any other rows.
ORDERED = frozenset({"ordered_attention", "ordered_linear"})
BY_ROW = frozenset({
    "accept", "add_rms_norm", "advance", "decode_inputs", "ngram_propose", "qk_norm_rope_store",
    "rms_norm", "rope", "sample", "sampling_inputs", "silu_mul", "span_inputs", "store_kv",
})  # fmt: skip
