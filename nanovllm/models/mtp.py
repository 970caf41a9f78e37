"""Layers of a checkpoint that propose tokens (MTP): one layer like the model's own, as a head.

Its input is a product of the token's embedding beside the model's state, each normalised. The state
is the model's after its final norm; for later tokens the layer's own, after its norm. Embeddings
and head are the model's. Source: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 2.2.

J = 2·D | other letters are those of `dense` and `draft_head`
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig
from nanovllm.models.draft_head import HeadModel, Outer, beside, renamed
from nanovllm.models.formats import linear
from nanovllm.models.layer_state import Recurrent
from nanovllm.models.model import LayerKind, Model, Param
from nanovllm.models.param import Adapt, PlusOne
from nanovllm.models.schemes import UNQUANTIZED


class Extra(NamedTuple):
    """Weights beside the layer. `model_norm_D` is the model's final norm."""

    embed_norm_D: Tensor
    state_norm_D: Tensor
    join_DJ: Tensor
    model_norm_D: Tensor


@dataclass(frozen=True)
class MtpNames:
    """How a checkpoint names the tensors: `layer` is the prefix of the layer's own. The number of
    the model's layers may be in them. `adapt` is that of the norms beside the layer."""

    layer: str
    embed_norm: str
    state_norm: str
    join: str
    final_norm: str
    adapt: Adapt | None = None

    def of(self, num_layers: int) -> MtpNames:
        """The names in a checkpoint of so many layers."""
        texts = ("layer", "embed_norm", "state_norm", "join", "final_norm")
        return replace(self, **{n: getattr(self, n).format(num_layers) for n in texts})

    def outer_params(self, cfg: ModelConfig) -> dict[str, Param]:
        """Parameters beside the layer, by the fields of `Params` and of `Extra`."""
        hidden = cfg.hidden_size

        def norm(name: str) -> Param:
            return Param.one("norm", name, hidden)._replace(adapt=self.adapt)

        return {
            "final_norm_D": norm(self.final_norm),
            "embed_norm_D": norm(self.embed_norm),
            "state_norm_D": norm(self.state_norm),
            # plain in quantized checkpoints too
            "join_DJ": Param.one("router", self.join, hidden, 2 * hidden),
            "model_norm_D": norm("model.norm.weight"),
        }


# The layer after the last one: DeepSeek-V3, GLM-4.5, GLM-4.7-Flash
AFTER = "model.layers.{}."
AFTER_LAST = MtpNames(
    AFTER,
    embed_norm=AFTER + "enorm.weight",
    state_norm=AFTER + "hnorm.weight",
    join=AFTER + "eh_proj.weight",
    final_norm=AFTER + "shared_head.norm.weight",
)
# Qwen3-Next, Qwen3.5 and Qwen3.6, whose norms multiply by 1 + w
BESIDE = MtpNames(
    "mtp.layers.0.",
    embed_norm="mtp.pre_fc_norm_embedding.weight",
    state_norm="mtp.pre_fc_norm_hidden.weight",
    join="mtp.fc.weight",
    final_norm="mtp.norm.weight",
    adapt=PlusOne(),
)
NAMES = {
    **dict.fromkeys(
        ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"), AFTER_LAST
    ),
    **dict.fromkeys(
        (
            "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
        ),
        BESIDE,
    ),
}  # fmt: skip


def model(target: Model, stored: Container[str] | None) -> HeadModel:
    """The whole head of a model, which is not divided among ranks yet and has no adapters.

    `stored` are the tensors of its checkpoint, None for random weights. Raises ValueError if it has
    none that propose tokens.
    """
    architecture, num_layers = target.config.architecture, target.config.num_layers
    if architecture not in NAMES:
        raise ValueError(
            f"method 'mtp' is not supported for {architecture}: only for {', '.join(NAMES)}"
        )
    names = NAMES[architecture].of(num_layers)
    if stored is not None and names.join not in stored:
        raise ValueError(f"the checkpoint has no layer that proposes tokens: it lacks {names.join}")
    config = replace(target.config, num_layers=1, tied_embeddings=False, num_deepstack=0)
    kind = next(one for one in target.layer_kinds[::-1] if not isinstance(one.keeps, Recurrent))
    is_inside = names.layer == AFTER.format(num_layers)
    head = HeadModel(
        config=config,
        layer_kinds=(kind,),
        embed=target.embed,
        layer=target.layer,
        head=target.head,
        enter=enter,
        again=again,
        reads=(num_layers - 1,),
        outer_params=names.outer_params,
        layer_params=partial(
            layer_params, target.layer_params, num_layers if is_inside else 0, names.layer
        ),
        layer_type=target.layer_type,
        extra_type=Extra,
        lent=("embed_VD", "head_VD"),
        read_elsewhere=("",),  # all others are the model's
    )
    return head if target.scheme is UNQUANTIZED else _with_scheme(head, target)


def _with_scheme(head: HeadModel, target: Model) -> HeadModel:
    found = head.with_scheme(target.scheme)
    assert isinstance(found, HeadModel)
    return found


# regions -----------------------------------------------------------------------------------------


def enter(cfg: ModelConfig, w: Outer, token_T: Tensor, states_TD: Tensor) -> Tensor:
    """The layer's input [T, D] from the model's hidden states after its last layer."""
    return _joined(cfg, w, token_T, ops.rms_norm(states_TD, w.extra.model_norm_D, cfg.norm_eps))


def again(cfg: ModelConfig, w: Outer, token_R: Tensor, h_RD: Tensor) -> Tensor:
    """The layer's input [R, D] from its own output."""
    return _joined(cfg, w, token_R, ops.rms_norm(h_RD, w.final_norm_D, cfg.norm_eps))


def _joined(cfg: ModelConfig, w: Outer, token_T: Tensor, state_TD: Tensor) -> Tensor:
    extra: Extra = w.extra
    embeds_TD = dense.embed(cfg, w.embed_VD, token_T)
    embeds_TD = ops.rms_norm(embeds_TD, extra.embed_norm_D, cfg.norm_eps)
    state_TD = ops.rms_norm(state_TD, extra.state_norm_D, cfg.norm_eps)
    return linear(beside(embeds_TD, state_TD), extra.join_DJ, None)


# parameters --------------------------------------------------------------------------------------


def layer_params(
    of_model: Callable[..., dict[str, Param]],
    number: int,
    prefix: str,
    cfg: ModelConfig,
    kind: LayerKind,
    layer_idx: int,
) -> dict[str, Param]:
    """Parameters of the layer: those of the model's layer with this number, under a prefix."""
    own = f"model.layers.{number}."
    return {name: renamed(one, own, prefix) for name, one in of_model(cfg, kind, number).items()}
