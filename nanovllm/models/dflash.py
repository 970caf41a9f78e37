"""DFlash drafts: a block of tokens in one pass, whose layers see the whole block and the context.

The context are keys and values of the model's hidden states (`store_context`). The block is the
newest token and mask tokens, whose outputs are the draft tokens at their own positions. Source:
https://arxiv.org/abs/2602.06036.

DSpark adds logits by the token before (`before_VM`, `after_XM`), so the draft tokens of a block are
drawn one after the other. Its head that predicts acceptance is not read.

J = I times the number of states | M = `markov_rank` | other letters: see `dense` and `draft_head`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig, dense_config
from nanovllm.models.draft_head import HEAD, renamed, store_context, target_param
from nanovllm.models.formats import linear
from nanovllm.models.model import LayerKind, Model, Param


@dataclass(frozen=True)
class DFlashConfig(ModelConfig):
    """The config of a draft: mask tokens have the embedding of `mask_id`."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (
        *ModelConfig.GRAPH_FIELDS, "mask_id", "from_anchor", "markov_rank",
    )  # fmt: skip

    mask_id: int = 0
    num_states: int = 0
    num_drafted: int = 0  # tokens that the draft's own head can draft; 0: the model's head
    from_anchor: bool = False  # the newest token's output is the first draft token
    markov_rank: int = 0  # of the logits that the token before adds; 0: none


class Extra(NamedTuple):
    """Weights beside the layers, which make the context of hidden states."""

    fc_DJ: Tensor
    state_norm_D: Tensor
    target_X: Tensor | None  # the model's ids of the tokens that are drafted
    # DSpark: logits of a token are added by the one before it, by its row of the first
    before_VM: Tensor | None
    after_XM: Tensor | None


@dataclass(frozen=True, kw_only=True)
class BlockModel(Model):
    """The model of a draft, of up to `block_size` tokens with the newest one. Its layers are those
    of a decoder. `context(config, extra, states_TJ)` gives what `store` reads, from the hidden
    states after the other model's layers `reads`."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*Model.GRAPH_FIELDS, "context", "store")

    context: Callable[..., Tensor]
    store: Callable[..., tuple[()]]
    reads: tuple[int, ...]
    block_size: int


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None) -> BlockModel:
    """The draft of a config (`startup.head_config`). Raises ValueError."""
    plain = dense_config(
        hf,
        architecture="DFlash",
        dtype=dtype,
        max_model_len=max_model_len,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        qk_norm=True,
    )
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    num_drafted = hf.draft_vocab_size if hf.draft_vocab_size < hf.vocab_size else 0
    own = {"mask_id": hf.mask_token_id, "num_states": len(hf.read_layers)}
    own |= {"num_drafted": num_drafted, "markov_rank": hf.markov_rank}
    own["from_anchor"] = hf.sample_from_anchor
    config = DFlashConfig(**{**values, "tied_embeddings": False}, **own)
    kind = LayerKind("dflash", dense.paged_kv(config))
    return BlockModel(
        config=config,
        layer_kinds=(kind,) * config.num_layers,
        embed=dense.embed,
        layer=dense.layer,
        head=dense.head,
        context=context,
        store=store_context,
        reads=hf.read_layers,
        block_size=hf.block_size,
        outer_params=outer_params,
        layer_params=layer_params,
        layer_type=dense.layer_type,
        extra_type=Extra,
        lent=("embed_VD",) if num_drafted else ("embed_VD", "head_VD"),
        read_elsewhere=("t2d", "confidence_head."),
    )


# regions -----------------------------------------------------------------------------------------


def context(cfg: DFlashConfig, w: Extra, states_TJ: Tensor) -> Tensor:
    """What all layers' keys and values of the context are made of: [T, D]."""
    state_TD = linear(states_TJ, w.fc_DJ, None)
    return ops.rms_norm(state_TD, w.state_norm_D, cfg.norm_eps)


# parameters --------------------------------------------------------------------------------------


def outer_params(cfg: ModelConfig) -> dict[str, Param]:
    """Parameters beside the layers, by the fields of `Params` and of `Extra`."""
    assert isinstance(cfg, DFlashConfig)
    hidden = cfg.hidden_size
    declared = {
        "final_norm_D": Param.one("norm", "norm.weight", hidden),
        "fc_DJ": Param.one("router", "fc.weight", hidden, cfg.num_states * hidden),
        "state_norm_D": Param.one("norm", "hidden_norm.weight", hidden),
    }
    if cfg.num_drafted:
        declared["head_VD"] = Param.vocab("linear", HEAD, cfg.num_drafted, hidden)
        declared["target_X"] = target_param(cfg, cfg.num_drafted)
    if cfg.markov_rank:
        sizes = cfg.vocab_size, cfg.num_drafted or cfg.vocab_size
        for name, number, size in zip(("before_VM", "after_XM"), (1, 2), sizes):
            source = f"markov_head.markov_w{number}.weight"
            declared[name] = Param.one("plain", source, size, cfg.markov_rank)
    return declared


def layer_params(cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
    """Parameters of one layer, by the fields of `dense.Layer`."""
    declared = dense.layer_params(cfg, kind, layer_idx)
    return {name: renamed(one, "model.", "") for name, one in declared.items()}
