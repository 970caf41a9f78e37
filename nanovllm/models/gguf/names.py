"""The names of a GGUF file's tensors, and what llama.cpp changes in them.

`ARCHITECTURES` has the architectures by their names in files. Names are those that llama.cpp's
converter writes; here they become those of checkpoints in transformers' layout. Does not import
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# Tensors of rotary factors: they are read with the config.
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight",
                          "rope_factors_short.weight"})  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# The names with a bias in them are of tensors that are one.
GLM_EXPERTS = {
    **QWEN_EXPERTS,
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "post_attention_norm": "post_attention_layernorm",
}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
NORMS_BEHIND = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT_OSS = {
    **LLAMA,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps.weight": "mlp.experts.{expert}.gate_up_proj.0",
    "ffn_up_exps.weight": "mlp.experts.{expert}.gate_up_proj.1",
    "ffn_down_exps.weight": "mlp.experts.{expert}.down_proj.0",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
LATENTS = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
PLAIN_NORM = "linear_attn.norm.weight"  # has no 1
HYBRID = {"post_attention_norm": "post_attention_layernorm", "ssm_norm": "linear_attn.norm"}
_MIXER = ("ssm_in", "in_proj"), ("ssm_conv1d", "conv1d"), ("ssm_out", "out_proj")
FALCON_H1 = {
    **LLAMA,
    **{stored: f"mamba.{name}" for stored, name in _MIXER},
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
NEMOTRON_H = {
    **{stored: f"mixer.{name}" for stored, name in _MIXER},
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
}
FALCON_H1_OUTER = {**OUTER, "output_norm": "model.final_layernorm"}
NEMOTRON_H_OUTER = {
    "token_embd": "model.embeddings",
    "output": "lm_head",
    "output_norm": "model.norm_f",
}
# A Falcon-H1's ffn_norm is a weight without that word.
BLOCK = re.compile(r"blk\.(\d{1,5})\.([a-z_0-9]+)(?:\.(weight|bias|scale))?")
NEXTN = re.compile(r"blk\.(\d{1,5})\.(nextn\..*)")  # of layers that propose tokens
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Layout:
    """How llama.cpp stores an architecture.

    `layer` are the names of a layer's modules, or of its tensors: "ffn_norm", "attn_sinks.weight".
    `outer` are those outside the layers. If it `permutes`, the rows of each head of q and k
    are in the order in which llama.cpp rotates neighbours: row 2i + j is row i + j · H/2 of
    transformers. If `norms_plus_one`, norms are stored with the 1 that the family adds to them.
    """

    layer: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    permutes: bool = False
    norms_plus_one: bool = False

    def name_of(self, stored: str) -> str:
        """The name in transformers' layout, with {expert} for a tensor of all experts. A name that
        this architecture does not have stays as it is."""
        module, _, end = stored.rpartition(".")
        if module in self.outer and end in ("weight", "bias"):
            return f"{self.outer[module]}.{end}"
        if nextn := NEXTN.fullmatch(stored):
            return f"model.layers.{int(nextn[1])}.{nextn[2]}"
        found = BLOCK.fullmatch(stored)
        if found is None:
            return stored
        end = found[3] or "weight"
        if (tensor := self.layer.get(f"{found[2]}.{end}")) is not None:
            return f"model.layers.{int(found[1])}.{tensor}"
        if found[2] not in self.layer:
            return stored
        name = f"model.layers.{int(found[1])}.{self.layer[found[2]]}"
        return name if name.endswith(f"_{end}") else f"{name}.{end}"


PHI3 = {**LLAMA, "ffn_up": "mlp.gate_up_proj"}
GEMMA3 = {**LLAMA, **NORMS_BEHIND, "ffn_norm": "pre_feedforward_layernorm"}
GEMMA4 = {
    **GEMMA3,
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
GEMMA4_OUTER = {
    **OUTER,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
HYBRID_EXPERTS = {**LLAMA, **QWEN_EXPERTS, **HYBRID}
ARCHITECTURES: dict[str, Layout] = {
    "llama": Layout({**LLAMA, **MIXTRAL_EXPERTS}, permutes=True),
    "qwen2": Layout(),
    "qwen2moe": Layout({**LLAMA, **QWEN_EXPERTS}),
    "qwen3": Layout(),
    "qwen3moe": Layout({**LLAMA, **QWEN_EXPERTS}),
    "glm4moe": Layout({**LLAMA, **GLM_EXPERTS}),
    "gemma3": Layout(GEMMA3, norms_plus_one=True),
    "gemma4": Layout(GEMMA4, GEMMA4_OUTER),
    "gpt-oss": Layout(GPT_OSS),
    "deepseek2": Layout({**LLAMA, **GLM_EXPERTS, **LATENTS}),
    "qwen3next": Layout(HYBRID_EXPERTS, norms_plus_one=True),
    "qwen35": Layout({**LLAMA, **HYBRID}, norms_plus_one=True),
    "qwen35moe": Layout(HYBRID_EXPERTS, norms_plus_one=True),
    "falcon-h1": Layout(FALCON_H1, FALCON_H1_OUTER),
    "nemotron_h": Layout(NEMOTRON_H, NEMOTRON_H_OUTER),
    "phi3": Layout(PHI3),
    "granite": Layout(permutes=True),
    "olmo2": Layout({**LLAMA, **NORMS_BEHIND}),
    "smollm3": Layout(permutes=True),
}


def without_number(name: str) -> str:
    """The name that the matrices of all experts share."""
    return EXPERT_NUMBER.sub(".experts.", name)


def of_experts(name: str, num_experts: int) -> Iterator[str]:
    """The names of the matrices of all experts, in their order."""
    return (name.replace("{expert}", str(expert)) for expert in range(num_experts))


def heads_key(name: str) -> str | None:
    """The key of the number of heads in the rows of a tensor whose rows llama.cpp permutes."""
    if ".self_attn.q_proj." in name:
        return "attention.head_count"
    return "attention.head_count_kv" if ".self_attn.k_proj." in name else None
