"""A layer of Nemotron-H that is experts without gates (Nemotron 3 Nano and Super).

y = shared expert(x) + Σ of the chosen experts(x), with x the normalised h. Experts may work on a
latent: then x is projected to L numbers before them and their sum to D after them. The router and
the shared expert read x itself.

T tokens | K experts per token | E experts | D hidden | L latent | F expert width | S width of the
shared expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, experts, group_router
from nanovllm.models.config import ModelConfig, MoeConfig
from nanovllm.models.experts import Experts
from nanovllm.models.experts.ungated import relu2
from nanovllm.models.formats import Weight, linear
from nanovllm.models.group_router import GroupRouter
from nanovllm.models.mamba2 import Mamba2Config
from nanovllm.models.model import Batch, Param
from nanovllm.models.scaled import check_factor

ACTIVATION = "relu2"


@dataclass(frozen=True)
class NemotronConfig(Mamba2Config):
    """`latent_size` is that of the experts' inputs, 0 if they are the layer's."""

    latent_size: int = 0


class SparseLayer(NamedTuple):
    """Weights of a layer with experts."""

    norm_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor
    experts: Experts
    latent_in_LD: Weight | None
    latent_in_bias_L: Tensor | None
    latent_out_DL: Weight | None
    latent_out_bias_D: Tensor | None
    up_SD: Weight
    up_bias_S: Tensor | None
    down_DS: Weight
    down_bias_D: Tensor | None


def moe_config(hf: Any) -> MoeConfig:
    """The experts of a config. Raises ValueError for sizes that do not fit together."""
    check_factor("routed_scaling_factor", hf.routed_scaling_factor)
    return MoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok,
        expert_size=hf.moe_intermediate_size,
        normalize=bool(hf.norm_topk_prob),
        # transformers takes the width of an MLP in place of 0
        shared_size=hf.moe_shared_expert_intermediate_size or hf.intermediate_size,
        router=GroupRouter(
            num_groups=hf.n_group, top_groups=hf.topk_group, scale=float(hf.routed_scaling_factor)
        ),
        activation=ACTIVATION,
    )


def latent_size(hf: Any) -> int:
    """The size of the experts' inputs, 0 if they are the layer's. Raises ValueError below 1."""
    if hf.moe_latent_size is None:
        return 0
    if hf.moe_latent_size < 1:
        raise ValueError(f"moe_latent_size is {hf.moe_latent_size}: it must be null or at least 1")
    return int(hf.moe_latent_size)


# regions -----------------------------------------------------------------------------------------


def layer(cfg: ModelConfig, w: SparseLayer, batch: Batch, h_TD: Tensor) -> Tensor:
    """h + experts of the normalised h, for the tokens that are kept."""
    assert cfg.moe is not None and cfg.moe.router is not None
    moe, (h_TD,) = cfg.moe, dense.kept(batch, h_TD)
    x_TD = ops.rms_norm(h_TD, w.norm_D, cfg.norm_eps)
    weight_TK, expert_TK = group_router.choose(
        cfg.moe.router, moe.top_k, moe.normalize, x_TD, (w.router_ED, w.router_bias_E)
    )
    # on several ranks, parts of all products are summed before h is added
    sum_TD = h_TD if cfg.num_ranks == 1 else None
    inner_TS = relu2(linear(x_TD, w.up_SD, w.up_bias_S))
    sum_TD = linear(inner_TS, w.down_DS, w.down_bias_D, sum_TD)
    if w.latent_in_LD is None or w.latent_out_DL is None:
        sum_TD = experts.apply(x_TD, weight_TK, expert_TK, w.experts, sum_TD)
    else:
        x_TL = linear(x_TD, w.latent_in_LD, w.latent_in_bias_L)
        y_TL = experts.apply(x_TL, weight_TK, expert_TK, w.experts, None)
        sum_TD = linear(y_TL, w.latent_out_DL, w.latent_out_bias_D, sum_TD)
    return sum_TD if cfg.num_ranks == 1 else ops.all_reduce(sum_TD, h_TD)


# parameters --------------------------------------------------------------------------------------


def layer_params(cfg: ModelConfig, prefix: str) -> dict[str, Param]:
    """Parameters of a layer without its norm, by the fields of `SparseLayer` and of
    `experts.ungated.Ungated`. Raises ValueError for experts that are compressed."""
    assert isinstance(cfg, NemotronConfig) and cfg.moe is not None
    if cfg.moe.compression is not None:
        raise ValueError(
            f"compressed experts beside the checkpoint are not supported for {cfg.architecture}, "
            "whose experts have no gate: set NANOVLLM_DISABLE_SVD=1"
        )
    gate, hidden, size = prefix + "gate.", cfg.hidden_size, cfg.moe.shared_size
    shared = prefix + "shared_experts."
    up, down = shared + "up_proj.", shared + "down_proj."
    declared = {
        **group_router.router_params(
            gate + "weight", gate + "e_score_correction_bias", cfg.moe.num_experts, hidden
        ),
        **expert_params(cfg, cfg.moe, prefix + "experts."),
        "up_SD": Param.one("linear", up + "weight", size, hidden, shard_axis=0),
        "down_DS": Param.one("linear", down + "weight", hidden, size, shard_axis=1),
    }
    if cfg.mlp_bias:
        declared["up_bias_S"] = Param.one("bias", up + "bias", size, shard_axis=0)
        declared["down_bias_D"] = dense.summed_bias(down + "bias", hidden)
    return declared | (latent_params(cfg, prefix) if cfg.latent_size else {})


def latent_params(cfg: NemotronConfig, prefix: str) -> dict[str, Param]:
    """The projections to and from the experts' latent, which every rank has."""
    into, out = prefix + "fc1_latent_proj.", prefix + "fc2_latent_proj."
    latent, hidden = cfg.latent_size, cfg.hidden_size
    declared = {
        "latent_in_LD": Param.one("linear", into + "weight", latent, hidden),
        "latent_out_DL": Param.one("linear", out + "weight", hidden, latent),
    }
    if cfg.mlp_bias:
        declared["latent_in_bias_L"] = Param.one("bias", into + "bias", latent)
        declared["latent_out_bias_D"] = dense.summed_bias(out + "bias", hidden)
    return declared


def expert_params(cfg: NemotronConfig, moe: MoeConfig, prefix: str) -> dict[str, Param]:
    """A layer's experts, by the fields of `experts.ungated.Ungated`. A checkpoint has a tensor for
    each matrix, or one for the matrices of all experts."""
    num, size, inputs = moe.num_experts, moe.expert_size, cfg.latent_size or cfg.hidden_size

    def matrices(name: str, rows: int, columns: int, axis: int) -> Param:
        sources = tuple(f"{prefix}{expert}.{name}.weight" for expert in range(num))
        shape = (num, rows, columns)
        found = Param("experts", shape, sources, (rows,) * num, axis, prefix + name)
        if moe.is_expert_parallel:
            return found._replace(shard_axis=None, is_expert_parallel=True)
        return found

    declared = {
        "up_EFD": matrices("up_proj", size, inputs, 0),
        "down_EDF": matrices("down_proj", inputs, size, 1),
    }
    if moe.is_expert_parallel:
        declared["local_X"] = Param("places", (num,), (), (), None)
    return declared
