"""Accuracy of the saved embedded vision model, with transformers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny.picture_batches import IGNORED, Encoder, Turn, encode
from tiny.picture_tasks import KINDS, PictureTask
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

Score = tuple[dict[str, float], list[str]]  # accuracy by kind, and the questions that went wrong


@torch.inference_mode()
def score(
    model: Qwen3VLForConditionalGeneration,
    encoder: Encoder,
    tasks: Sequence[PictureTask],
    batch_size: int = 64,
) -> Score:
    """An answer is correct if each of its tokens is the likeliest after those before it, so that
    greedy decoding yields it. The last batch of a size of pictures may be smaller."""
    by_size: defaultdict[Any, list[PictureTask]] = defaultdict(list)
    for one in tasks:
        picture = one.picture
        by_size[picture and (picture.num_rows, picture.num_columns)].append(one)
    num_right, wrong = Counter[str](), list[str]()
    for group in by_size.values():
        for begin in range(0, len(group), batch_size):
            part = group[begin : begin + batch_size]
            for one, right in zip(part, _are_right(model, encoder, part), strict=True):
                num_right[one.task.kind] += right
                if not right:
                    wrong.append(f"{one.task.kind}: {one.task.question!r}, not {one.task.answer!r}")
    num_tasks = Counter(one.task.kind for one in tasks)
    return {kind: num_right[kind] / num_tasks[kind] for kind in KINDS if num_tasks[kind]}, wrong


def _are_right(
    model: Qwen3VLForConditionalGeneration, encoder: Encoder, tasks: Sequence[PictureTask]
) -> list[bool]:
    """For questions whose pictures have the same size."""
    batch = encode(encoder, [[Turn(one.task, one.picture)] for one in tasks])
    media: dict[str, Any] = {}
    if batch.patch_PD is not None and batch.grid_B3 is not None:
        media = {
            "pixel_values": batch.patch_PD.to(model.device),
            "image_grid_thw": batch.grid_B3.to(model.device),
        }
    logits_BSV = model(
        input_ids=batch.input_BS.to(model.device),
        position_ids=batch.position_3BS.to(model.device),
        use_cache=False,
        **media,
    ).logits
    chosen_BS, target_BS = logits_BSV[:, :-1].argmax(-1).cpu(), batch.label_BS[:, 1:]
    return ((chosen_BS == target_BS) | (target_BS == IGNORED)).all(1).tolist()


def evaluate(folder: Path, tasks: Sequence[PictureTask], device: torch.device) -> Score:
    """The score of the saved bf16 weights."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    return score(
        model, Encoder(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)), tasks
    )
