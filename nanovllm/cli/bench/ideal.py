"""The shortest time for a workload within a device's limits."""

from __future__ import annotations

import numpy as np

from nanovllm.models.layer_state import recurrent_bytes
from nanovllm.models.model import Model
from nanovllm.runner.spec import EngineSpec
from nanovllm.tools.device_limits import DeviceLimits


class _Weights:
    """A model's weights, for the bytes and operations of a step."""

    def __init__(self, model: Model) -> None:
        cfg, self._moe = model.config, model.config.moe
        self._bytes, self._expert_bytes = model.weight_bytes, model.expert_bytes
        self.per_token: float = model.num_weights()
        if self._moe is not None:
            unused = 1 - self._moe.top_k / self._moe.num_experts
            self.per_token -= unused * model.num_weights(of_experts=True)
        self.of_layers_per_token = self.per_token - cfg.vocab_size * cfg.hidden_size / cfg.num_ranks

    def num_bytes(self, num_rows: int) -> float:
        """Bytes of weights that a step reads with evenly spread routing."""
        if self._moe is None:
            return self._bytes
        unread = 1 - self._moe.distinct_experts(num_rows) / self._moe.num_experts
        return self._bytes - unread * self._expert_bytes


def _tokens_read(context: np.ndarray, steps: int, window: int) -> float:
    """The tokens that attention reads in the next steps of rows with so many tokens; a window of 0
    has no end."""
    growing = np.clip(window - context, 0, steps) if window else np.full(context.shape, steps)
    return float(
        (growing * context + growing * (growing + 1) / 2 + (steps - growing) * window).sum()
    )


def step_bytes(model: Model, spec: EngineSpec, lengths: list[int]) -> dict[str, float]:
    """The bytes of a decode step of rows with so many tokens: of weights, cache and states."""
    context = np.array(lengths)
    window_bytes = model.page_groups.window_bytes(spec.cache_dtype)
    return {
        "weights": _Weights(model).num_bytes(len(lengths)),
        "cache": sum(_tokens_read(context, 1, size) * num for size, num in window_bytes.items()),
        "states": len(lengths) * 2.0 * recurrent_bytes(model.kept, model.config.dtype),
    }


def ideal_seconds(
    model: Model,
    spec: EngineSpec,
    prompts: list[list[int]],
    output_lens: list[int],
    rows: int,
    limits: DeviceLimits,
) -> float:
    """The seconds for prompts and answers, with up to `rows` requests at a time.

    Prompts go through the layers once, at the full matrix rate. A decode step takes the longer of
    reading the weights and multiplying by them, plus reading the KV cache of every row, and plus
    reading and writing its recurrent states once. It reads the experts that its rows choose with
    evenly spread routing; a token is multiplied only by its own experts.
    """
    weights = _Weights(model)
    state_bytes = 2 * recurrent_bytes(model.kept, model.config.dtype)
    window_bytes = model.page_groups.window_bytes(spec.cache_dtype)
    seconds = 2 * weights.of_layers_per_token * sum(map(len, prompts)) / limits.flops
    waiting = list(zip((len(prompt) for prompt in prompts), (n - 1 for n in output_lens)))[::-1]
    context: np.ndarray = np.zeros(0)
    left: np.ndarray = np.zeros(0)
    while waiting or left.size:
        fresh = [waiting.pop() for _ in range(min(rows - left.size, len(waiting)))]
        context = np.append(context, [length for length, _ in fresh])
        left = np.append(left, [num for _, num in fresh])
        steps = max(1, int(left.min())) if not waiting else 1
        each = limits.seconds(weights.num_bytes(left.size), 2 * weights.per_token * left.size)
        cached = sum(
            _tokens_read(context, steps, window) * num_bytes
            for window, num_bytes in window_bytes.items()
        )
        moved = cached + steps * left.size * state_bytes
        seconds += steps * each + moved / limits.bandwidth
        context, left = context + steps, left - steps
        context, left = context[left > 0], left[left > 0]
    return seconds
