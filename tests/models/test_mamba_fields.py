"""Every field of the config classes of decoders with Mamba-2 mixers is honoured, refused or unread.

The mechanism is that of `test_family_fields.py`.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import FalconH1Config, NemotronHConfig, PretrainedConfig

from nanovllm.models import nemotron_h
from tests.conftest import save_tiny
from tests.models.mamba_cases import EXPERTS, FALCON, NEMOTRON
from tests.models.test_config_fields import HONOURED, UNREAD, YARN
from tests.models.test_family_fields import NOT_READ, Case, check, rope

# the third is Nemotron-H with experts
F, N, E = ("falcon_h1",), ("nemotron_h",), ("nemotron_h-experts",)
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "falcon_h1": FalconH1Config,
    "nemotron_h": NemotronHConfig,
    "nemotron_h-experts": NemotronHConfig,
}
MIXER, ATTENTION, MLP, MOE = "linear_attention", "full_attention", "mlp", "moe"
PLAIN: dict[str, dict[str, Any]] = {
    "falcon_h1": {**FALCON, "vocab_size": 96, "num_hidden_layers": 1, "mamba_rms_norm": True},
    "nemotron_h": {
        **NEMOTRON, "vocab_size": 96, "layers_block_type": [MIXER, ATTENTION, MLP],
    },
    "nemotron_h-experts": {
        **EXPERTS, "vocab_size": 96, "layers_block_type": [MIXER, ATTENTION, MOE],
        "topk_group": 2,
    },
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "vocab_size": 77, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "mamba_d_ssm": None,
        "mamba_expand": 3, "mamba_n_heads": 9, "mamba_d_head": "auto", "mamba_n_groups": 3,
        "mamba_d_state": 8, "mamba_d_conv": 3, "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "vocab_size": 77, "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "mamba_num_heads": 9, "mamba_head_dim": 8,
        "n_groups": 3, "ssm_state_size": 8, "conv_kernel": 3,
        "layers_block_type": [MLP, MLP, ATTENTION, MIXER],
    },
    "nemotron_h-experts": {
        "n_routed_experts": 9, "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2,
        "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28,
        "moe_latent_size": 16, "layers_block_type": [MOE, ATTENTION, MOE],
    },
}  # fmt: skip
UNREAD_FIELDS: dict[str, dict[str, Any]] = {
    "falcon_h1": {"num_logits_to_keep": 3, "mamba_expand": 5},
    "nemotron_h": {
        "num_logits_to_keep": 3, "tie_word_embeddings": True, "use_mamba_kernels": False,
        "expand": 5, "time_step_max": 0.7, "time_step_floor": 0.5,
        "mamba_proj_bias": True, "mamba_ssm_cache_dtype": "bfloat16", "n_routed_experts": 3,
        "output_router_logits": True, "n_shared_experts": 2, "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16,
        "moe_shared_expert_overlap": False, "num_experts_per_tok": 3, "routed_scaling_factor": 2.0,
        "n_group": 2, "topk_group": 2, "norm_topk_prob": False, "num_nextn_predict_layers": 1,
        "mtp_layers_block_type": ["full_attention"], "residual_in_fp32": True,
        "hidden_dropout": 0.5, "rescale_prenorm_residual": False, "sliding_window": 9,
        "attention_bias": True,
    },
}  # fmt: skip
CASES = (
    Case({"rms_norm_eps": 0.5}, HONOURED, F),
    Case({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported", F),
    Case({"attention_bias": True, "mlp_bias": True}, HONOURED, F, draws=True),
    Case({"mamba_proj_bias": True, "projectors_bias": True}, HONOURED, F, draws=True),
    Case({"mamba_conv_bias": False}, HONOURED, F, draws=True),
    Case({"mamba_rms_norm": False}, HONOURED, F, draws=True),
    Case({"mamba_norm_before_gate": False}, HONOURED, F),
    # sizes of chunks change the last digits of transformers' logits
    Case({"mamba_chunk_size": 64}, HONOURED, F),
    Case({"time_step_limit": [0.5, 0.9]}, HONOURED, F),
    Case({"time_step_limit": [0.9, 0.5]}, "the limits of Mamba-2's time steps are 0.9", F),
    *(
        Case({f"{name}_multiplier": 0.37}, HONOURED, F)
        for name in (
            "lm_head",
            "embedding",
            "key",
            "attention_out",
            "attention_in",
            "ssm_in",
            "ssm_out",
        )
    ),
    Case({"mlp_multipliers": [0.4, 0.6]}, HONOURED, F),
    Case({"ssm_multipliers": [0.4, 0.6, 0.7, 0.8, 1.9]}, HONOURED, F),
    Case({"ssm_multipliers": [0.4, 0.6]}, r"ssm_multipliers are \(0.4, 0.6\): they must be", F),
    Case({"key_multiplier": 0.0}, "key_multiplier is 0.0: it must be a number above 0", F),
    Case({"mlp_multipliers": [0.0, 0.6]}, "the first of mlp_multipliers is 0.0", F),
    Case({"mamba_n_groups": 4}, "6 heads: they must be a multiple of its 4 groups", F),
    Case({"mamba_d_state": 0}, "state_size of Mamba-2 is 0: it must be at least 1", F),
    Case({"mamba_n_heads": 1 << 17}, "mamba_n_heads is 131072: it must be at most 65536", F),
    Case(rope("default"), HONOURED, F),
    Case(rope("yarn", **YARN), HONOURED, F),
    Case({"layer_norm_epsilon": 0.5}, HONOURED, N),
    Case({"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported by Nemotron", N),
    Case({"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu' is not supported by Nemo", N),
    Case({"use_bias": True, "mlp_bias": True}, HONOURED, N, draws=True),
    Case({"use_conv_bias": False}, HONOURED, N, draws=True),
    # transformers reads the first alone
    Case({"time_step_min": 0.9, "time_step_limit": [0.9, math.inf]}, HONOURED, N),
    Case({"time_step_limit": [0.9, 0.5]}, "the limits of Mamba-2's time steps are 0.9", N),
    Case({"chunk_size": 64}, HONOURED, N),
    Case({"layers_block_type": [MLP, ATTENTION, MIXER]}, HONOURED, N, draws=True),
    Case({"topk_group": 1}, HONOURED, E),
    Case({"norm_topk_prob": False}, HONOURED, E),
    Case({"routed_scaling_factor": 0.7}, HONOURED, E),
    Case({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0: it must be a number", E),
    Case({"n_group": 3}, "n_group is 3: it must divide 8 experts", E),
    Case({"topk_group": 3}, "topk_group is 3: it must be from 1 to n_group 2", E),
    Case({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts", E),
    Case({"moe_latent_size": 0}, "moe_latent_size is 0: it must be null or at least 1", E),
    Case({"moe_shared_expert_intermediate_size": 0}, HONOURED, E, draws=True),
    Case({"model_type": "gpt2"}, "model_type 'gpt2' does not go with", F),
    Case({"architectures": ["GPT2Model"]}, r"architecture \['GPT2Model'\] is not", F + N),
    Case({"quantization_config": {"quant_method": "awq"}}, "quantization_config", F + N),
    Case({"is_causal": False}, "is_causal False is not supported", F + N),
)
PAIRS = [pytest.param(name, case, id=f"{name}-{case}") for case in CASES for name in case.families]


def sizes(family: str) -> Case:
    return Case(SIZES[family], HONOURED, draws=True)


def unread(family: str) -> Case:
    """With experts these are the fields that no logits depend on without, but those of experts."""
    known = {field.name for field in fields(FAMILIES[family])}
    read = {name for case in CASES if family in case.families for name in case.values}
    if family in E:
        read |= set(SIZES[family])
    known_unread = {**NOT_READ, **UNREAD_FIELDS[FAMILIES[family].model_type]}
    return Case({name: x for name, x in known_unread.items() if name in known - read}, UNREAD)


def test_a_value_for_initialisation_does_not_limit_time_steps() -> None:
    found = nemotron_h.mixer(NemotronHConfig(time_step_min=0.001))
    assert (found.dt_min, found.dt_max) == (0.0, math.inf)
    found = nemotron_h.mixer(NemotronHConfig(time_step_limit=[0.1, 0.2]))
    assert (found.dt_min, found.dt_max) == (0.1, 0.2)


@pytest.mark.parametrize("family", F + N)
def test_every_field_has_a_case(family: str) -> None:
    cases = [case for case in CASES if family in case.families]
    decided = {name for case in (*cases, sizes(family), unread(family)) for name in case.values}
    assert {field.name for field in fields(FAMILIES[family])} - decided == set()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {
        family: save_tiny(folder / family, config.model_type, **PLAIN[family])
        for family, config in FAMILIES.items()
    }


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_a_field_is_honoured_or_refused(
    family: str, case: Case, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, case, plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sizes_are_honoured_together(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, sizes(family), plain, PLAIN[family], tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_no_logits_depend_on_change_nothing(
    family: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    check(family, unread(family), plain, PLAIN[family], tmp_path)
