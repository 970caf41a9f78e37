"""The card (README.md) of the embedded vision model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from tiny.card import Run
from tiny.picture_batches import Plan
from tiny.picture_wordings import MODEL_NAME


def card(folder: Path, run: Run, plan: Plan, loss: float, planned: Sequence[int]) -> str:
    """The text of the card. Sizes come from the config and the weights in `folder`. `planned`: the
    steps of all plans of the run, of which `plan` is the last."""
    sizes = "\n".join(f"| {name} | {value} |" for name, value in _sizes(folder))
    rows = "\n".join(f"| {kind} | {accuracy:.1%} |" for kind, accuracy in run.accuracies.items())
    options = f"--steps {plan.steps} --batch {plan.batch} --seed {plan.seed}"
    remarks = ""
    if len(planned) > 1:
        listed = ", ".join(f"{one:,}" for one in planned)
        remarks += f"\n\nThe run was interrupted and continued with other plans. Steps: {listed}."
    if run.steps < plan.steps:
        options += f" --stop {run.steps}"
        remarks += f"\n\n**The training is not finished**: {plan.steps:,} steps were planned."
    return f"""# {MODEL_NAME}

The embedded vision model, for tests of images and for trying them out. It was taught five shapes
and the ten digits in seven colours on a white, grey or black background: what is where, how many
there are, what is beside what. It was taught a few facts without pictures, sums up to 9 + 9 and
some small talk, and nothing else.

| | |
| --- | --- |
{sizes}

Pictures of two or three cells of 32 pixels a side are its training data; larger pictures are shrunk
to 96 × 96 pixels and smaller ones grow to 64 × 64. Videos pass through it, but it was not trained
on any. The tokenizer is a byte-level BPE without merges: the words of the questions are one token
each, everything else comes byte by byte. The chat format is Qwen3-VL's, with an image's place as
`<|vision_start|><|image_pad|><|vision_end|>`. The chat template takes tools, but the model was not
trained on any.

## Training

    python scripts/train_tiny.py --arch qwen3-vl --out nanovllm/assets/{MODEL_NAME} \\
        {options}

`scripts/tiny/pictures.py` draws the pictures and `scripts/tiny/picture_tasks.py` asks about them.
The model is transformers' `Qwen3VLForConditionalGeneration`. The loss is the cross-entropy on the
answers, with Muon for the products and AdamW for the rest at a peak learning rate of
{plan.learning_rate}, in {run.steps:,} steps of {plan.batch} pictures with {plan.turns} questions
each; the first steps have only descriptions. It ended at {loss:.4f}. Training took
{run.seconds / 60:.0f} minutes on one {run.device} with torch {run.torch_version}.{remarks}

## Accuracy

Greedy decoding of the saved bf16 weights on {run.num_eval} held-out questions. What lies in which
cell of their pictures occurs in no training picture, in whatever colours of the background, sizes
and places within cells. Of questions without a picture, the exact wordings were held out.

| kind | correct |
| --- | --- |
{rows}
| **all** | **{run.total:.2%}** |

`scripts/accuracy.py --model {MODEL_NAME}` measures the same through the engine.
"""


def _sizes(folder: Path) -> list[tuple[str, str]]:
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    with safe_open(folder / "model.safetensors", "np") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    of_tower = sum(math.prod(shape) for name, shape in shapes.items() if ".visual." in name)
    total = sum(math.prod(shape) for shape in shapes.values())
    heads = [text[f"num_{kind}_heads"] for kind in ("attention", "key_value")]
    taken = ", ".join(map(str, vision["deepstack_visual_indexes"]))
    return [
        ("architecture", "Qwen3-VL, tied embeddings"),
        (
            "parameters",
            f"{total / 1e6:.2f} million, bfloat16; {of_tower / 1e6:.2f} million in the vision "
            "encoder",
        ),
        ("layers", str(text["num_hidden_layers"])),
        ("hidden size, MLP size", f"{text['hidden_size']}, {text['intermediate_size']}"),
        ("query heads, key-value heads, head size", f"{heads[0]}, {heads[1]}, {text['head_dim']}"),
        ("M-RoPE sections", ", ".join(map(str, text["rope_parameters"]["mrope_section"]))),
        ("blocks of the tower", f"{vision['depth']}; deepstack takes {taken}"),
        (
            "hidden size, MLP size, heads of the tower",
            f"{vision['hidden_size']}, {vision['intermediate_size']}, {vision['num_heads']}",
        ),
        (
            "patch, merged patches",
            f"{vision['patch_size']} pixels, {vision['spatial_merge_size']}² to a token",
        ),
        ("positions", str(text["max_position_embeddings"])),
        ("vocabulary", str(text["vocab_size"])),
    ]
