"""GGUF files of architectures whose tensors llama.cpp's converter cuts, joins and reorders.

A conversion moves numbers alone. It is run on the numbers of a checkpoint, and again on their
places: so the values that gguf dequantizes are put where they came from, without its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.gguf_cases import EXPERT, TypeOf, Written, _architecture, _in_type

Tensors = dict[str, Tensor]
Named = Iterator[tuple[str, Tensor]]
VECTORS = (".bias", ".scale", "_inp.weight", ".ssm_a", ".ssm_d")  # never in codes


class Kind(NamedTuple):
    """An architecture, `name` in files: how a tensor is converted, and the keys of its own."""

    name: str
    convert: Callable[[str, Tensor, Any], Named]
    keys: Callable[[gguf.GGUFWriter, Any], None]
    norms_plus_one: bool = False


def write(folder: Path, type_of: TypeOf, kind_name: str | None = None) -> Written:
    """The GGUF file of a checkpoint of transformers, and its real values."""
    from transformers import AutoConfig

    config, weights = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    kind = KINDS[kind_name or config.model_type]
    starts = [0, *accumulate(one.numel() for one in weights.values())]
    places = {
        name: torch.arange(start, start + one.numel()).view(one.shape)
        for (name, one), start in zip(weights.items(), starts)
    }
    stored, from_where = _converted(weights, kind, config), _converted(places, kind, config)
    real = torch.cat([one.flatten().float() for one in weights.values()])
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, kind.name)
    _common_keys(writer, config)
    kind.keys(writer, config)
    for i, (name, one) in enumerate(sorted(stored.items())):
        is_matrix = one.dim() > 1 and not name.endswith(VECTORS)
        is_matrix = is_matrix and "conv1d" not in name and "norm" not in name
        type_name = type_of(name) if is_matrix else "F32"
        raw, values = _in_type(np.ascontiguousarray(one.float().numpy()), type_name, i)
        real[from_where[name].flatten()] = torch.from_numpy(np.array(values).reshape(-1))
        if name.endswith("ssm_a"):
            raw = -np.exp(raw)
        elif kind.norms_plus_one and "norm" in name and "ssm_norm" not in name:
            raw = raw + 1
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "real").mkdir()
    (folder / "real" / "config.json").write_bytes((folder / "config.json").read_bytes())
    parts = real.split([one.numel() for one in weights.values()])
    own = {name: part.view(weights[name].shape).clone() for name, part in zip(weights, parts)}
    save_file(own, folder / "real" / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    return Written(path, folder / "real")


def _converted(weights: Tensors, kind: Kind, config: Any) -> Tensors:
    names = gguf.get_tensor_name_map(_architecture(kind.name), config.num_hidden_layers)
    found, experts = {}, dict[str, list[tuple[int, Tensor]]]()
    for name, one in weights.items():
        if (match := EXPERT.fullmatch(name)) is not None:
            layer, module, expert, matrix = match.groups()
            merged = f"model.layers.{layer}.{module}.experts.{matrix}.weight"
            experts.setdefault(merged, []).append((int(expert), one))
            continue
        for converted_name, converted in kind.convert(name, one, config):
            found[_stored(names, converted_name)] = converted
    for name, of_layer in experts.items():
        ordered = [one for _, one in sorted(of_layer, key=lambda pair: pair[0])]
        found[_stored(names, name)] = torch.stack(ordered)
    return found


def _stored(names: gguf.TensorNameMap, name: str) -> str:
    if name.startswith("blk."):
        return name
    mapped = name.replace("e_score_correction_bias", "e_score_correction.bias")
    stored = names.get_name(mapped, try_suffixes=(".weight", ".bias"))
    assert stored is not None, name
    return stored


def _common_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    eps = getattr(config, "layer_norm_epsilon", None) or config.rms_norm_eps
    writer.add_layer_norm_rms_eps(eps)
    if (rope := getattr(config, "rope_parameters", None)) is None:
        return
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _heads(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _experts(writer: gguf.GGUFWriter, num: int, chosen: int, width: int) -> None:
    writer.add_expert_count(num)
    writer.add_expert_used_count(chosen)
    writer.add_expert_feed_forward_length(width)


# gpt-oss -----------------------------------------------------------------------------------------


def _gpt_oss(name: str, one: Tensor, config: Any) -> Named:
    """Matrices of experts are transposed; rows of gate and up take turns."""
    if "gate_up_proj" in name:
        rows = one if name.endswith("_bias") else one.mT
        end = "bias" if name.endswith("_bias") else "weight"
        prefix = name.partition("gate_up_proj")[0]
        yield f"{prefix}gate_proj.{end}", rows[:, ::2]
        yield f"{prefix}up_proj.{end}", rows[:, 1::2]
    elif name.endswith("down_proj_bias"):
        yield name.replace("_bias", ".bias"), one
    elif name.endswith("down_proj"):
        yield f"{name}.weight", one.mT
    else:
        yield (f"{name}.weight" if name.endswith("sinks") else name), one


def _gpt_oss_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    _heads(writer, config)
    writer.add_sliding_window(config.sliding_window)
    _experts(writer, config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)


# latents -----------------------------------------------------------------------------------------


def _deepseek2(name: str, one: Tensor, config: Any) -> Named:
    if not name.endswith("kv_b_proj.weight"):
        yield name, one
        return
    sizes = [config.qk_nope_head_dim, config.v_head_dim]
    keys, values = one.view(config.num_attention_heads, sum(sizes), -1).split(sizes, dim=1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.mT
    yield name.replace("kv_b_proj", "v_b_proj"), values


def _deepseek2_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_leading_dense_block_count(getattr(config, "first_k_dense_replace", 1))
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    width = config.moe_intermediate_size
    _experts(writer, config.n_routed_experts, config.num_experts_per_tok, width)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if (config.n_group or 1) > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    is_v2 = config.model_type == "deepseek_v2"
    funcs = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(funcs.SOFTMAX if is_v2 else funcs.SIGMOID)
    if (mscale := config.rope_parameters.get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)


# Gemma 4 -----------------------------------------------------------------------------------------


def _gemma4(name: str, one: Tensor, config: Any) -> Named:
    layer = "".join(name.split(".")[2:3])
    if name.endswith("router.scale"):
        yield f"blk.{layer}.ffn_gate_inp.scale", one
    elif name.endswith("per_expert_scale"):
        yield f"blk.{layer}.ffn_down_exps.scale", one
    else:
        is_bare = name.endswith("layer_scalar") or ".experts." in name
        yield (f"{name}.weight" if is_bare else name), one


def _gemma4_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    slides = [one == "sliding_attention" for one in config.layer_types]
    full = layers[slides.index(False)]
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    num_own, wide = config.num_hidden_layers - config.num_kv_shared_layers, config.intermediate_size
    factor = 2 if config.use_double_wide_mlp else 1
    widths = [wide * (factor if i >= num_own else 1) for i in range(config.num_hidden_layers)]
    writer.add_feed_forward_length(widths if factor == 2 else wide)
    writer.add_head_count_kv([one.num_key_value_heads for one in layers])
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    sliding = layers[slides.index(True)].head_dim
    writer.add_key_length_swa(sliding)
    writer.add_value_length_swa(sliding)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding)
    ropes = config.rope_parameters
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    num = int(full.head_dim * ropes["full_attention"].get("partial_rotary_factor", 1.0) / 2)
    factors = np.array([1.0] * num + [1e30] * (full.head_dim // 2 - num), dtype=np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        width = config.moe_intermediate_size
        _experts(writer, config.num_experts, config.top_k_experts, width)


# gated delta rule --------------------------------------------------------------------------------


def _hybrid(name: str, one: Tensor, config: Any) -> Named:
    """Matrices of all experts are cut into gate and up; `A_log` and norms are changed later."""
    layer = "".join(name.split(".")[2:3])
    if name.endswith("experts.gate_up_proj"):
        gate, up = one.chunk(2, dim=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", one
    elif name.endswith("in_proj_qkvz.weight"):
        qkv, z = _by_part(one, config)
        yield f"blk.{layer}.attn_qkv.weight", qkv
        yield f"blk.{layer}.attn_gate.weight", z
    else:
        if name.endswith("dt_bias"):
            name = name.replace("dt_bias", "dt_proj.bias")
        yield name, one.squeeze() if "conv1d" in name or "shared_expert_gate" in name else one


def _by_part(one: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    repeats = config.linear_num_value_heads // config.linear_num_key_heads
    key, value = config.linear_key_head_dim, repeats * config.linear_value_head_dim
    heads = one.view(config.linear_num_key_heads, 2 * (key + value), -1)
    parts = [part.flatten(0, 1) for part in heads.split([key, key, value, value], dim=1)]
    return torch.cat(parts[:3]), parts[3]


def _tiled(name: str, one: Tensor, config: Any) -> Named:
    """As `_hybrid`, with the first value heads of all key heads first."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    size, first = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim

    def tiles(x: Tensor, axis: int, width: int) -> Tensor:
        split = x.unflatten(axis, (keys, values // keys, width))
        return split.transpose(axis, axis + 1).flatten(axis, axis + 2)

    if "in_proj_qkv." in name or "conv1d" in name:
        one = torch.cat((one[:first], tiles(one[first:], 0, size)))
    elif "in_proj_z" in name:
        one = tiles(one, 0, size)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
        one = tiles(one, 0, 1)
    elif "linear_attn.out_proj" in name:
        one = tiles(one, 1, size)
    yield from _hybrid(name, one, config)


def _hybrid_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if getattr(config, "intermediate_size", None):
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    partial = config.rope_parameters.get("partial_rotary_factor", 0.25)
    writer.add_rope_dimension_count(int(config.head_dim * partial))
    if getattr(config, "num_experts", None):
        width = config.moe_intermediate_size
        _experts(writer, config.num_experts, config.num_experts_per_tok, width)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


# Mamba-2 -----------------------------------------------------------------------------------------


def _mixer(name: str, one: Tensor, config: Any) -> Named:
    """`A_log` is changed later."""
    name = name.replace("dt_bias", "dt_proj.bias")
    if name.endswith((".A_log", ".D")):
        one = one.unsqueeze(1)
    elif name.endswith("conv1d.weight"):
        one = one.squeeze(1)
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        groups = getattr(config, "n_groups", None) or config.mamba_n_groups
        one = one.view(groups, -1)
    if config.model_type == "nemotron_h":
        name = name.replace("model.", "backbone.", 1)
    yield name, one


def _falcon_h1_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    _heads(writer, config)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_d_ssm)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_d_ssm // config.mamba_d_head)
    writer.add_ssm_group_count(config.mamba_n_groups)


def _nemotron_h_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    types = config.layers_block_type
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_head_count_kv(
        [config.num_key_value_heads if one == "full_attention" else 0 for one in types]
    )
    writer.add_feed_forward_length(
        [config.intermediate_size if one == "mlp" else 0 for one in types]
    )
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_ssm_inner_size(config.mamba_num_heads * config.mamba_head_dim)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)


def fold_factors(weights: Tensors, config: Any) -> None:
    """Multiplies weights of a Falcon-H1 by its factors, as the converter does."""
    gate, down = config.mlp_multipliers
    factors = {
        "down_proj": down, "gate_proj": gate, "v_proj": config.attention_in_multiplier,
        "q_proj": config.attention_in_multiplier, "o_proj": config.attention_out_multiplier,
        "k_proj": config.key_multiplier * config.attention_in_multiplier,
        "mamba.out_proj": config.ssm_out_multiplier, "lm_head": config.lm_head_multiplier,
        "mamba.in_proj": config.ssm_in_multiplier, "embed_tokens": config.embedding_multiplier,
    }  # fmt: skip
    of_groups = config.mamba_n_groups * config.mamba_d_state
    parts = [config.mamba_d_ssm] * 2 + [of_groups] * 2 + [config.mamba_n_heads]
    for name, one in weights.items():
        for part, factor in factors.items():
            if name.endswith(f"{part}.weight"):
                one.mul_(factor)
        if name.endswith("in_proj.weight"):
            for rows, factor in zip(one.split(parts), config.ssm_multipliers, strict=True):
                rows.mul_(factor)


KINDS = {
    "gpt_oss": Kind("gpt-oss", _gpt_oss, _gpt_oss_keys),
    "deepseek_v2": Kind("deepseek2", _deepseek2, _deepseek2_keys),
    "deepseek_v3": Kind("deepseek2", _deepseek2, _deepseek2_keys),
    "glm4_moe_lite": Kind("deepseek2", _deepseek2, _deepseek2_keys),
    "gemma4_text": Kind("gemma4", _gemma4, _gemma4_keys),
    "qwen3_next": Kind("qwen3next", _hybrid, _hybrid_keys, norms_plus_one=True),
    "qwen3_5_text": Kind("qwen35", _tiled, _hybrid_keys, norms_plus_one=True),
    "qwen3_5_moe_text": Kind("qwen35moe", _tiled, _hybrid_keys, norms_plus_one=True),
    "falcon_h1": Kind("falcon-h1", _mixer, _falcon_h1_keys),
    "nemotron_h": Kind("nemotron_h", _mixer, _nemotron_h_keys),
}
