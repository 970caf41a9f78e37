"""Prompts of layers with a recurrent state: inputs of the gated delta rule and of Mamba-2, checks
and timings of their kernels.

Shapes: T tokens | R rows | C channels | V heads | H key or state size | I head size
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import gated_delta as chunked_delta
from nanovllm.kernels import ssd as chunked_ssd
from nanovllm.kernels.triton.gated_delta import gated_delta
from nanovllm.kernels.triton.ssd import ssd
from nanovllm.tools.device_limits import DeviceLimits
from scripts.bench.gpu_timing import time_launches
from scripts.bench.kernel_inputs import DTYPE, random_lens, relative_error


class Mixer(NamedTuple):
    """A layer's heads: groups have one key, or one B and C."""

    is_delta: bool
    groups: int
    heads: int
    state: int  # size of a key
    head: int  # size of a value


# Nemotron-H-8B has transformers' default sizes; the others are those of their config.json
MIXERS = {
    "Qwen3.5-35B-A3B": Mixer(True, 16, 32, 128, 128),
    "Nemotron-H-8B": Mixer(False, 8, 128, 128, 64),
    "Falcon-H1-0.5B": Mixer(False, 1, 24, 128, 64),
    "Falcon-H1-7B": Mixer(False, 1, 24, 256, 128),
    "Falcon-H1-34B": Mixer(False, 2, 32, 256, 128),
}
CHECKED, TIMED = [1000, 0, 1, 129, 64], ([8192], [2048], random_lens(15, 100, 1024))
LAYERS = 4  # with states of their own


def inputs(mixer: Mixer, lens: list[int]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(numbers of tokens, states, places) of rows of which every second one has a state."""
    num_rows, num_tokens = len(lens), sum(lens)
    channels = 2 * mixer.groups * mixer.state + mixer.heads * mixer.head
    x_TC = torch.randn(num_tokens, channels, device="cuda").to(DTYPE)
    if mixer.is_delta:
        ba_TJ = torch.randn(num_tokens, 2 * mixer.heads, device="cuda").to(DTYPE)
        of_tokens = [x_TC, ba_TJ, *torch.randn(2, mixer.heads, device="cuda").sub(3)]
    else:
        dt_TV = torch.rand(num_tokens, mixer.heads, device="cuda") * 0.1
        of_tokens = [x_TC, dt_TV, -dt_TV * torch.rand(mixer.heads, device="cuda") * 16]
    state_XVHI = torch.randn(num_rows, mixer.heads, mixer.state, mixer.head, device="cuda")
    row_R = torch.arange(num_rows, device="cuda")
    start_S = torch.tensor([0, *lens], device="cuda").cumsum(0).int()
    return of_tokens, state_XVHI, [start_S, row_R, row_R % 2 == 0, row_R]


def check(name: str) -> float:
    """The largest relative error of results and states, by plain torch in fp32."""
    mixer = MIXERS[name]
    of_tokens, state, places = inputs(mixer, CHECKED)
    kernel, meaning = kernels(mixer)
    ours, theirs = state.clone(), state.clone()
    y, expected = kernel(*of_tokens, ours, *places), meaning(*of_tokens, theirs, *places)
    is_fed = torch.tensor(CHECKED, device="cuda") > 0
    return max(relative_error(y, expected), relative_error(ours[is_fed], theirs[is_fed]))


def kernels(mixer: Mixer) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The op's kernel, and the same in plain torch."""
    if mixer.is_delta:
        return gated_delta, chunked_delta.gated_delta
    return ssd, chunked_ssd.ssd


def all_checks() -> list[tuple[str, Callable[[], float]]]:
    return [(f"mixer {name}", partial(check, name)) for name in MIXERS]


def time_mixers(table: Any, limits: DeviceLimits, variants: bool) -> None:
    """Times the kernels and, if all variants are timed, plain torch.

    The share is that of the memory's bandwidth, by what must be read and written once: inputs,
    results and states.
    """
    for name, mixer in MIXERS.items():
        for lens in TIMED:
            of_tokens, state, places = inputs(mixer, lens)
            of_layers = [(*of_tokens, state.clone(), *places) for _ in range(LAYERS)]
            result = kernels(mixer)[0](*of_layers[0])
            moved = [*of_tokens, result, state, state]
            num_bytes = sum(one.numel() * one.element_size() for one in moved)
            for kernel in kernels(mixer)[: 2 if variants else 1]:
                us = time_launches(kernel, of_layers)
                row = {"model": name, "rows": len(lens), "tokens": sum(lens)}
                place = kernel.__module__.removeprefix("nanovllm.kernels.")
                share = num_bytes / us * 1e6 / limits.bandwidth
                table.add(kind="mixer", **row, kernel=place, us=us, share=share)
