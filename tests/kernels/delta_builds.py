"""The launches of the gated delta rule, with the constants of Qwen3.5-35B-A3B, and of Mamba-2's
recurrence: see `builds.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanovllm.kernels.gated_delta import CHUNK
from nanovllm.kernels.triton import causal_conv as conv
from nanovllm.kernels.triton import chunks, ssd, ssd_step
from nanovllm.kernels.triton import gated_delta as delta
from nanovllm.kernels.triton import gated_delta_step as step

HEADS = {"KEY_HEADS": 16, "NUM_HEADS": 32, "KEY": 128, "KEY_P": 128, "VALUE": 128}
ROWS = 64
# a mixer's heads: those of Falcon-H1-34B, and of Nemotron-H-8B
MAMBA = {
    "34b": {"NUM_HEADS": 32, "HEADS_PER_GROUP": 16, "STATE": 256, "STATE_P": 256, "HEAD": 128},
    "8b": {"NUM_HEADS": 128, "HEADS_PER_GROUP": 16, "STATE": 128, "STATE_P": 128, "HEAD": 64},
}
SSD_TYPES = dict.fromkeys(
    ("dt_ptr", "log_decay_ptr", "scores_ptr", "state_ptr", "total_ptr", "out_ptr"), "*fp32"
)
TYPES = {
    **dict.fromkeys(("a_log_ptr", "dt_bias_ptr", "total_ptr"), "*fp32"),
    **dict.fromkeys(("seq_len_ptr", "q_start_ptr"), "*i32"),
    **dict.fromkeys(("from_ptr", "to_ptr"), "*i64"),
    "is_new_ptr": "*i1",
}
# (name, kernel, constants, warps, stages, types)
Launch = tuple[str, Any, dict[str, Any], int, int, dict[str, str]]


def launches(dtype: str, precision: str, takes_chunks: bool, whole: bool) -> Iterator[Launch]:
    """The kernels of a step and, with `takes_chunks`, of chunks. With `whole` all others, too.

    States are fp32, and in one step of the dtype.
    """
    types = {**TYPES, "state_ptr": "*fp32"}
    of_step = {**HEADS, "VALUE_P": 128, "TAPS": 4}
    yield "delta step", step.gated_delta_step_kernel, of_step, step.NUM_WARPS, 3, types
    if whole and dtype != "fp32":
        yield "delta step, state", step.gated_delta_step_kernel, of_step, step.NUM_WARPS, 3, TYPES
    of_rule = {**HEADS, "VALUE_P": 128, "VALUES": chunks.values_of_program(128)}
    if whole:
        tile = {"TAPS": 4, "ROWS_P": ROWS, "TOKENS": conv.TOKENS, "CHANNELS": conv.CHANNELS}
        for biased in (False, True):
            name, constants = f"convolution, biased {biased}", tile | {"BIASED": biased}
            yield name, conv.causal_conv_kernel, constants, conv.NUM_WARPS, 3, TYPES
        for each in (False, True):
            tile = {"TAPS": 4, "EACH": each, "CHANNELS": conv.STATE_CHANNELS}
            name = f"state of a convolution, each {each}"
            yield name, conv.conv_state_kernel, tile, conv.NUM_WARPS, 3, TYPES
        yield "delta of tokens", delta.delta_tokens_kernel, of_rule, delta.NUM_WARPS, 3, types
    if takes_chunks:
        of_rule |= {"ROWS_P": ROWS, "CHUNK": CHUNK, "PRECISION": precision, "UPCAST": False}
        warps, stages = delta.NUM_WARPS, delta.NUM_STAGES
        for num in (warps, 2 * warps):
            name = f"prepare chunks, {num} warps"
            yield name, delta.prepare_chunks_kernel, of_rule, num, 3, types
        yield "scan chunks", delta.scan_chunks_kernel, of_rule, warps, stages, types


def mixers(shared_bytes: int, takes_chunks: bool, whole: bool) -> Iterator[Launch]:
    """The kernels of Mamba-2 in the same cases; states are fp32."""
    types = {**TYPES, **SSD_TYPES}
    for model, heads in MAMBA.items():
        state, head = heads["STATE"], heads["HEAD"]
        one = heads | {"VALUES": ssd_step.values_of_step(state, head)}
        yield f"ssd step {model}", ssd_step.ssd_step_kernel, one, ssd_step.NUM_WARPS, 3, types
        if whole:
            yield f"ssd of tokens {model}", ssd.ssd_tokens_kernel, one, ssd.NUM_WARPS, 3, types
        if takes_chunks:
            one = heads | {"ROWS_P": ROWS, "CHUNK": CHUNK, "UPCAST": False, "GROUP_P": 16}
            yield f"ssd scores {model}", ssd.ssd_scores_kernel, one, ssd.NUM_WARPS, 3, types
            one["VALUES"] = chunks.values_of_program(head)
            warps_stages = ssd.warps_and_stages(state, shared_bytes)
            yield f"ssd chunks {model}", ssd.ssd_chunks_kernel, one, *warps_stages, types
