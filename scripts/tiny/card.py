"""The card (README.md) of an embedded model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tiny import tasks, tool_tasks
from tiny.architectures import MODEL_NAMES
from tiny.training import LEARNING_RATE, row_len_shares


@dataclass(frozen=True)
class Run:
    """The settings and results of a training run."""

    steps: int
    examples: int
    batch_tokens: int
    seed: int
    seconds: float  # of generating the data and training
    device: str
    torch_version: str
    num_eval: int
    accuracies: dict[str, float]  # by kind
    total: float
    expert_shares: tuple[float, float] | None = None  # the least and the greatest of all layers


def card(folder: Path, run: Run) -> str:
    """The text of a card. Sizes come from the config and the weights in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    sizes = "\n".join(f"| {name} | {value} |" for name, value in _sizes(folder, config))
    rows = "\n".join(f"| {kind} | {accuracy:.1%} |" for kind, accuracy in run.accuracies.items())
    options = f"--steps {run.steps} --examples {run.examples} "
    options += f"--batch-tokens {run.batch_tokens} --seed {run.seed}"
    minutes = f"{run.seconds / 60:.1f}"
    arch = config["model_type"].removesuffix("_text")
    row_lens = ", ".join(map(str, row_len_shares(arch)))
    dtype = "fp32" if run.device == "CPU" else "bf16 autocast"
    name = MODEL_NAMES[arch]
    with_tools = set(tool_tasks.KINDS) <= set(run.accuracies)
    more = _not_inferred(arch) + _kinds(with_tools)
    return f"""# {name}

{_INTRODUCTIONS[arch]} It can {_skills(arch)}{_ABILITIES[with_tools]}

| | |
| --- | --- |
{sizes}

The tokenizer is a byte-level BPE without merges: the commonest words of the phrasings are one token
each, everything else comes byte by byte. The chat format is ChatML, as Qwen's.

## Training

    python scripts/train_tiny.py {_ARCH_OPTIONS[arch]}--out nanovllm/assets/{name} \\
        {options}

{_SOURCES[with_tools]}The loss is the cross-entropy on the answers, in rows of
several conversations ({row_lens} tokens), with AdamW at a peak learning rate of {LEARNING_RATE} and
{dtype}. Generating the data and training took {minutes} minutes on one {run.device}
with torch {run.torch_version}.
{_balance(config, run)}
## Accuracy

Greedy decoding of the saved bf16 weights on {run.num_eval} held-out questions. Their contents (the
pair of numbers, the word) occur in training in no phrasing.{more}

| kind | correct |
| --- | --- |
{rows}
| **all** | **{run.total:.2%}** |

`scripts/accuracy.py` measures the same through the engine.
"""


_INTRODUCTIONS = {
    "qwen3": (
        "The model embedded in nanovllm: the engine can be tried and tested without a download."
    ),
    "mixtral": (
        "The embedded model with a mixture of experts, for tests of offload and compression."
    ),
    "qwen3_5": (
        "The embedded hybrid: three of its layers are a gated delta rule, one is attention."
    ),
}
_ALL = """add
and subtract up to 999, sort up to six numbers, reverse and spell words of up to twelve letters,
count and compare. It has a few hundred facts and some small talk. It was taught nothing else, and
mostly says so. """
_FEW = """spell
words of up to twelve letters, count, compare numbers and tell what comes before and after one. It
was taught nothing else. """


def _not_inferred(arch: str) -> str:
    if "fact" not in tasks.kinds_of(arch):
        return ""
    return """ Facts and small talk cannot be
inferred: of those, the phrasing of a fact, or the exact wording, was held out."""


def _skills(arch: str) -> str:
    return _FEW if tasks.kinds_of(arch) != tasks.KINDS else _ALL


# by whether the model was trained with tools
_ABILITIES = {
    True: (
        "It calls the tools of a request, if they are few and need only texts and\n"
        "numbers that the question has, and repeats what they return."
    ),
    False: "Its chat template takes tools, but it was not trained on any.",
}
_SOURCES = {
    True: "`scripts/tiny/tasks.py` and `scripts/tiny/tool_tasks.py` generate the data.\n",
    False: "`scripts/tiny/tasks.py` generates the data. ",
}
_ARCHITECTURES = {"qwen3_5_text": "Qwen3.5"}
_ARCH_OPTIONS = {"qwen3": "", "mixtral": "--arch mixtral ", "qwen3_5": "--arch qwen3_5 "}


def _kinds(with_tools: bool) -> str:
    if not with_tools:
        return ""
    return """

"call" are questions that a tool answers: the names and all arguments of the calls must be right.
"result" are answers from what tools returned, "plain" questions that none of the tools answers.
Their tools are partly made up; the first argument of a call was held out."""


def _sizes(folder: Path, config: dict[str, Any]) -> list[tuple[str, str]]:
    with safe_open(folder / "model.safetensors", "np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    num_millions = sum(math.prod(shape) for shape in shapes) / 1e6
    heads = [config[f"num_{kind}_heads"] for kind in ("attention", "key_value")]
    mlp = f"{config['hidden_size']}, {config['intermediate_size']}"
    name = config["model_type"]
    sizes = [
        ("architecture", f"{_ARCHITECTURES.get(name, name).capitalize()}, tied embeddings"),
        ("parameters", f"{num_millions:.2f} million, bfloat16"),
        ("layers", str(config["num_hidden_layers"])),
    ]
    if "num_local_experts" in config:
        chosen = config["num_experts_per_tok"]
        sizes += [
            ("hidden size, expert width", mlp),
            (
                "experts of a layer",
                f"{config['num_local_experts']}, of which a token uses {chosen}",
            ),
        ]
    else:
        sizes.append(("hidden size, MLP size", mlp))
    if "linear_num_key_heads" in config:
        rule = [config[f"linear_num_{kind}_heads"] for kind in ("key", "value")]
        rule += [config[f"linear_{kind}_head_dim"] for kind in ("key", "value")]
        sizes.append(("key heads, value heads, their sizes", ", ".join(map(str, rule))))
    return [
        *sizes,
        (
            "query heads, key-value heads, head size",
            f"{heads[0]}, {heads[1]}, {config['head_dim']}",
        ),
        ("positions", str(config["max_position_embeddings"])),
        ("vocabulary", str(config["vocab_size"])),
    ]


def _balance(config: dict[str, Any], run: Run) -> str:
    if run.expert_shares is None:
        return ""
    least, greatest = run.expert_shares
    coef, even = config["router_aux_loss_coef"], 1 / config["num_local_experts"]
    return f"""
Switch Transformers' balance loss of every layer, times {coef}, keeps all experts in use. Among the
choices that the tokens of a batch make in one layer, an expert has a share of {least:.1%} to
{greatest:.1%}; {even:.1%} would be even.
"""
