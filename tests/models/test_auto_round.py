"""AutoRound configs give the schemes of GPTQ and AWQ configs with the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PretrainedConfig

from nanovllm.models.param import Param
from nanovllm.models.quant_methods import of_checkpoint
from nanovllm.models.schemes import Packed
from tests.models.test_quantized_checkpoints import AWQ, auto_round, gptq


def scheme_of(config: dict[str, Any]) -> Packed:
    found = of_checkpoint(PretrainedConfig(quantization_config=config))
    assert isinstance(found, Packed)
    return found


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (auto_round(), gptq(sym=True)),
        (auto_round(sym=False, quant_method="intel/auto-round"), gptq()),
        (auto_round(None), gptq(sym=True)),
        (auto_round(None, backend="auto_round:exllamav2"),
         gptq(sym=True, checkpoint_format="gptq_v2")),
        (auto_round("auto_round:gptqmodel", bits=8, group_size=-1),
         gptq(sym=True, bits=8, group_size=-1)),
        (auto_round("auto_round:auto_awq", sym=False), AWQ),
    ],
)  # fmt: skip
def test_packings_of_autoround_are_those_of_others(
    config: dict[str, Any], same: dict[str, Any]
) -> None:
    assert scheme_of(config).stored == scheme_of(same).stored


def test_modules_that_autoround_leaves_plain() -> None:
    """By names, which may be those of a checkpoint with towers, and by expressions. An entry may
    repeat what holds for all, as one for a head that is packed does."""
    plain = {"bits": 16, "data_type": "float"}
    extra = {
        "model.language_model.layers.0.mlp.up_proj": plain, r".*layers\.1\..*k_proj": plain,
        "v_proj$": plain, "model.layers.0.mlp.down_proj": {"bits": 4, "sym": True},
    }  # fmt: skip
    for head in ({}, {"lm_head": {"bits": 4}}, {"lm_head": plain}):
        scheme = scheme_of(auto_round(extra_config={**extra, **head}))
        expected = {
            "model.layers.0.mlp.up_proj": False, "model.layers.1.mlp.up_proj": True,
            "model.layers.1.self_attn.k_proj": False, "model.layers.0.self_attn.k_proj": True,
            "model.layers.0.self_attn.v_proj": False, "model.layers.0.mlp.down_proj": True,
            "lm_head": head.get("lm_head") == {"bits": 4},
        }  # fmt: skip
        for module, is_packed in expected.items():
            param = Param.one("linear", f"{module}.weight", 64, 64)
            param = param._replace(is_vocab=module == "lm_head")
            (part,) = scheme.parts(param)
            assert part.format.is_packed == is_packed, module
