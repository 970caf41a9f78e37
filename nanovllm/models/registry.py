"""The supported architectures, by the name in a checkpoint's config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nanovllm.models import (
    bert,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    falcon_h1,
    gemma3,
    gemma3_images,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    llama,
    minicpm,
    ministral,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    modernbert,
    nemotron_h,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl,
    qwen3_vl_moe,
    roberta,
    seed_oss,
    smollm3,
    starcoder2,
)
from nanovllm.models.model import Model
from nanovllm.models.quant_methods import of_checkpoint
from nanovllm.models.schemes import UNQUANTIZED

# (transformers' config, dtype=…, max_model_len=…) -> Model
Architecture = Callable[..., Model]

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": llama.model,
    "MistralForCausalLM": mistral.model,
    "MinistralForCausalLM": ministral.model,
    "Ministral3ForCausalLM": ministral3.model,
    "Mistral3ForConditionalGeneration": mistral3.model,
    "MixtralForCausalLM": mixtral.model,
    "Qwen2ForCausalLM": qwen2.model,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl.model,
    "Qwen2_5OmniModel": qwen2_5_omni.model,  # the name in the files of the release
    "Qwen2_5OmniForConditionalGeneration": qwen2_5_omni.model,
    "Qwen2_5OmniThinkerForConditionalGeneration": qwen2_5_omni.model,
    "Qwen2MoeForCausalLM": qwen2_moe.model,
    "Qwen3ForCausalLM": qwen3.model,
    "Qwen3MoeForCausalLM": qwen3_moe.model,
    "Qwen3NextForCausalLM": qwen3_next.model,
    "Qwen3_5ForCausalLM": qwen3_5.model,
    "Qwen3_5ForConditionalGeneration": qwen3_5.model,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe.model,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe.model,
    "Qwen3VLForConditionalGeneration": qwen3_vl.model,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe.model,
    "CohereForCausalLM": cohere.model,
    "Cohere2ForCausalLM": cohere2.model,
    "DeepseekV2ForCausalLM": deepseek_v2.model,
    "DeepseekV3ForCausalLM": deepseek_v3.model,
    "Ernie4_5ForCausalLM": ernie4_5.model,
    "Ernie4_5_MoeForCausalLM": ernie4_5_moe.model,
    "Exaone4ForCausalLM": exaone4.model,
    "FalconH1ForCausalLM": falcon_h1.model,
    "Gemma3ForCausalLM": gemma3.model,
    "Gemma3ForConditionalGeneration": gemma3_images.model,
    "Gemma4ForCausalLM": gemma4.model,
    "Gemma4ForConditionalGeneration": gemma4.model,
    "Glm4ForCausalLM": glm4.model,
    "Glm4MoeForCausalLM": glm4_moe.model,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.model,
    "GptOssForCausalLM": gpt_oss.model,
    "GraniteForCausalLM": granite.model,
    "GraniteMoeForCausalLM": granitemoe.model,
    "GraniteMoeSharedForCausalLM": granitemoeshared.model,
    "HunYuanDenseV1ForCausalLM": hunyuan_v1_dense.model,
    "HunYuanMoEV1ForCausalLM": hunyuan_v1_moe.model,
    "MiniCPMForCausalLM": minicpm.model,
    "NemotronHForCausalLM": nemotron_h.model,
    "Olmo2ForCausalLM": olmo2.model,
    "Olmo3ForCausalLM": olmo3.model,
    "Phi3ForCausalLM": phi3.model,
    "SeedOssForCausalLM": seed_oss.model,
    "SmolLM3ForCausalLM": smollm3.model,
    "Starcoder2ForCausalLM": starcoder2.model,
}

# Architectures that only pool.
ENCODERS: dict[str, Architecture] = {
    "BertModel": bert.model,
    "BertForMaskedLM": bert.model,
    "BertForSequenceClassification": bert.model,
    "RobertaModel": roberta.model,
    "RobertaForMaskedLM": roberta.model,
    "RobertaForSequenceClassification": roberta.model,
    "XLMRobertaModel": roberta.model,
    "XLMRobertaForMaskedLM": roberta.model,
    "XLMRobertaForSequenceClassification": roberta.model,
    "ModernBertModel": modernbert.model,
    "ModernBertForMaskedLM": modernbert.model,
    "ModernBertForSequenceClassification": modernbert.model,
}

# Architectures with rope parameters for each layer type.
ROPES_PER_LAYER_TYPE = frozenset(
    {
        "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel",
        "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Olmo3ForCausalLM", "Olmo3Model",
        *(name for name in ENCODERS if name.startswith("ModernBert")),
    }
)  # fmt: skip
# Model types that transformers has no config class for: the type whose class reads them, and fields
# with another default value.
READ_AS: dict[str, tuple[str, dict[str, object]]] = {
    "kimi_k2": ("deepseek_v3", {}),
    "minicpm": ("llama", {"tie_word_embeddings": True}),
}


# Endings of the names of models that pool. "Model" has no head, and the others have that of scores.
# Models with a vision tower have the second ending of those that generate.
CAUSAL, SEEING, NO_HEAD = "ForCausalLM", "ForConditionalGeneration", "Model"
SCORES, REWARD = "ForSequenceClassification", "ForRewardModel"


def architecture(names: list[str] | None, *, pools: bool = False) -> Architecture:
    """The first known name of a config's `architectures`, for checkpoints in any known format;
    with `pools` the model without its head.

    Raises ValueError if no name is known, or if the model only pools and `pools` is False.
    """
    for name in names or []:
        found = pooled(name) if pools else ARCHITECTURES.get(name)
        if found is not None:
            return partial(_with_formats, found)
    for name in names or []:
        if pooled(name) is not None:
            raise ValueError(
                f"architecture {name} does not generate text: set task='embed', 'classify' or "
                "'score'"
            )
    known = ", ".join(ARCHITECTURES)
    raise ValueError(f"architecture {names} is not supported: use one of {known}")


def pooled(name: str) -> Architecture | None:
    """The architecture of a model that pools; None for an unknown name."""
    if name in ENCODERS:
        return ENCODERS[name]
    for ending in (SCORES, REWARD, CAUSAL, SEEING, NO_HEAD):
        if name.endswith(ending):
            base = name.removesuffix(ending)
            endings = (ending,) if ending in (CAUSAL, SEEING) else (CAUSAL, SEEING)
            found = (ARCHITECTURES.get(base + one) for one in endings)
            return next((one for one in found if one is not None), None)
    return None


def check(names: list[str] | None) -> None:
    """Raise ValueError if no name is known, of a model that generates or pools."""
    if not any(pooled(name) is not None for name in names or []):
        architecture(names)


def _with_formats(make: Architecture, hf: Any, **settings: Any) -> Model:
    """The model of a checkpoint, in the formats of its config."""
    scheme = of_checkpoint(hf)
    model = make(hf, **settings)
    return model if scheme is UNQUANTIZED else model.with_scheme(scheme)
