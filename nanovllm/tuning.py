"""Options for developers and for measurements: `LLM(tuning={...})`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.checks import Rule, check_fields, is_json_object, sizes

MAX_BYTES = 1 << 50
MAX_TOKENS = 1 << 20  # far above what any machine can use, as the limits of `nanovllm.config`
logger = logging.getLogger(__name__)

ALLOWED: dict[str, Rule] = {
    "snapshot_bytes": ("a number of bytes, from 0", lambda value: 0 <= value <= MAX_BYTES),
    "run_ahead": ("0 or 1", lambda value: value in (0, 1)),
    "vision_patch_budgets": sizes(MAX_TOKENS),
    "npu_graph_options": ("a dict of options by path, with JSON values", is_json_object),
}


@dataclass(frozen=True)
class Tuning:
    """Options that change how steps run, not what they compute. None: the device's default.

    capture: capture decode steps as device graphs, on devices that have them. False launches every
        kernel separately.
    fuse: fuse ops into our own kernels. False leaves all ops but attention, the cache write and the
        sampler to the lowering, as plain torch.
    run_ahead: steps launched before the tokens of the first are read, 0 or 1.
    adapt_draft_length: with speculative_config, choose the number of draft tokens of each step by
        the times of steps and by what was accepted; 0 of them if drafts would not pay. False: all
        steps verify num_speculative_tokens.
    pad_batches: False, in eager mode only, runs batches without padding.
    vision_patch_budgets: the numbers of patches for which programs of the vision encoder are
        compiled, multiples of the patches of one token. Images are packed into calls of these
        sizes; an image larger than all of them runs op by op. See docs/structure.md.
    npu_graph_options: on an NPU, values for fields of the compiler's CompilerConfig: torchair's by
        path, such as {"experimental_config.tiling_schedule_optimize": True}, or npugraph_ex's by
        name, such as {"static_kernel_compile": True}.
    snapshot_bytes: memory for snapshots of the states of recurrent layers. Equal prefixes are
        shared up to a snapshot; 0: they are not. There are at most four for each of max_num_seqs.
    expert_prefetch: with expert_offload, fetch the experts that a layer's input would choose while
        its attention runs. It gains little where the bus is the limit, and wrong guesses cost time.
    persistent_step: run the layers and the head of a decode step as one kernel where it takes the
        GPU, the model and the number of rows; the log says why not elsewhere. None: where it is
        faster, at up to four rows, or eight with long layers. See docs/persistent.md.
    """

    capture: bool = True
    fuse: bool = True
    run_ahead: int | None = None
    adapt_draft_length: bool = True
    pad_batches: bool = True
    vision_patch_budgets: Sequence[int] | None = None
    npu_graph_options: Mapping[str, object] | None = None
    snapshot_bytes: int = 1 << 30
    expert_prefetch: bool = False
    persistent_step: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self, ALLOWED)
        if self.npu_graph_options is not None:
            # through JSON, so that other processes get an equal value (`to_options`)
            given = json.loads(json.dumps(self.npu_graph_options))
            object.__setattr__(self, "npu_graph_options", given)


NAMES = tuple(field.name for field in fields(Tuning))


def moved(options: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Move options of `Tuning` that are given beside `tuning`, as in earlier versions, into it.
    Raises ValueError for one given in both places."""
    found = dict(options)
    beside = {name: found.pop(name) for name in NAMES if name in found}
    if not beside:
        return found
    inside = found.get("tuning") or {}
    if not isinstance(inside, Mapping):
        return found  # refused with the other options
    if both := sorted(beside.keys() & inside.keys()):
        raise ValueError(f"{_words(both)} is given as an option and in tuning: give it in tuning")
    if warn:
        logger.warning("%s: give it in tuning={...}; outside it is deprecated", _words(beside))
    found["tuning"] = {**inside, **beside}
    return found


def _words(names: Iterable[str]) -> str:
    return ", ".join(names)
