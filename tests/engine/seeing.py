"""Tiny vision checkpoints with tokenizer, processor and template, and transformers' answers."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from nanovllm import LLM, SamplingParams
from tests.engines import VOCAB_SIZE
from tests.media.vision_cases import SPECIAL, Case, make_case
from tests.models.tower_cases import BUDGETS

NUM_TOKENS = 6
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}" + PICTURE + "{% elif part.type == 'video' %}" + FILM + ""
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}; {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
IDS = {name: VOCAB_SIZE + i for i, name in enumerate(SPECIAL)}
TOKENS = {
    "vision_start_token_id": IDS["<|vision_start|>"], "vision_end_token_id": IDS["<|vision_end|>"],
    "image_token_id": IDS["<|image_pad|>"], "video_token_id": IDS["<|video_pad|>"],
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + len(SPECIAL), "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "head_dim": 16,
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
}  # fmt: skip


def _rope(sections: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    return TEXT | {"rope_parameters": rope}


def _qwen2_5() -> Any:
    vision = VISION | {
        "patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56, "tokens_per_second": 3,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=_rope([2, 3, 3]), vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    vision = VISION | {
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=_rope([4, 2, 2]), vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


MODELS = {"Qwen2_5_VLProcessor": _qwen2_5, "Qwen3VLProcessor": _qwen3}


@dataclass
class Seeing:
    """A checkpoint in `folder`: transformers' model and processor."""

    hf: Any
    case: Case

    @property
    def folder(self) -> Path:
        return self.case.folder

    @property
    def truncates_seconds(self) -> bool:
        """Whether positions in time are wrong, as in transformers 5.17 for Qwen2.5-VL."""
        source = inspect.getsource(type(self.hf.model).get_rope_index)
        return "int(next(second_per_grid_ts))" in source

    def llm(self, **options: Any) -> LLM:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 512}
        return LLM(
            str(self.folder), device="cpu", dtype="float32", graph_batch_sizes=[8],
            kvcache_block_size=16, vision_patch_budgets=BUDGETS, **{**sizes, **options},
        )  # fmt: skip

    def expected(self, text: str, **media: Any) -> tuple[list[int], list[int]]:
        """The ids of transformers' processor for a prompt, and its model's greedy tokens."""
        inputs = dict(self.case.theirs(text=[text], return_tensors="pt", **media))
        prompt_ids, found = inputs["input_ids"][0].tolist(), []
        for _ in range(NUM_TOKENS):
            self.hf.model.rope_deltas = None  # it keeps those of earlier prompts
            with torch.no_grad():
                found.append(int(self.hf(**inputs, use_cache=False).logits[0, -1].argmax()))
            added = torch.tensor([found[-1:]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
            ones = torch.ones_like(added)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
            if "mm_token_type_ids" in inputs:
                kinds = inputs["mm_token_type_ids"]
                inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ones)], dim=1)
        return prompt_ids, found


def make(family: str, folder: Path) -> Seeing:
    """A checkpoint with random weights whose answers have no placeholder tokens."""
    case = make_case(family, folder)
    tokenizer = case.theirs.tokenizer
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL} == IDS
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    hf = MODELS[family]().eval()
    for name, param in hf.named_parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.1 if "visual" in name else 0.2)
    hf.lm_head.weight.data[VOCAB_SIZE:] = hf.lm_head.weight.data[0]
    hf.save_pretrained(folder)
    preprocessor = folder / "preprocessor_config.json"
    assert json.loads(preprocessor.read_text())["processor_class"] == family
    return Seeing(hf, case)
