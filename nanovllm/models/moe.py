"""The decoder with experts: Mixtral, Qwen2-MoE and Qwen3-MoE are this mathematics.

Attention is that of `dense`. A sparse layer has experts in place of the MLP: each token goes to K
of E experts, and in some models to a shared expert too, which may have a gate. Dense and sparse
layers may mix.

T tokens | K experts per token | E experts | D hidden | F expert width | G = 2F. Other letters are
those of `dense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense, experts, group_router, svd_experts
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import attention, attention_params, embed, head, kv_scales, mlp_params
from nanovllm.models.experts import Experts
from nanovllm.models.formats import Weight, linear
from nanovllm.models.model import (
    Batch,
    Kept,
    LatentCache,
    LayerCache,
    LayerCall,
    LayerKind,
    Model,
    Param,
)


class SparseWeights(Protocol):
    """The weights that `sparse_mlp` reads. The MLP's fields are those of a shared expert."""

    @property
    def mlp_norm_D(self) -> Tensor: ...
    @property
    def router_ED(self) -> Tensor: ...
    @property
    def router_bias_E(self) -> Tensor | None: ...
    @property
    def experts(self) -> Experts: ...
    @property
    def shared_gate_1D(self) -> Tensor | None: ...
    @property
    def gate_up_GD(self) -> Weight | None: ...
    @property
    def down_DF(self) -> Weight | None: ...


class SparseLayer(NamedTuple):
    """Weights of one decoder layer with experts."""

    attn_norm_D: Tensor
    qkv_ED: Weight
    qkv_bias_E: Tensor | None
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    out_DQ: Weight
    out_bias_D: Tensor | None
    mlp_norm_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor | None
    experts: Experts
    shared_gate_1D: Tensor | None
    gate_up_GD: Weight | None
    down_DF: Weight | None


class ExpertNames(NamedTuple):
    """The names of a checkpoint's tensors, after the layer's prefix.

    `one` names a matrix of one expert: {matrix} stands for `gate`, `up` or `down`, {expert} for the
    expert's number. `stacked` are the two tensors of all experts in transformers 5: gate and up
    together, and down. `router_bias` is that of a `GroupRouter`. `shared` is the module of a shared
    expert, `shared_gate` its gate; None without one. See `Param` for `may_be_transposed`.
    """

    router: str
    one: str
    gate: str
    up: str
    down: str
    other_router: str | None = None
    stacked: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    may_be_transposed: bool = False
    router_bias: str | None = None
    shared: str = "mlp.shared_expert"
    shared_gate: str | None = "mlp.shared_expert_gate.weight"

    def layer_params(self, cfg: ModelConfig, kind: LayerKind, layer_idx: int) -> dict[str, Param]:
        """Parameters of one decoder layer, by the fields of `layer_type(kind)`."""
        if kind.sparse:
            return sparse_params(cfg, self, layer_idx)
        return dense.layer_params(cfg, kind, layer_idx)


# Qwen2-MoE and Qwen3-MoE
QWEN_NAMES = ExpertNames(
    router="mlp.gate.weight",
    one="mlp.experts.{expert}.{matrix}.weight",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
# DeepSeek and GLM, whose routers have a bias or none
DEEPSEEK_NAMES = QWEN_NAMES._replace(shared="mlp.shared_experts", shared_gate=None)
BIASED_NAMES = DEEPSEEK_NAMES._replace(router_bias="mlp.gate.e_score_correction_bias")


def moe_model(
    cfg: ModelConfig,
    names: ExpertNames,
    is_sparse: Sequence[bool],
    windows: Sequence[int] | None = None,
) -> Model:
    """The model of a config with `moe`; `is_sparse` and `windows` have an entry for each layer."""
    kinds = [
        LayerKind(
            f"{'sparse' if sparse else 'dense'}_window{window}", dense.paged_kv(cfg, window), sparse
        )
        for sparse, window in zip(is_sparse, windows or (0,) * cfg.num_layers, strict=True)
    ]
    return Model(
        config=cfg,
        layer_kinds=tuple(kinds),
        embed=embed,
        layer=layer,
        head=head,
        outer_params=dense.outer_params,
        layer_params=names.layer_params,
        layer_type=layer_type,
        kv_scales=kv_scales,
    )


# regions -----------------------------------------------------------------------------------------


def layer(
    cfg: ModelConfig,
    call: LayerCall,
    w: dense.Layer | SparseLayer,
    kv: LayerCache,
    cos_sin_MH: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """One decoder layer, dense or sparse: see `dense.layer`."""
    if isinstance(w, dense.Layer):
        return dense.layer(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    predict(cfg, call, w, kv, batch, h_TD)
    h_TD = attention(cfg, call, w, kv, cos_sin_MH, batch, h_TD)
    return sparse_mlp(cfg, w, kv, batch, h_TD)


def predict(
    cfg: ModelConfig, call: LayerCall, w: SparseWeights, kv: Kept, batch: Batch, h_TD: Tensor
) -> None:
    """Fetch the experts that a sparse layer's input would choose, if the layer predicts."""
    if call.predicts and batch.keep_R is None:
        _, _, expert_TK = routed(cfg, w, h_TD)
        experts.prepare(expert_TK, w.experts, batch.slot_T, _num_pad_slots(kv), ahead=True)


def _num_pad_slots(kv: Kept) -> int:
    """Padding writes to block 0. A layer without a cache does not know which slots are padding."""
    return kv.shape_CB[1] if isinstance(kv, LayerCache | LatentCache) else 0


def sparse_mlp(cfg: ModelConfig, w: SparseWeights, kv: Kept, batch: Batch, h_TD: Tensor) -> Tensor:
    """The second half of a sparse layer: h + experts of the normalised h."""
    kv_slot_T = batch.slot_T
    if batch.keep_R is not None:
        kv_slot_T = kv_slot_T.index_select(0, batch.keep_R)
    x_TD, weight_TK, expert_TK = routed(cfg, w, h_TD)
    expert_TK = experts.prepare(expert_TK, w.experts, kv_slot_T, _num_pad_slots(kv))
    # on several ranks, parts of all products are summed before h is added
    sum_TD = h_TD if cfg.num_ranks == 1 else None
    if w.gate_up_GD is not None and w.down_DF is not None:
        sum_TD = _with_shared(w, x_TD, w.gate_up_GD, w.down_DF, sum_TD)
    sum_TD = experts.apply(x_TD, weight_TK, expert_TK, w.experts, sum_TD)
    return sum_TD if cfg.num_ranks == 1 else ops.all_reduce(sum_TD, h_TD)


def _with_shared(
    w: SparseWeights, x_TD: Tensor, gate_up_GD: Weight, down_DF: Weight, sum_TD: Tensor | None
) -> Tensor:
    """A sum and the result of the shared expert."""
    if w.shared_gate_1D is None:
        return linear(ops.silu_mul(linear(x_TD, gate_up_GD, None)), down_DF, None, sum_TD)
    gate_T1 = torch.sigmoid(ops.linear(x_TD, w.shared_gate_1D, None))
    inner_TF = ops.silu_mul(linear(x_TD, gate_up_GD, None))
    shared_TD = gate_T1 * linear(inner_TF, down_DF, None)
    return shared_TD if sum_TD is None else sum_TD + shared_TD


def routed(cfg: ModelConfig, w: SparseWeights, h_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised h, and its experts: their weights and numbers."""
    assert cfg.moe is not None
    x_TD, moe = ops.rms_norm(h_TD, w.mlp_norm_D, cfg.norm_eps), cfg.moe
    if moe.router is not None:
        weights = (w.router_ED, w.router_bias_E)
        return x_TD, *group_router.choose(moe.router, moe.top_k, moe.normalize, x_TD, weights)
    logits_TE = ops.linear(x_TD, w.router_ED, None)
    return x_TD, *ops.topk_softmax(logits_TE, moe.top_k, moe.normalize)


# parameters --------------------------------------------------------------------------------------


def layer_type(kind: LayerKind) -> type[SparseLayer] | type[dense.Layer]:
    return SparseLayer if kind.sparse else dense.Layer


def sparse_params(cfg: ModelConfig, names: ExpertNames, layer_idx: int) -> dict[str, Param]:
    """Parameters of a sparse layer, by the fields of `SparseLayer` and of a form of experts."""
    return {**attention_params(cfg, layer_idx), **sparse_mlp_params(cfg, names, layer_idx)}


def sparse_mlp_params(cfg: ModelConfig, names: ExpertNames, layer_idx: int) -> dict[str, Param]:
    """Parameters of a sparse layer's second half without its norm, by the fields of
    `SparseWeights` and of a form of experts."""
    assert cfg.moe is not None
    moe, hidden, prefix = cfg.moe, cfg.hidden_size, f"model.layers.{layer_idx}."
    other_router = names.other_router and prefix + names.other_router
    router = {"router_ED": Param.one("router", prefix + names.router, moe.num_experts, hidden)}
    if moe.router is not None:
        bias = names.router_bias and prefix + names.router_bias
        router = group_router.router_params(prefix + names.router, bias, moe.num_experts, hidden)
    router["router_ED"] = router["router_ED"]._replace(other_name=other_router)
    declared = {**router, **expert_params(cfg, names, layer_idx)}
    if moe.shared_size:
        if names.shared_gate is not None:
            gate = prefix + names.shared_gate
            declared["shared_gate_1D"] = Param.one("router", gate, 1, hidden)
        declared |= mlp_params(cfg, layer_idx, names.shared, moe.shared_size)
    return declared


def expert_params(cfg: ModelConfig, names: ExpertNames, layer_idx: int) -> dict[str, Param]:
    """A layer's experts, by the fields of the form that the config asks for."""
    assert cfg.moe is not None
    whole = stacked_params(cfg, names, layer_idx)
    return whole if cfg.moe.compression is None else compressed_params(cfg, whole, layer_idx)


def stacked_params(cfg: ModelConfig, names: ExpertNames, layer_idx: int) -> dict[str, Param]:
    """A layer's experts as the checkpoint has them, by the fields of `experts.stacked.Stacked` or,
    if each rank has some of them, of `experts.expert_parallel.ExpertParallel`."""
    assert cfg.moe is not None
    num, size, hidden = cfg.moe.num_experts, cfg.moe.expert_size, cfg.hidden_size
    prefix = f"model.layers.{layer_idx}."

    def one(matrix: str, expert: int) -> str:
        return prefix + names.one.format(matrix=matrix, expert=expert)

    gate_up = tuple(one(m, expert) for expert in range(num) for m in (names.gate, names.up))
    down = tuple(one(names.down, expert) for expert in range(num))
    stacked_gate_up, stacked_down = (prefix + name for name in names.stacked)
    declared = {
        "gate_up_EGD": Param(
            "experts", (num, 2 * size, hidden), gate_up, (size,) * (2 * num), 0, stacked_gate_up
        ),
        "down_EDF": Param(
            "experts", (num, hidden, size), down, (hidden,) * num, 1, stacked_down
        ),
    }  # fmt: skip
    for name, param in declared.items():
        declared[name] = param._replace(may_be_transposed=names.may_be_transposed)
    if not cfg.moe.is_expert_parallel:
        return declared
    places = {"local_X": Param("places", (num,), (), (), None)}
    return places | {
        name: param._replace(shard_axis=None, is_expert_parallel=True)
        for name, param in declared.items()
    }


def compressed_params(
    cfg: ModelConfig, whole: dict[str, Param], layer_idx: int
) -> dict[str, Param]:
    """The same experts compressed, by the fields of `experts.compressed.Compressed`."""
    assert cfg.moe is not None and cfg.moe.compression is not None
    num, size, hidden = cfg.moe.num_experts, cfg.moe.expert_size, cfg.hidden_size
    rank = cfg.moe.compression.rank

    def basis(kind: str, num_inputs: int) -> Param:
        source = svd_experts.basis_source(layer_idx, kind)
        return Param.one("basis", source, rank, num_inputs)._replace(compressed=True)

    def own(kind: str, num_outputs: int) -> Param:
        sources = tuple(svd_experts.expert_source(layer_idx, e, kind) for e in range(num))
        parts = (num_outputs,) * num
        return Param("experts", (num, num_outputs, rank), sources, parts, None, compressed=True)

    replaces = tuple(
        name
        for param in whole.values()
        for name in (*param.sources, param.other_name)
        if name is not None
    )
    return {
        "u_gate_LD": basis(svd_experts.GATE, hidden),
        "u_up_LD": basis(svd_experts.UP, hidden),
        "u_down_LF": basis(svd_experts.DOWN, size)._replace(replaces=replaces),
        "v_gate_EFL": own(svd_experts.GATE, size),
        "v_up_EFL": own(svd_experts.UP, size),
        "v_down_EDL": own(svd_experts.DOWN, hidden),
    }
