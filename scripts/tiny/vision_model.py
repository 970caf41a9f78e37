"""The embedded vision model: its Qwen3-VL, its tokenizer, and the files of its processors.

P patches of all pictures | N heads | H head size | D hidden
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

from tiny.chat_tokenizer import END, PAD, START, byte_level, chat_template, word_pre_tokenizer
from tiny.picture_wordings import every_text
from tiny.pictures import CELL
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from nanovllm.media.settings import PatchSettings

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
VOCAB_SIZE = 536
MAX_POSITIONS = 2048
PATCH, MERGE = 8, 2  # a cell is four tokens
SMALLEST, LARGEST = (2 * CELL) ** 2, (3 * CELL) ** 2  # pixels of a picture
# the fields that the processors of transformers and nanovllm/media/settings.py read
SETTINGS: dict[str, Any] = {
    "size": {"shortest_edge": SMALLEST, "longest_edge": LARGEST},
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PATCH_SETTINGS = PatchSettings(
    PATCH, SMALLEST, LARGEST, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
)

CHAT_TEMPLATE = chat_template(
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for content in message.content or [] %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level as that of the other embedded models; the words of questions and answers are one
    token each."""
    pre_tokenizer = word_pre_tokenizer()
    pieces = {piece for text in every_text() for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    words = sorted(piece for piece in pieces if len(piece) > 1)
    tokenizer = byte_level(words, SPECIAL_TOKENS, CHAT_TEMPLATE)
    if len(tokenizer) > VOCAB_SIZE:
        raise ValueError(f"{len(tokenizer)} tokens do not fit a vocabulary of {VOCAB_SIZE}")
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """A new model with random weights of torch's seed."""
    vocab = tokenizer.get_vocab()
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "eos_token_id": vocab[END],
        "pad_token_id": vocab[PAD],
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=vocab[IMAGE],
            video_token_id=vocab[VIDEO],
            vision_start_token_id=vocab[VISION_START],
            vision_end_token_id=vocab[VISION_END],
            tie_word_embeddings=True,
        )
    )
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [vocab[END], vocab[PAD]]
    model.generation_config.pad_token_id = vocab[PAD]
    return model


def equal_sizes(model: Qwen3VLForConditionalGeneration) -> None:
    """Make the vision encoder attend to all pictures of a call at once: they must have the same
    size.

    transformers processes them one by one, except with flash-attention.
    """
    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(_equal_attention, block.attn)


def _equal_attention(
    module: Qwen3VLVisionAttention,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    """Qwen3VLVisionAttention.forward for pictures of one size: [P, D] to [P, D]."""
    num_pictures = len(cu_seqlens) - 1
    qkv = module.qkv(hidden_states).unflatten(1, (3, module.num_heads, -1))
    q_PNH, k_PNH, v_PNH = qkv.unbind(1)
    q_PNH, k_PNH = apply_rotary_pos_emb_vision(q_PNH, k_PNH, *position_embeddings)
    heads = [one.unflatten(0, (num_pictures, -1)).transpose(1, 2) for one in (q_PNH, k_PNH, v_PNH)]
    out = functional.scaled_dot_product_attention(*heads, scale=module.scaling)
    return module.proj(out.transpose(1, 2).flatten(0, 1).flatten(1))


def save(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Writes bf16 weights and all other files but the card. The model itself does not change."""
    out.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    del state["lm_head.weight"]  # the same as the embeddings
    weights = {name: value.bfloat16() for name, value in state.items()}
    model.save_pretrained(out, state_dict=weights)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    _write(out / "config.json", config)
    found = json.loads((out / "tokenizer_config.json").read_text())
    _write(out / "tokenizer_config.json", {**found, "tokenizer_class": "PreTrainedTokenizerFast"})
    common = {**SETTINGS, "processor_class": "Qwen3VLProcessor"}
    _write(
        out / "preprocessor_config.json",
        {**common, "image_processor_type": "Qwen2VLImageProcessor"},
    )
    _write(
        out / "video_preprocessor_config.json",
        {**common, "video_processor_type": "Qwen3VLVideoProcessor", "fps": 2},
    )


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
