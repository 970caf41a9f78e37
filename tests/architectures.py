"""What tests show of each architecture: the content of docs/architectures.md.

    python -m tests.architectures        # writes the file

A test declares what it shows: `@pytest.mark.shows("eager", architectures=of_types("qwen3"))`, with
keys of CLAIMS and names of ARCHITECTURES. A new architecture is a line of ARCHITECTURES.
"""

from __future__ import annotations

import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"

CLAIMS = {
    "eager": "logits or tokens in eager mode are those of transformers, or of the published "
    "formulas, with random weights in fp32 on a CPU",
    "graph": "the same in graph mode",
    "images": "the same for prompts with images encoded by the engine",
    "sound": "the same for prompts with sound encoded by the engine",
    "ranks": "two or four ranks (`tensor_parallel_size`) give the logits or tokens of one",
    "NPU": 'device "npu" gives the tokens of the CPU; Ascend\'s graphs and ops run in an '
    "interpreter on the host, and not on an NPU (see [npu.md](npu.md))",
    "GPU": "the test runs on a GPU where there is one, as on an H200 before a release; "
    "measurements are in [benchmarks.md](benchmarks.md)",
}
TEXT, EXPERTS, VISION = "Text", "Text, with experts", "Images and text"
AUDIO = "Sound, images and text"
DELTA = "most layers are a gated delta rule; `mtp` layers only draft"


class Entry(NamedTuple):
    """A row of a table: what users know the architecture by."""

    group: str
    models: str
    remarks: str = ""


IN_EAGER_MODE = "on an NPU in eager mode alone"
ARCHITECTURES: dict[str, Entry] = {
    "CohereForCausalLM": Entry(TEXT, "Command R, Command R+, Aya"),
    "Cohere2ForCausalLM": Entry(TEXT, "Command R7B, Command A", IN_EAGER_MODE),
    "Ernie4_5ForCausalLM": Entry(TEXT, "ERNIE 4.5, dense (0.3B)"),
    "Exaone4ForCausalLM": Entry(
        TEXT, "EXAONE 4.0",
        f'`kv_cache_dtype="fp8"` is refused: values have no bound; {IN_EAGER_MODE}',
    ),
    "FalconH1ForCausalLM": Entry(
        TEXT, "Falcon-H1 (0.5B to 34B)",
        "attention beside a Mamba-2 mixer in each layer; no more ranks than `mamba_n_groups`",
    ),
    "Gemma3ForCausalLM": Entry(
        TEXT, "Gemma-3 without images (1B, 270M)",
        "a cap on attention scores and attention in both directions are refused; on an NPU, "
        "graphs of windows are",
    ),
    "Gemma4ForCausalLM": Entry(
        TEXT, "Gemma 4 (E2B, E4B, 26B-A4B, 31B) without images",
        f"`expert_offload` is refused; {IN_EAGER_MODE}",
    ),
    "Glm4ForCausalLM": Entry(TEXT, "GLM-4-0414 (9B, 32B), GLM-Z1"),
    "GraniteForCausalLM": Entry(TEXT, "Granite 3"),
    "HunYuanDenseV1ForCausalLM": Entry(TEXT, "Hunyuan dense (0.5B to 7B)"),
    "LlamaForCausalLM": Entry(TEXT, "Llama 1 to 3.x"),
    "MiniCPMForCausalLM": Entry(
        TEXT, "MiniCPM, MiniCPM4",
        "dense attention only: with a `sparse_config`, `max_model_len` must be below its "
        "`dense_len`",
    ),
    "MistralForCausalLM": Entry(TEXT, "Mistral, Mistral-Small 24B (2501)"),
    "MinistralForCausalLM": Entry(TEXT, "Ministral 8B with layer types"),
    "Ministral3ForCausalLM": Entry(TEXT, "Ministral 3, text only"),
    "Mistral3ForConditionalGeneration": Entry(
        TEXT, "Mistral-Small 3.1 and 3.2, Ministral 3 (3B, 8B, 14B)", "images are refused"
    ),
    "NemotronHForCausalLM": Entry(
        TEXT, "Nemotron-H (8B, 47B, 56B), Nemotron Nano 2, Nemotron 3 (Nano 30B-A3B, Super)",
        "most layers are a Mamba-2 mixer; experts have no gate, `expert_offload` and GGUF files of "
        "them are refused, and they are not tested on an NPU; no more ranks than `n_groups`",
    ),
    "Olmo2ForCausalLM": Entry(
        TEXT, "OLMo-2", '`kv_cache_dtype="fp8"` is refused: values have no bound'
    ),
    "Olmo3ForCausalLM": Entry(
        TEXT, "OLMo-3",
        f'`kv_cache_dtype="fp8"` is refused: values have no bound; {IN_EAGER_MODE}',
    ),
    "Phi3ForCausalLM": Entry(TEXT, "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini"),
    "Qwen2ForCausalLM": Entry(TEXT, "Qwen2, Qwen2.5"),
    "Qwen3ForCausalLM": Entry(TEXT, "Qwen3"),
    "SeedOssForCausalLM": Entry(TEXT, "Seed-OSS 36B"),
    "Qwen3_5ForCausalLM": Entry(TEXT, "Qwen3.5, Qwen3.6 without a vision tower", DELTA),
    "SmolLM3ForCausalLM": Entry(TEXT, "SmolLM3"),
    "DeepseekV2ForCausalLM": Entry(
        EXPERTS, "DeepSeek-V2, V2-Lite",
        "a cache of latents; `norm_topk_prob` is refused; on an NPU in eager mode alone",
    ),
    "DeepseekV3ForCausalLM": Entry(
        EXPERTS, "DeepSeek-V3, V3.1, R1, Kimi-K2, Moonlight-16B-A3B",
        "a cache of latents; layers that predict further tokens (MTP) only draft; on an NPU in "
        "eager mode alone",
    ),
    "Glm4MoeLiteForCausalLM": Entry(EXPERTS, "GLM-4.7-Flash", "as DeepSeek-V3"),
    "GptOssForCausalLM": Entry(
        EXPERTS, "gpt-oss-20b, gpt-oss-120b",
        "experts in MXFP4 or in bf16; flash-attn and `expert_offload` are refused; on an NPU, "
        "graphs and MXFP4 are",
    ),
    "Starcoder2ForCausalLM": Entry(TEXT, "StarCoder2"),
    "Ernie4_5_MoeForCausalLM": Entry(
        EXPERTS, "ERNIE 4.5 (21B-A3B, 300B-A47B), text", "layers that propose tokens are not read"
    ),
    "Glm4MoeForCausalLM": Entry(
        EXPERTS, "GLM-4.5, GLM-4.5-Air, GLM-4.6", "layers that propose tokens (MTP) only draft"
    ),
    "GraniteMoeForCausalLM": Entry(EXPERTS, "Granite 3 with experts (1B-A400M, 3B-A800M)"),
    "GraniteMoeSharedForCausalLM": Entry(EXPERTS, "Granite MoE shared", "a shared expert"),
    "HunYuanMoEV1ForCausalLM": Entry(EXPERTS, "Hunyuan-A13B", "a shared expert"),
    "MixtralForCausalLM": Entry(EXPERTS, "Mixtral"),
    "Qwen2MoeForCausalLM": Entry(EXPERTS, "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "a shared expert"),
    "Qwen3MoeForCausalLM": Entry(EXPERTS, "Qwen3-30B-A3B, Qwen3-235B-A22B"),
    "Qwen3NextForCausalLM": Entry(EXPERTS, "Qwen3-Next-80B-A3B", DELTA),
    "Qwen3_5MoeForCausalLM": Entry(
        EXPERTS, "Qwen3.5-35B-A3B, Qwen3.6-35B-A3B without a vision tower", DELTA
    ),
    **dict.fromkeys(
        (
            "Qwen2_5OmniForConditionalGeneration",
            "Qwen2_5OmniModel",
            "Qwen2_5OmniThinkerForConditionalGeneration",
        ),
        Entry(AUDIO, "Qwen2.5-Omni", "the thinker, which generates text"),
    ),
    "Gemma3ForConditionalGeneration": Entry(
        VISION, "Gemma-3 (4B, 12B, 27B)",
        "an image's tokens attend to all of it, and no step has a part of an image; pan and scan "
        "is refused; on an NPU it is refused",
    ),
    "Gemma4ForConditionalGeneration": Entry(
        VISION, "Gemma 4 (E2B, E4B, 26B-A4B, 31B)",
        "videos and sound are refused, and so is `expert_offload`; on an NPU it is refused",
    ),
    "Qwen2_5_VLForConditionalGeneration": Entry(VISION, "Qwen2.5-VL"),
    "Qwen3_5ForConditionalGeneration": Entry(VISION, "Qwen3.5, Qwen3.6 (27B)", DELTA),
    "Qwen3_5MoeForConditionalGeneration": Entry(
        VISION, "Qwen3.5-35B-A3B, Qwen3.6-35B-A3B", f"with experts; {DELTA}"
    ),
    "Qwen3VLForConditionalGeneration": Entry(VISION, "Qwen3-VL (2B to 32B)"),
    "Qwen3VLMoeForConditionalGeneration": Entry(
        VISION, "Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B", "with experts"
    ),
}  # fmt: skip


def of_types(*model_types: str) -> tuple[str, ...]:
    """The architectures for text of transformers' model types."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return tuple(dict.fromkeys(str(NAMES[model_type]) for model_type in model_types))


@cache
def declared() -> dict[tuple[str, str], list[str]]:
    """The files that show each claim of an architecture. Raises ValueError for unknown names, and
    for a claim about a GPU by a test that uses none."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.shows(" not in path.read_text(encoding="utf-8"):
            continue
        name = path.relative_to(ROOT).as_posix()
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        for key in _marked(module):
            found[key].add(name)
    return {key: sorted(names) for key, names in found.items()}


def _marked(module: object) -> Iterator[tuple[str, str]]:
    """The claims of a module's tests."""
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        for architecture, claim in _claims_of(test):
            if architecture not in ARCHITECTURES or claim not in CLAIMS:
                raise ValueError(f"{name} shows {claim!r} of {architecture!r}: one is not known")
            yield architecture, claim


def _claims_of(test: FunctionType) -> Iterator[tuple[str, str]]:
    marks = list(getattr(test, "pytestmark", ()))
    for mark in marks:
        if mark.name != "shows":
            continue
        if "GPU" in mark.args and not _uses_gpu(test):
            raise ValueError(f"{test.__name__} shows what a GPU does, but does not use one")
        for claim in mark.args:
            yield from ((architecture, claim) for architecture in mark.kwargs["architectures"])


def _uses_gpu(test: FunctionType) -> bool:
    """Whether a test needs a GPU, or has the fixture `device`, perhaps through other fixtures."""
    marks = {mark.name for mark in getattr(test, "pytestmark", ())}
    waiting, seen = [*inspect.signature(test).parameters], set[str]()
    module = inspect.getmodule(test)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            fixture = getattr(module, name, None)
            waiting += inspect.signature(fixture).parameters if callable(fixture) else ()
    return bool(marks & {"gpu", "gpus"}) or "device" in seen


def page() -> str:
    """The content of docs/architectures.md."""
    found = declared()
    lines = [
        "# Architectures",
        "",
        "`python -m tests.architectures` writes this page from the tests' declarations. The file",
        "config.json of a checkpoint names its architecture. Other architectures are refused with",
        "the list of these, and so are config fields with an unsupported effect on results. The",
        "columns, and the tests behind them, are explained [below](#what-is-shown).",
    ]
    for group in (TEXT, EXPERTS, VISION, AUDIO):
        entries = {name: entry for name, entry in ARCHITECTURES.items() if entry.group == group}
        if not entries:
            continue
        claims = [claim for claim in CLAIMS if any((name, claim) in found for name in entries)]
        lines += ["", f"## {group}", "", _row("architecture", "models", *claims, "remarks")]
        lines.append("|---" * (3 + len(claims)) + "|")
        for name, entry in sorted(entries.items()):
            marks = ["yes" if (name, claim) in found else "" for claim in claims]
            lines.append(_row(f"`{name}`", entry.models, *marks, entry.remarks))
    lines += ["", "## What is shown", "", _row("mark", "meaning", "tests"), "|---|---|---|"]
    for claim, meaning in CLAIMS.items():
        files = {file for (_, one), names in found.items() if one == claim for file in names}
        if files:
            lines.append(_row(claim, meaning, ", ".join(f"`{file}`" for file in sorted(files))))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
