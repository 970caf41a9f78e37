"""Schemas of sums, gathers and choices of several ranks."""

from __future__ import annotations

import torch

from nanovllm.kernels import collectives
from nanovllm.kernels.schemas.registry import define

all_reduce = define(
    "all_reduce(Tensor x, Tensor? residual=None) -> Tensor",
    collectives.all_reduce,
    lambda x, residual=None: torch.empty_like(x, memory_format=torch.contiguous_format),
)
all_reduce_ = define(
    "all_reduce_(Tensor(a!) x, Tensor? residual=None) -> ()",
    collectives.all_reduce_,
    lambda x, residual=None: None,
)
all_reduce_norm = define(
    "all_reduce_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    collectives.all_reduce_norm,
    lambda x, residual, weight, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
)
gather_columns = define(
    "gather_columns(Tensor x, int num_columns) -> Tensor",
    collectives.gather_columns,
    lambda x, num_columns: x.new_empty((x.shape[0], num_columns)),
)
sample_columns = define(
    "sample_columns(Tensor logits, Tensor temperature, Tensor seed, Tensor pos, int num_columns) "
    "-> Tensor",
    collectives.sample_columns,
    lambda logits, temperature, seed, pos, num_columns: logits.new_empty(
        logits.shape[0], dtype=torch.int64
    ),
)
shard_embedding = define(
    "shard_embedding(Tensor token, Tensor table) -> Tensor",
    collectives.shard_embedding,
    lambda token, table: table.new_empty((*token.shape, table.shape[1])),
)
# Primitives of the ops above, for compilers that lower collectives themselves.
all_gather = define(
    "all_gather(Tensor x, int num_ranks) -> Tensor",
    collectives.all_gather,
    lambda x, num_ranks: x.new_empty((num_ranks, *x.shape)),
)
own_rank = define(
    "own_rank(Tensor like) -> Tensor",
    collectives.own_rank,
    lambda like: like.new_empty(1, dtype=torch.int64),
)
