"""Writes GGUF files of small checkpoints as llama.cpp's converter does, with the package gguf.

Beside a file is a checkpoint with the real values of its numbers, as gguf dequantizes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
EXPERT = re.compile(r"model\.layers\.(\d+)\.(\w+)\.experts\.(\d+)\.(\w+)\.weight")
# Types that gguf does not write: the places of numbers in fp16 in a block.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
STD = 0.06  # of the real values of blocks that are drawn
TypeOf = Callable[[str], str]  # from the name of a matrix in the file


class Written(NamedTuple):
    path: Path
    real: Path  # a folder


class Kind(NamedTuple):
    """How llama.cpp converts an architecture, `name` in files; `experts` are the names of merged
    tensors."""

    name: str
    permutes: bool = False
    norms_plus_one: bool = False
    experts: str = "model.layers.{layer}.{module}.experts.{matrix}"


KINDS = {
    "llama": Kind("llama", permutes=True),
    "mixtral": Kind("llama", permutes=True, experts="layers.{layer}.feed_forward.experts.{matrix}"),
    "qwen2": Kind("qwen2"),
    "qwen2_moe": Kind("qwen2moe"),
    "qwen3": Kind("qwen3"),
    "qwen3_moe": Kind("qwen3moe"),
    "glm4_moe": Kind("glm4moe"),
    "gemma3_text": Kind("gemma3", norms_plus_one=True),
    "phi3": Kind("phi3"),
    "granite": Kind("granite", permutes=True),
    "olmo2": Kind("olmo2"),
    "olmo3": Kind("olmo2"),
    "smollm3": Kind("smollm3", permutes=True),
}


def in_turns(*types: str) -> TypeOf:
    """Types in turns, by the names of matrices in their order."""
    known: dict[str, str] = {}
    return lambda name: known.setdefault(name, types[len(known) % len(types)])


def blocks(shape: tuple[int, ...], type_name: str, seed: int) -> Array:
    """Random blocks of a type that gguf does not write, whose real values are about `STD`.

    Scales of Q4_K are powers of 2, so that their products with 6 bits are exact in fp16.
    """
    rng, kind = np.random.default_rng(seed), gguf.GGMLQuantizationType[type_name]
    columns, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, num_bytes), dtype=np.uint8)
    scale = np.exp2(rng.integers(-1, 2, (*raw.shape[:-1], 1))).astype(np.float32)
    for factor in (1.0, None):
        for at in HALVES[type_name]:
            raw[..., at : at + 2] = (scale * (factor or 1.0)).astype(np.float16).view(np.uint8)
        if factor is not None:
            found = dequantize(raw.reshape(*shape[:-1], -1), kind)
            scale *= np.exp2(np.round(np.log2(STD / found.std())))
    return raw.reshape(*shape[:-1], -1)


def write(
    folder: Path,
    type_of: TypeOf = lambda name: "F32",
    *,
    num_files: int = 1,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Written:
    """The GGUF file of a checkpoint of transformers, and its real values."""
    from transformers import AutoConfig

    config, weights = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    kind, real = KINDS[config.model_type], dict(weights)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, kind.name, split_max_tensors=-(-len(weights) // num_files))
    if num_files == 1:
        writer = gguf.GGUFWriter(path, kind.name)
    add_metadata(writer, config, kind.name)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, _value_type(value))
    for extra_name, extra in (tensors or {}).items():
        writer.add_tensor(extra_name, extra)
    if tokenizer is not None:
        tokenizer(writer)
    names = gguf.get_tensor_name_map(_architecture(kind.name), config.num_hidden_layers)
    for i, (name, sources) in enumerate(sorted(_merged(weights, kind).items())):
        one = torch.stack([weights[source] for source in sources]).numpy()
        one = one if EXPERT.fullmatch(sources[0]) else one[0]
        mapped = name.replace("e_score_correction_bias", "e_score_correction.bias")
        stored_name = names.get_name(mapped, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, name
        is_matrix = (one.ndim > 1 and not stored_name.startswith("blk")) or _is_packed(stored_name)
        type_name = type_of(stored_name) if is_matrix and one.ndim > 1 else "F32"
        raw, values = _in_type(one, type_name, i)
        for source, value in zip(sources, values if one.ndim == 3 else [values], strict=True):
            real[source] = torch.from_numpy(np.array(value, dtype=np.float32))
        raw = _as_stored(raw, name, config, kind)
        writer.add_tensor(stored_name, raw, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "real").mkdir()
    (folder / "real" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(real, folder / "real" / "model.safetensors", {"format": "pt"})
    first = path if num_files == 1 else next(iter(sorted(folder.glob("model-00001-of-*.gguf"))))
    (folder / "model.safetensors").unlink()
    return Written(first, folder / "real")


def add_metadata(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    """The keys that the converter writes for a config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    for key in ("short", "long"):
        if factors := rope.get(f"{key}_factor"):
            factor = np.array(factors, dtype=np.float32)
            writer.add_tensor(f"rope_factors_{key}.weight", factor)
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern(
            [one == "sliding_attention" for one in config.layer_types]
        )
    num_experts = getattr(config, "num_experts", getattr(config, "num_local_experts", None))
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if name == "glm4moe":
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_nextn_predict_layers(0)
    if name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Array:
    """What the frequencies of a Llama 3.1 are divided by, as the converter computes it."""
    freqs = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factors = rope["original_max_position_embeddings"], []
    for length in 2 * np.pi / freqs:
        smooth = min(1.0, max(0.0, (original / length - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, found in gguf.MODEL_ARCH_NAMES.items() if found == name)


def _value_type(value: Any) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.get_type(value)


def _is_packed(stored_name: str) -> bool:
    """Whether the converter quantizes a layer's tensor: not routers."""
    return not stored_name.endswith(("norm.weight", "_inp.weight", "_shexp.weight", ".bias")) or (
        stored_name.endswith("_shexp.weight") and "_inp_" not in stored_name
    )


def _merged(tensors: Mapping[str, Any], kind: Kind) -> dict[str, list[str]]:
    """The sources of each tensor: the experts of a layer are merged."""
    found: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda one: [int(x) if x.isdigit() else x for x in
                                                 re.split(r"(\d+)", one)]):  # fmt: skip
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            layer, module, _, matrix = expert.groups()
            merged = kind.experts.format(layer=layer, module=module, matrix=matrix)
            found.setdefault(f"{merged}.weight", []).append(name)
        else:
            found[name] = [name]
    return found


def _in_type(one: Array, type_name: str, seed: int) -> tuple[Array, Array]:
    """A tensor in a type, and its real values."""
    kind = gguf.GGMLQuantizationType[type_name]
    raw = blocks(one.shape, type_name, seed) if type_name in HALVES else quantize(one, kind)
    return raw, dequantize(raw, kind)


def _as_stored(raw: Array, name: str, config: Any, kind: Kind) -> Array:
    """What the converter changes in a tensor, which does not depend on its type."""
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if kind.permutes and f".self_attn.{part}_proj." in name:
            halves = raw.reshape(heads, 2, raw.shape[0] // heads // 2, *raw.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(raw.shape))
    if kind.norms_plus_one and name.endswith("norm.weight"):
        return raw + 1
    if name.endswith("shared_expert_gate.weight"):
        return raw.reshape(-1)
    return raw


def add_byte_level(writer: gguf.GGUFWriter, folder: Path, pre: str, template: str = "") -> None:
    """The tokenizer of a folder, which is byte-level BPE."""
    import json

    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = stored["model"]["vocab"]
    texts: Sequence[str] = sorted(vocab, key=lambda text: vocab[text])
    control = {one["content"] for one in stored["added_tokens"] if one["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([3 if text in control else 1 for text in texts])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["</s>"])
    writer.add_eot_token_id(vocab["<end>"])
    writer.add_unk_token_id(vocab["<unk>"])
    writer.add_pad_token_id(vocab["<pad>"])
    if template:
        writer.add_chat_template(template)
