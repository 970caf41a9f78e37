"""What a request gets of a model's numbers: embeddings of their dimensions, or probabilities.

O numbers of a result
"""

from __future__ import annotations

import numpy as np

from nanovllm.pooling_params import PoolingInfo, PoolingParams

TINY = 1e-12  # the least length by which an embedding is divided, as in torch


def result(info: PoolingInfo, params: PoolingParams, raw_O: np.ndarray) -> np.ndarray:
    """A copy of a row of results, fp32, as `params` ask for it."""
    activates = info.normalizes if params.activates is None else params.activates
    found_O = np.array(raw_O[: params.dimensions], np.float32)
    if not activates:
        return found_O
    if info.makes == "embed":
        return normalized(found_O)
    if info.activation == "softmax":
        shifted_O = np.exp(found_O - found_O.max())
        return shifted_O / shifted_O.sum()
    return sigmoid(found_O) if info.activation == "sigmoid" else found_O


def normalized(x_O: np.ndarray) -> np.ndarray:
    """x / |x|."""
    length = np.sqrt(np.dot(x_O, x_O))
    return x_O / max(length, np.float32(TINY))


def sigmoid(x_O: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−x)), without overflow."""
    return (0.5 * (1.0 + np.tanh(0.5 * x_O))).astype(np.float32)
