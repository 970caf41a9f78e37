"""Which layers have experts, and which layers of a checkpoint are not read, by a config."""

from __future__ import annotations

from typing import Any


def sparse_by_step(hf: Any) -> tuple[bool, ...]:
    """For each layer, whether it has experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    step, without = hf.decoder_sparse_step, set(hf.mlp_only_layers or ())
    if step < 1:
        raise ValueError(f"decoder_sparse_step is {step}: it must be at least 1")
    if unknown := sorted(idx for idx in without if not 0 <= idx < hf.num_hidden_layers):
        raise ValueError(
            f"mlp_only_layers names layer {unknown[0]}, but there are {hf.num_hidden_layers} layers"
        )
    return tuple(
        layer_idx not in without and (layer_idx + 1) % step == 0
        for layer_idx in range(hf.num_hidden_layers)
    )


def sparse_after_dense(hf: Any, num_dense: int) -> tuple[bool, ...]:
    """For each layer, whether it has experts: all but the first `num_dense`. Raises ValueError for
    another number of layers, or another `moe_layer_freq`, than is supported."""
    if not 0 <= num_dense <= hf.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace is {num_dense}: it must be from 0 to num_hidden_layers, "
            f"{hf.num_hidden_layers}"
        )
    if (step := getattr(hf, "moe_layer_freq", 1)) != 1:
        raise ValueError(f"moe_layer_freq {step!r} is not supported: only 1 is")
    return tuple(layer_idx >= num_dense for layer_idx in range(hf.num_hidden_layers))


def proposing_layers(hf: Any) -> tuple[str, ...]:
    """The prefixes of the layers after the last, which propose tokens (MTP) and are not read.
    Raises ValueError for another number of them than a small one."""
    num_layers, num = hf.num_hidden_layers, getattr(hf, "num_nextn_predict_layers", None) or 0
    if not 0 <= num <= num_layers:
        raise ValueError(
            f"num_nextn_predict_layers is {num}: it must be from 0 to num_hidden_layers, "
            f"{num_layers}"
        )
    return tuple(f"model.layers.{num_layers + idx}." for idx in range(num))
