"""The fields of config.json that a GGUF file's metadata stands for.

Keys have the architecture's name in front; here they are written without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from nanovllm.models.gguf.checkpoint import small_tensor
from nanovllm.models.gguf.header import GgufError, Header
from nanovllm.models.gguf.names import ARCHITECTURES, without_number

Fields = dict[str, Any]
LARGEST_ROPE = 1 << 12  # rotary factors
DTYPES = {"F32": "float32", "F16": "float16"}
# Tokens that end an answer, if they are control tokens: files may name only one of several.
ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
)
CONTROL = 3  # the type of control tokens
SWA_PERIOD, SWA_THETA = 6, 10000.0  # of Gemma 3: llama.cpp does not store them
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
    facts = _Facts(header)
    found = {**facts.common(), **OWN[name](facts)}
    if types := facts.types():
        found["quantization_config"] = {"quant_method": "gguf", "types": types}
    return found


class _Facts:
    """The metadata of one file."""

    def __init__(self, header: Header) -> None:
        self.header, self.tensors = header, header.tensors
        self.layout = ARCHITECTURES[header.architecture]

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """A value, which may be an array of equal values, one for each layer."""
        name = f"{self.header.architecture}.{key}"
        value = self.header.metadata.get(name)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise GgufError(
                    f"{self.header.path}: {name} is {value!r:.80}: layers of several sizes are not "
                    "supported"
                )
            value = value[0]
            if isinstance(value, bool) or not isinstance(value, kind):
                raise GgufError(f"{self.header.path}: {name} is {value!r:.80}")
            return value
        return self.header.get(name, kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A number above 0. Raises GgufError if it is missing and has no default."""
        found = self.get(key, int, default)
        if found is None or found < 1:
            name = f"{self.header.architecture}.{key}"
            what = "missing" if found is None else f"{found}: it must be above 0"
            raise GgufError(f"{self.header.path}: {name} is {what}")
        return int(found)

    def number(self, key: str, default: float | None = None) -> float | None:
        found = self.get(key, (int, float), default)
        if found is not None and not math.isfinite(found):
            raise GgufError(
                f"{self.header.path}: {self.header.architecture}.{key} is {found}: it must be "
                "finite"
            )
        return found

    def has(self, name: str) -> bool:
        return name in self.tensors

    def common(self) -> Fields:
        table = self.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise GgufError(f"{self.header.path}: tensor token_embd.weight is missing")
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        head_dim = self.size("attention.key_length", max(1, hidden // heads))
        if self.size("attention.value_length", head_dim) != head_dim:
            raise GgufError(f"{self.header.path}: keys and values of different sizes are not read")
        if not self.get("attention.causal", bool, True):
            raise GgufError(f"{self.header.path}: only causal attention is supported")
        return {
            "vocab_size": table.shape[0],
            "hidden_size": hidden,
            "num_hidden_layers": self.size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self.ffn_size(),
            "max_position_embeddings": self.size("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_parameters": self.rope(head_dim),
            "tie_word_embeddings": not self.has("output.weight"),
            "hidden_act": "silu",
            "dtype": self.dtype(),
            **self.tokens(),
        }

    def ffn_size(self) -> int:
        """A file of experts alone may lack it: then no layer needs it."""
        expert_size = self.get("expert_feed_forward_length", int)
        return self.size("feed_forward_length", expert_size)

    def dtype(self) -> str:
        """That of most matrices, and bfloat16 if these are in codes."""
        kinds = Counter(one.type.name for one in self.tensors.values() if len(one.shape) > 1)
        return DTYPES.get(kinds.most_common(1)[0][0], "bfloat16")

    def types(self) -> dict[str, str]:
        """The types of matrices in codes, by their names in transformers' layout."""
        return {
            without_number(self.layout.name_of(name).replace("{expert}", "0")): one.type.name
            for name, one in self.tensors.items()
            if one.type.dtype is None
        }

    def tokens(self) -> Fields:
        get, prefix = self.header.get, "tokenizer.ggml."
        bos, pad = (get(f"{prefix}{name}_token_id", int) for name in ("bos", "padding"))
        ends = {get(f"{prefix}{name}_token_id", int) for name in ("eos", "eot", "eom")} - {None}
        texts, kinds = (get(prefix + name, tuple, ()) for name in ("tokens", "token_type"))
        if ends:
            pairs = enumerate(zip(texts, kinds))
            ends |= {i for i, (text, kind) in pairs if kind == CONTROL and text in ENDS}
        return {"bos_token_id": bos, "eos_token_id": sorted(ends) or None, "pad_token_id": pad}

    def rope(self, head_dim: int) -> Fields:
        """The rotary parameters. Factors of single frequencies are those of "longrope", which
        multiplies by nothing else."""
        found: Fields = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 1e4)}
        rotated = self.size("rope.dimension_count", head_dim)
        if rotated != head_dim:
            found["partial_rotary_factor"] = rotated / head_dim
        kind = self.get("rope.scaling.type", str, "none")
        factor = self.number("rope.scaling.factor") or self.number("rope.scale_linear")
        context = self.size("context_length")
        original = self.size("rope.scaling.original_context_length", context)
        if self.has("rope_freqs.weight"):
            factors = small_tensor(self.header, "rope_freqs.weight", LARGEST_ROPE)
            return {
                **found, "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                "attention_factor": 1.0, "original_max_position_embeddings": context,
            }  # fmt: skip
        if kind == "longrope" or self.has("rope_factors_long.weight"):
            names = {"short_factor": "short", "long_factor": "long"}
            factors_of = {
                key: small_tensor(self.header, f"rope_factors_{name}.weight", LARGEST_ROPE)
                for key, name in names.items()
                if self.has(f"rope_factors_{name}.weight")
            }
            attention = self.number("rope.scaling.attn_factor")
            more = {} if attention is None else {"attention_factor": attention}
            return {
                **found, **factors_of, **more, "rope_type": "longrope",
                "original_max_position_embeddings": original,
            }  # fmt: skip
        if kind == "none" or factor in (None, 1.0):
            return found
        if kind not in ("linear", "yarn"):
            raise GgufError(f"{self.header.path}: rope.scaling.type {kind!r} is not supported")
        found |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            found["original_max_position_embeddings"] = original
        return found


def _llama(facts: _Facts) -> Fields:
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


def _qwen2(facts: _Facts) -> Fields:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen3(facts: _Facts) -> Fields:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    }  # fmt: skip


def _experts(facts: _Facts) -> Fields:
    """llama.cpp has no layers without experts in these architectures."""
    return {
        "num_experts": facts.size("expert_count"),
        "num_experts_per_tok": facts.size("expert_used_count"),
        "moe_intermediate_size": facts.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(facts: _Facts) -> Fields:
    return {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **_experts(facts),
        "shared_expert_intermediate_size": facts.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }  # fmt: skip


def _qwen3_moe(facts: _Facts) -> Fields:
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_experts(facts),
        "attention_bias": False, "norm_topk_prob": True,
    }  # fmt: skip


def _glm4_moe(facts: _Facts) -> Fields:
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


def _gemma3(facts: _Facts) -> Fields:
    layers, heads = facts.size("block_count"), facts.size("attention.head_count")
    head_dim = facts.size("attention.key_length", 256)
    scalar = facts.size("embedding_length") // heads if layers == LAYERS_OF_27B else head_dim
    key = "gemma3.attention.sliding_window_pattern"
    pattern = facts.header.get(key, (int, tuple), SWA_PERIOD)
    if not isinstance(pattern, tuple):
        pattern = tuple((i + 1) % max(1, pattern) > 0 for i in range(layers))
    if len(pattern) != layers:
        raise GgufError(f"{facts.header.path}: {key} has {len(pattern)} values")
    types = ["sliding_attention" if one else "full_attention" for one in pattern]
    theta = facts.number("rope.freq_base_swa", SWA_THETA)
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": head_dim,
        "sliding_window": facts.size("attention.sliding_window", 1024), "layer_types": types,
        "query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": facts.number("final_logit_softcapping"),
        "attn_logit_softcapping": facts.number("attn_logit_softcapping"),
        "rope_parameters": {
            "full_attention": facts.rope(head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }  # fmt: skip


def _phi3(facts: _Facts) -> Fields:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
        "sliding_window": facts.get("attention.sliding_window", int) or None,
        "original_max_position_embeddings": facts.size(
            "rope.scaling.original_context_length", facts.size("context_length")
        ),
    }  # fmt: skip


def _granite(facts: _Facts) -> Fields:
    return {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite",
        "attention_multiplier": facts.number("attention.scale", 1.0),
        "embedding_multiplier": facts.number("embedding_scale", 1.0),
        "residual_multiplier": facts.number("residual_scale", 1.0),
        "logits_scaling": facts.number("logit_scale", 1.0),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
    }  # fmt: skip


def _olmo2(facts: _Facts) -> Fields:
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def _smollm3(facts: _Facts) -> Fields:
    return {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": None,
    }  # fmt: skip


OWN: dict[str, Callable[[_Facts], Fields]] = {
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
}
