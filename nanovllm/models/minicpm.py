"""MiniCPM and MiniCPM4: a Llama with factors on embeddings, residuals and logits.

transformers has no classes for them, so their configs are read as Llama configs. The factors
are those of MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
Strategies (Hu et al. 2024, https://arxiv.org/abs/2404.06395), appendix A.1. Longer positions are
those of LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from nanovllm.models.config import dense_config, require_type
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Model
from nanovllm.models.scaled import Factors, check_factor, scaled_model

NAME = "MiniCPMForCausalLM"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of a MiniCPM's config, as `transformers_config` reads it.

    A model with a `sparse_config` attends to some blocks only in sequences of `dense_len` tokens
    and more. This engine computes dense attention, for shorter sequences.
    """
    require_type(hf, NAME, "llama")
    if getattr(hf, "num_experts", 0):
        raise ValueError(f"num_experts {hf.num_experts} is not supported by {NAME}: only 0 is")
    config = dense_config(
        hf,
        architecture=NAME,
        dtype=dtype,
        max_model_len=_dense_length(hf, max_model_len),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        check_factor(name, getattr(hf, name, None))
    factors = Factors(
        embed=("scale_emb", hf.scale_emb),
        residual=("scale_depth", hf.scale_depth / math.sqrt(hf.num_hidden_layers)),
        head=("dim_model_base", hf.dim_model_base / hf.hidden_size),
    )
    return scaled_model(dense_model(config), factors)


def _dense_length(hf: Any, max_model_len: int | None) -> int | None:
    """`max_model_len`, or by default the longest sequence with dense attention.

    Raises ValueError for longer sequences.
    """
    sparse = getattr(hf, "sparse_config", None)
    if not sparse:
        return max_model_len
    longest = int(sparse.get("dense_len", 8192)) - 1
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len is {max_model_len}, but the sparse attention (InfLLM v2) of {NAME} is "
            f"not supported, which sets in at {longest + 1} tokens: use at most {longest}"
        )
    return longest if max_model_len is None else max_model_len
