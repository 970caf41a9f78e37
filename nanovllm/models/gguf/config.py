"""The fields of config.json that a GGUF file's metadata stands for.

Keys have the architecture's name in front; here they are written without it.
"""

from __future__ import annotations

from collections.abc import Callable

from nanovllm.models.gguf import newer
from nanovllm.models.gguf.facts import Facts, Fields
from nanovllm.models.gguf.header import GgufError, Header
from nanovllm.models.gguf.names import ARCHITECTURES

SWA_PERIOD, SWA_THETA = 6, 10000.0  # of Gemma 3: llama.cpp does not store them
OLMO3_PERIOD = 4  # likewise
LAYERS_OF_27B = 62
SIGMOID = 2  # how experts are scored


def fields(header: Header) -> Fields:
    """The fields of config.json. Raises GgufError for an architecture, or for values, that are not
    supported."""
    name = header.architecture
    if name not in ARCHITECTURES:
        raise GgufError(
            f"{header.path}: architecture {name!r} is not supported: use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    facts = Facts(header)
    own = OWN[name](facts)
    found = {**facts.common(own), **own}
    if types := facts.types():
        found["quantization_config"] = {"quant_method": "gguf", "types": types}
    return found


def _llama(facts: Facts) -> Fields:
    bias = facts.has("blk.0.attn_q.bias")
    window = facts.get("attention.sliding_window", int)
    if facts.get("expert_count", int, 0):
        kind = {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
            "num_local_experts": facts.size("expert_count"),
            "num_experts_per_tok": facts.size("expert_used_count"), "sliding_window": window,
        }  # fmt: skip
    elif window:
        kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                "sliding_window": window}  # fmt: skip
    else:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "attention_bias": bias, "mlp_bias": facts.has("blk.0.ffn_gate.bias")}  # fmt: skip
    return kind


def _qwen2(facts: Facts) -> Fields:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen3(facts: Facts) -> Fields:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    }  # fmt: skip


def _experts(facts: Facts) -> Fields:
    """llama.cpp has no layers without experts in these architectures."""
    return {
        "num_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(facts: Facts) -> Fields:
    return {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **_experts(facts),
        "shared_expert_intermediate_size": facts.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }  # fmt: skip


def _qwen3_moe(facts: Facts) -> Fields:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_experts(facts),
        "attention_bias": False, "norm_topk_prob": True,
    }  # fmt: skip


def _glm4_moe(facts: Facts) -> Fields:
    """llama.cpp counts the layers that propose tokens as blocks, and has no groups of experts."""
    proposing = facts.get("nextn_predict_layers", int, 0)
    gating = facts.get("expert_gating_func", int, SIGMOID)
    if gating != SIGMOID:
        raise GgufError(
            f"{facts.header.path}: glm4moe.expert_gating_func is {gating}: only {SIGMOID} is "
            "supported"
        )
    return {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe",
        "num_hidden_layers": facts.size("block_count") - proposing,
        "num_nextn_predict_layers": proposing,
        "n_routed_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "n_shared_experts": facts.size("expert_shared_count"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "norm_topk_prob": facts.get("expert_weights_norm", bool, False),
        "n_group": 1, "topk_group": 1, "use_qk_norm": facts.has("blk.0.attn_q_norm.weight"),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
    }  # fmt: skip


def _gemma3(facts: Facts) -> Fields:
    layers, heads = facts.size("block_count"), facts.size("attention.head_count")
    head_dim = facts.size("attention.key_length", 256)
    scalar = facts.size("embedding_length") // heads if layers == LAYERS_OF_27B else head_dim
    theta = facts.number("rope.freq_base_swa", SWA_THETA)
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": head_dim,
        "sliding_window": facts.size("attention.sliding_window", 1024),
        "layer_types": _layer_types(facts, SWA_PERIOD),
        "query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": facts.number("final_logit_softcapping"),
        "attn_logit_softcapping": facts.number("attn_logit_softcapping"),
        "rope_parameters": {
            "full_attention": facts.rope(head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }  # fmt: skip


def _layer_types(facts: Facts, period: int) -> list[str]:
    """Layers with windows and without: by a value for each, or every so many-th has none."""
    layers = facts.size("block_count")
    name = f"{facts.header.architecture}.attention.sliding_window_pattern"
    pattern = facts.header.get(name, (int, tuple), period)
    if not isinstance(pattern, tuple):
        pattern = tuple((i + 1) % max(1, pattern) > 0 for i in range(layers))
    if len(pattern) != layers:
        raise GgufError(f"{facts.header.path}: {name} has {len(pattern)} values")
    return ["sliding_attention" if one else "full_attention" for one in pattern]


def _phi3(facts: Facts) -> Fields:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
        "sliding_window": facts.get("attention.sliding_window", int) or None,
        "original_max_position_embeddings": facts.size(
            "rope.scaling.original_context_length", facts.size("context_length")
        ),
    }  # fmt: skip


def _granite(facts: Facts) -> Fields:
    return {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite",
        "attention_multiplier": facts.number("attention.scale", 1.0),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale", 1.0),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
    }  # fmt: skip


def _olmo2(facts: Facts) -> Fields:
    """OLMo-3 has the name of OLMo-2, and windows. What extends the rotary table of its layers
    without windows does not extend that of the others."""
    window = facts.get("attention.sliding_window", int)
    if not window:
        return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    theta = facts.number("rope.freq_base", 1e4)
    return {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": window,
        "layer_types": _layer_types(facts, OLMO3_PERIOD),
        "rope_parameters": {
            "full_attention": facts.rope(facts.head_dim()),
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }  # fmt: skip


def _smollm3(facts: Facts) -> Fields:
    return {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": None,
    }  # fmt: skip


OWN: dict[str, Callable[[Facts], Fields]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "glm4moe": _glm4_moe,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    **newer.OWN,
}
