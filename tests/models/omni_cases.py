"""A tiny random thinker of Qwen2.5-Omni, with its tokenizer and its processor."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.engines import VOCAB_SIZE, save_tokenizer
from tests.media.vision_cases import CLIP, video_class

NAMES = (
    "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", "<|audio_bos|>", "<|audio_eos|>", "<|vision_bos|>",
    "<|vision_eos|>",
)  # fmt: skip
IDS = {name: VOCAB_SIZE + i for i, name in enumerate(NAMES)}
TOKENS = {
    "audio_token_index": IDS["<|AUDIO|>"], "image_token_index": IDS["<|IMAGE|>"],
    "video_token_index": IDS["<|VIDEO|>"], "audio_start_token_id": IDS["<|audio_bos|>"],
    "audio_end_token_id": IDS["<|audio_eos|>"], "vision_start_token_id": IDS["<|vision_bos|>"],
    "vision_end_token_id": IDS["<|vision_eos|>"],
}  # fmt: skip
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
PICTURE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
FILM = "<|vision_bos|><|VIDEO|><|vision_eos|>"
TEXT = {
    "vocab_size": VOCAB_SIZE + len(NAMES), "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
    "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56,
}  # fmt: skip
# a chunk has 3 tokens
NUM_MELS, CHUNK_FRAMES = 10, 12
AUDIO = {
    "num_mel_bins": NUM_MELS, "encoder_layers": 2, "encoder_attention_heads": 2, "d_model": 32,
    "encoder_ffn_dim": 48, "n_window": CHUNK_FRAMES // 2, "output_dim": 64,
    "max_source_positions": 20,
}  # fmt: skip
RATE = 16000
PROCESSOR = {
    "processor_class": "Qwen2_5OmniProcessor",
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
    "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 20000, **CLIP,
    "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 2, "dither": 0.0,
    "feature_size": NUM_MELS, "hop_length": 160, "n_fft": 400, "n_samples": 32000,
    "nb_max_frames": 200, "padding_side": "right", "padding_value": 0.0,
    "return_attention_mask": True, "sampling_rate": RATE,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'audio' %}" + SOUND + "{% elif part.type == 'image' %}" + PICTURE + ""
    "{% elif part.type == 'video' %}" + FILM + ""
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}; {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def config(**audio: Any) -> Any:
    """transformers' config of the tiny thinker."""
    from transformers import Qwen2_5OmniThinkerConfig

    return Qwen2_5OmniThinkerConfig(
        text_config=TEXT, vision_config=VISION, audio_config={**AUDIO, **audio}, **TOKENS
    )


def model(**audio: Any) -> Any:
    """transformers' model with random weights, far from its initial values."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    made = Qwen2_5OmniThinkerForConditionalGeneration(config(**audio)).eval()
    for name, parameter in made.named_parameters():
        is_norm = any(one in name for one in ("norm", "ln_q", "ln_post"))
        is_weight = name.endswith("weight")
        mean, std = (1.0, 0.1) if is_norm and is_weight else (0.0, 0.1 if is_norm else 0.2)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    # of equal tokens the first is chosen, so no answer has a special token
    head = made.lm_head.weight.data
    head[:5] = head[5]
    head[VOCAB_SIZE:] = head[0]
    return made


def save(folder: Path, **audio: Any) -> Any:
    """Save a checkpoint of the thinker alone; returns the model."""
    made = model(**audio)
    made.save_pretrained(folder)
    return made


def save_processor(folder: Path) -> Any:
    """Save tokenizer and processor; returns transformers' processor."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(NAMES)})
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in NAMES} == IDS
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    for name in NAMES:
        field = f"{name.strip('<|>').lower()}_token"
        setattr(tokenizer, field, name)
        setattr(tokenizer, f"{field}_id", IDS[name])
    parts = (
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        video_class("Qwen2_5OmniProcessor").from_pretrained(folder),
        transformers.WhisperFeatureExtractor.from_pretrained(folder),
        tokenizer,
    )
    # without torchvision, it does not know the classes of video processors
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return transformers.Qwen2_5OmniProcessor(*parts)


def clip(num_samples: int, seed: int = 0) -> np.ndarray:
    """A sound of several tones and noise."""
    draw = np.random.default_rng(seed)
    time = np.arange(num_samples) / RATE
    tones = sum(np.sin(2 * np.pi * hz * time) for hz in draw.uniform(100, 4000, 4))
    return (0.1 * tones + 0.01 * draw.standard_normal(num_samples)).astype(np.float32)


def as_16_bits(samples: np.ndarray) -> np.ndarray:
    return np.round(samples * 32767).astype(np.int16)


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1) -> bytes:
    """A WAV file of 16 bits, by the standard library."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(as_16_bits(samples).tobytes())
    return file.getvalue()


def mels(clips: list[int], seed: int = 0) -> Tensor:
    """Random mel features [frames, M] of clips with so many frames."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sum(clips), NUM_MELS, generator=draw)


@torch.no_grad()
def expected(made: Any, features: Tensor, clips: list[int]) -> Tensor:
    """transformers' tokens of clips, [G, O]."""
    found = made.model.audio_tower(features.T, feature_lens=torch.tensor(clips))
    tokens: Tensor = found.last_hidden_state
    return tokens


@torch.no_grad()
def answer(made: Any, inputs: dict[str, Any], num_tokens: int) -> tuple[list[int], list[Tensor]]:
    """transformers' greedy tokens for the processor's inputs, and the log-probabilities of each."""
    inputs, tokens, logprobs = dict(inputs), [], []
    for _ in range(num_tokens):
        made.model.rope_deltas = None  # it keeps those of earlier prompts
        logits = made(**inputs, use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1))
        added = torch.tensor([tokens[-1:]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
        ones = torch.ones_like(added)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    return tokens, logprobs
