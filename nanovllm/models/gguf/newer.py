"""The fields of config.json of architectures with sinks, latents, a gated delta rule, mixers, or
layers of two sizes: see `config`."""

from __future__ import annotations

from collections.abc import Callable

from nanovllm.models.gguf.checkpoint import small_tensor
from nanovllm.models.gguf.facts import LARGEST_ROPE, Facts, Fields
from nanovllm.models.gguf.header import GgufError
from nanovllm.models.gguf.restored import num_proposing

SOFTMAX, SIGMOID = 1, 2  # how experts are scored
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
NOT_ROTATED = 1e29  # what frequencies that do not rotate are divided by, at least


def _gpt_oss(facts: Facts) -> Fields:
    rope = facts.rope(facts.head_dim())
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    num = facts.size("block_count")
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "intermediate_size": facts.size("expert_feed_forward_length"),
        "num_local_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "sliding_window": facts.size("attention.sliding_window"),
        "layer_types": [FULL if i % 2 else SLIDING for i in range(num)],
        "attention_bias": facts.has("blk.0.attn_q.bias"), "rope_parameters": rope,
    }  # fmt: skip


def _deepseek2(facts: Facts) -> Fields:
    """DeepSeek-V2 by its scores, otherwise DeepSeek-V3, which GLM-4.7-Flash and Kimi-K2 are too."""
    heads, proposing = facts.size("attention.head_count"), num_proposing(facts.header)
    rotated = facts.size("rope.dimension_count")
    key = facts.size("attention.key_length_mla", facts.size("attention.key_length"))
    value = facts.size("attention.value_length_mla", facts.size("attention.value_length"))
    rope = facts.rope(rotated)
    if rope["rope_type"] == "yarn":
        mscale = 10.0 * (facts.number("rope.scaling.yarn_log_multiplier", 0.0) or 0.0)
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    found = {
        "num_hidden_layers": facts.size("block_count") - proposing, "head_dim": rotated,
        "num_key_value_heads": heads, "rope_parameters": rope, "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated, "v_head_dim": value,
        "kv_lora_rank": facts.size("attention.kv_lora_rank"),
        "q_lora_rank": facts.get("attention.q_lora_rank", int),
        "n_routed_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "n_shared_experts": facts.size("expert_shared_count"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "norm_topk_prob": facts.get("expert_weights_norm", bool, False),
        "n_group": facts.size("expert_group_count", 1),
        "topk_group": facts.size("expert_group_used_count", 1), "attention_bias": False,
    }  # fmt: skip
    scored = facts.get("expert_gating_func", int, SOFTMAX)
    if scored == SIGMOID:
        return found | {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "num_nextn_predict_layers": proposing, "rope_interleave": True,
        }  # fmt: skip
    if scored != SOFTMAX:
        raise GgufError(
            f"{facts.header.path}: deepseek2.expert_gating_func is {scored}: only {SOFTMAX} and "
            f"{SIGMOID} are supported"
        )
    method = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    return found | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "topk_method": method,
    }  # fmt: skip


def _gemma4(facts: Facts) -> Fields:
    num, slides = facts.size("block_count"), facts.layers("attention.sliding_window_pattern", bool)
    types = [SLIDING if one else FULL for one in slides]
    full, sliding = facts.size("attention.key_length"), facts.size("attention.key_length_swa")
    shared = facts.get("attention.shared_kv_layers", int, 0)
    inputs = facts.get("embedding_length_per_layer_input", int, 0)
    widths = facts.layers("feed_forward_length", int)
    heads = dict(zip(types, facts.layers("attention.head_count_kv", int)))
    own = [f"blk.{i}.attn_v.weight" for i in range(num - shared) if types[i] == FULL]
    table = facts.tensors.get("per_layer_token_embd.weight")
    rotated = facts.size("rope.dimension_count_swa", sliding)
    found = {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text",
        "head_dim": sliding, "global_head_dim": full, "layer_types": types,
        "num_key_value_heads": heads.get(SLIDING, heads[types[-1]]),
        "num_global_key_value_heads": heads.get(FULL, heads[types[-1]]),
        "intermediate_size": widths[0], "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "attention_k_eq_v": any(not facts.has(name) for name in own),
        "num_kv_shared_layers": shared, "hidden_size_per_layer_input": inputs,
        "vocab_size_per_layer_input": table.shape[0] if table is not None else 0,
        "sliding_window": facts.size("attention.sliding_window"),
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": facts.has("blk.0.attn_q.bias"),
        "final_logit_softcapping": facts.number("final_logit_softcapping"),
        "rope_parameters": {
            SLIDING: {
                "rope_type": "default", "rope_theta": facts.number("rope.freq_base_swa", 1e4),
                "partial_rotary_factor": rotated / sliding,
            },
            FULL: _rope_of_full(facts, full),
        },
    }  # fmt: skip
    if facts.get("expert_count", int, 0):
        found |= {
            "enable_moe_block": True, "num_experts": facts.size("expert_count"),
            "top_k_experts": facts.size("expert_used_count"),
            "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        }  # fmt: skip
    return found


def _rope_of_full(facts: Facts, size: int) -> Fields:
    """The first frequencies of a whole head: the others are divided by a number without end."""
    part = 1.0
    if facts.has("rope_freqs.weight"):
        factors = small_tensor(facts.header, "rope_freqs.weight", LARGEST_ROPE)
        num = sum(one < NOT_ROTATED for one in factors)
        if factors[:num] != [1.0] * num or 2 * len(factors) != size:
            raise GgufError(
                f"{facts.header.path}: rope_freqs.weight has other factors than 1 for the first of "
                f"{size // 2} frequencies"
            )
        part = 2 * num / size
    return {
        "rope_type": "proportional", "rope_theta": facts.number("rope.freq_base", 1e6),
        "partial_rotary_factor": part,
    }  # fmt: skip


def _hybrid(facts: Facts) -> Fields:
    """A Qwen3-Next file has the inputs of the delta rule part by part too, and its experts' weights
    are divided by their sum: it is a Qwen3.5 with experts."""
    num = facts.size("block_count") - num_proposing(facts.header)
    values = facts.size("ssm.time_step_rank")
    found = {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text",
        "num_hidden_layers": num, "attention_bias": False,
        "layer_types": [LINEAR if facts.has(f"blk.{i}.ssm_a") else FULL for i in range(num)],
        "linear_num_key_heads": facts.size("ssm.group_count"), "linear_num_value_heads": values,
        "linear_key_head_dim": facts.size("ssm.state_size"),
        "linear_value_head_dim": facts.size("ssm.inner_size") // values,
        "linear_conv_kernel_dim": facts.size("ssm.conv_kernel"),
    }  # fmt: skip
    if not facts.get("expert_count", int, 0):
        return found
    return found | {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "num_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "shared_expert_intermediate_size": facts.size("expert_shared_feed_forward_length"),
    }  # fmt: skip


def _falcon_h1(facts: Facts) -> Fields:
    """The converter multiplies weights by the factors. llama.cpp normalises after the gate."""
    heads, inner = facts.size("ssm.time_step_rank"), facts.size("ssm.inner_size")
    one = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
    return {
        "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1",
        "mamba_d_ssm": inner, "mamba_n_heads": heads, "mamba_d_head": inner // heads,
        "mamba_n_groups": facts.size("ssm.group_count"),
        "mamba_d_state": facts.size("ssm.state_size"),
        "mamba_d_conv": facts.size("ssm.conv_kernel"),
        "mamba_rms_norm": facts.has("blk.0.ssm_norm.weight"), "mamba_norm_before_gate": False,
        "mamba_conv_bias": facts.has("blk.0.ssm_conv1d.bias"),
        "mamba_proj_bias": facts.has("blk.0.ssm_in.bias"),
        "projectors_bias": facts.has("blk.0.ssm_out.bias"),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
        "mlp_bias": facts.has("blk.0.ffn_gate.bias"),
        **{f"{name}_multiplier": 1.0 for name in one},
        "mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5,
    }  # fmt: skip


def _nemotron_h(facts: Facts) -> Fields:
    """Files do not have limits of time steps: there are none. Values of each layer are 0 where it
    has none."""
    num, heads = facts.size("block_count"), facts.size("ssm.time_step_rank")
    kinds = (("ssm_a", LINEAR), ("attn_q.weight", FULL), ("ffn_up.weight", "mlp"))
    types = [
        next((kind for name, kind in kinds if facts.has(f"blk.{i}.{name}")), "unknown")
        for i in range(num)
    ]

    def has(kind: str, name: str) -> bool:
        return kind in types and facts.has(f"blk.{types.index(kind)}.{name}")

    return {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
        "layers_block_type": types, "mamba_num_heads": heads,
        "mamba_head_dim": facts.size("ssm.inner_size") // heads,
        "n_groups": facts.size("ssm.group_count"), "ssm_state_size": facts.size("ssm.state_size"),
        "conv_kernel": facts.size("ssm.conv_kernel"),
        "use_conv_bias": has(LINEAR, "ssm_conv1d.bias"), "use_bias": has(LINEAR, "ssm_in.bias"),
        "mlp_bias": has("mlp", "ffn_up.bias"),
        "num_key_value_heads": max(1, *facts.layers("attention.head_count_kv", int)),
        "intermediate_size": max(1, *facts.layers("feed_forward_length", int)),
        "layer_norm_epsilon": facts.number("attention.layer_norm_rms_epsilon", 1e-5),
    }  # fmt: skip


OWN: dict[str, Callable[[Facts], Fields]] = {
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    "gemma4": _gemma4,
    "qwen3next": _hybrid,
    "qwen35": _hybrid,
    "qwen35moe": _hybrid,
    "falcon-h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
}
