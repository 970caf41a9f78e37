"""Multi-head latent attention: keys and values of all heads follow from one latent of each token.

A token's latent c has L numbers, and its rotated key r has R. Head n has the key [K_n · c | r] and
the value V_n · c. The cache holds [c | r] alone. Since q · (K_n · c) = (K_nᵀ · q) · c, queries are
multiplied by K_n and results by V_n, and attention reads the cache as it is, for all heads at once.
Prompts may expand keys and values instead: see `reference.latent_attention`.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.1.

L latent | R rotated | Z = L + R | N heads | P part of a head's key that is not rotated | H = P + R
V value of a head | A latent of queries | X = N·(P + V) | other letters are those of `dense`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.models import dense
from nanovllm.models.config import ModelConfig
from nanovllm.models.formats import Weight, linear
from nanovllm.models.layer_state import PagedLatent
from nanovllm.models.model import Batch, LatentCache, LayerCall, Param
from nanovllm.models.param import RowOrder

NORM_EPS = 1e-6  # of the norms of latents, whatever that of the others is


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of attention: see the head of the file. `queries` is A, 0 without a latent of queries.

    `scale` multiplies products of queries and keys. With `is_interleaved` a checkpoint rotates
    elements 2i and 2i + 1 together, otherwise i and i + R/2. Raises ValueError for other sizes
    than positive ones.
    """

    latent: int
    rotated: int
    plain: int
    value: int
    queries: int
    scale: float
    is_interleaved: bool

    def __post_init__(self) -> None:
        sizes = {
            "kv_lora_rank": self.latent,
            "qk_rope_head_dim": self.rotated,
            "qk_nope_head_dim": self.plain,
            "v_head_dim": self.value,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1")
        if self.queries < 0:
            raise ValueError(f"q_lora_rank is {self.queries}: it must be null or at least 1")

    @property
    def head(self) -> int:
        return self.plain + self.rotated

    @property
    def entry(self) -> int:
        return self.latent + self.rotated


@dataclass(frozen=True)
class LatentConfig(ModelConfig):
    """The config of a model with latent attention: `head_dim` is R, and all heads are key-value
    heads."""

    GRAPH_FIELDS: ClassVar[tuple[str, ...]] = (*ModelConfig.GRAPH_FIELDS, "latent")

    latent: LatentSizes = LatentSizes(1, 1, 1, 1, 0, 1.0, is_interleaved=True)


class LatentWeights(Protocol):
    """The weights that `attention` reads. `first_ED` gives the latents of queries, or the queries
    themselves, and [c | r]."""

    @property
    def attn_norm_D(self) -> Tensor: ...
    @property
    def first_ED(self) -> Weight: ...
    @property
    def first_bias_E(self) -> Tensor | None: ...
    @property
    def q_norm_A(self) -> Tensor | None: ...
    @property
    def q_up_QA(self) -> Weight | None: ...
    @property
    def kv_norm_L(self) -> Tensor: ...
    @property
    def kv_up_XL(self) -> Tensor: ...
    @property
    def out_DQ(self) -> Weight: ...
    @property
    def out_bias_D(self) -> Tensor | None: ...


def attention_scale(hf: Any, head_size: int) -> float:
    """1 / √H, and with scaled positions times the square of the factor that `mscale_all_dim` asks
    for: (0.1 · mscale_all_dim · ln(factor) + 1)²."""
    rope: dict[str, Any] = hf.rope_parameters
    factor, mscale = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    root = 1.0
    if rope.get("rope_type", "default") != "default" and factor > 1:
        root = 0.1 * mscale * math.log(factor) + 1.0
    return root * root / math.sqrt(head_size)


def paged_latent(cfg: LatentConfig) -> PagedLatent:
    """What a layer keeps."""
    return PagedLatent(cfg.latent.latent, cfg.latent.rotated)


# regions -----------------------------------------------------------------------------------------


def attention(
    cfg: LatentConfig,
    call: LayerCall,
    w: LatentWeights,
    kv: LatentCache,
    cos_sin_MR: Tensor,
    batch: Batch,
    h_TD: Tensor,
) -> Tensor:
    """The first half of a layer: h + attention of the normalised h; see `dense.attention`."""
    sizes, (key_NPL, value_NVL) = cfg.latent, _up(cfg, w)
    x_TD = ops.rms_norm(h_TD, w.attn_norm_D, cfg.norm_eps)
    q_TNH, kv_TZ = _projected(cfg, w, x_TD)
    q_TNZ, entry_TZ = ops.latent_inputs(
        q_TNH, key_NPL, kv_TZ, w.kv_norm_L, cos_sin_MR, batch.rope_pos_T, batch.slot_T,
        kv.latent_CBZ, NORM_EPS,
    )  # fmt: skip
    pages = kv.latent_CBZ, batch.block_table_RP, batch.seq_len_R, batch.q_start_S, call.max_q_len
    if call.max_q_len == 1:
        o_TNL = ops.latent_attention(q_TNZ, *pages, sizes.scale, sizes.latent)
        o_TNV = ops.head_linear(o_TNL, value_NVL)
    else:
        o_TNV = ops.latent_span_attention(
            q_TNH, q_TNZ, entry_TZ, key_NPL, value_NVL, *pages, sizes.scale
        )
    o_TQ, h_TD = dense.kept(batch, o_TNV.flatten(1), h_TD)
    return dense.summed_linear(cfg, o_TQ, w.out_DQ, w.out_bias_D, h_TD)


def _projected(cfg: LatentConfig, w: LatentWeights, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [T, N, H], and the latents with their keys [T, Z]: neither is rotated."""
    sizes = cfg.latent
    first_TE = linear(x_TD, w.first_ED, w.first_bias_E)
    q_TQ, kv_TZ = first_TE.split([first_TE.shape[1] - sizes.entry, sizes.entry], dim=-1)
    if w.q_norm_A is not None and w.q_up_QA is not None:
        q_TQ = linear(ops.rms_norm(q_TQ, w.q_norm_A, NORM_EPS), w.q_up_QA, None)
    return q_TQ.unflatten(1, (cfg.num_heads, sizes.head)), kv_TZ


def _up(cfg: LatentConfig, w: LatentWeights) -> tuple[Tensor, Tensor]:
    """The heads' matrices K [N, P, L] and V [N, V, L]."""
    sizes, num = cfg.latent, cfg.num_heads
    key_KL, value_VL = w.kv_up_XL.split([num * sizes.plain, num * sizes.value])
    return key_KL.unflatten(0, (num, -1)), value_VL.unflatten(0, (num, -1))


# parameters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstOrder(RowOrder):
    """The rows of `first_ED`, or those of queries alone: in each rotated part the elements 2i come
    before the elements 2i + 1, since the ops rotate i and i + R/2.

    Products of queries and keys do not depend on the order. A source of queries has heads of
    `head` rows, whose last are rotated; 0 for a latent. The last source is [c | r].
    """

    head: int
    rotated: int
    has_entry: bool = True

    def order(self, parts: tuple[int, ...]) -> Tensor:
        order_O = torch.arange(sum(parts))
        first = 0
        for i, num in enumerate(parts):
            is_entry = self.has_entry and i == len(parts) - 1
            head = num if is_entry else self.head
            if head:
                rows_nh = order_O[first : first + num].view(-1, head)
                rotated_nR = rows_nh[:, -self.rotated :]
                pairs = (rotated_nR[:, 0::2], rotated_nR[:, 1::2])
                rows_nh[:, -self.rotated :] = torch.cat(pairs, dim=1)
            first += num
        return order_O


@dataclass(frozen=True)
class KeysFirst(RowOrder):
    """The rows of `kv_up_XL`: those of all heads' keys, then those of values. A checkpoint has them
    head by head."""

    key: int
    value: int

    def order(self, parts: tuple[int, ...]) -> Tensor:
        rows_nX = torch.arange(sum(parts)).view(-1, self.key + self.value)
        return torch.cat([part.flatten() for part in rows_nX.split([self.key, self.value], dim=1)])


def attention_params(cfg: LatentConfig, layer_idx: int) -> dict[str, Param]:
    """Parameters of a layer's first half, and the norm of its second."""
    prefix, hidden, sizes = f"model.layers.{layer_idx}.", cfg.hidden_size, cfg.latent
    attn, num, rank = prefix + "self_attn.", cfg.num_heads, cfg.latent.queries
    q_size, kv_size = num * sizes.head, num * (sizes.plain + sizes.value)
    sources = tuple(
        f"{attn}{name}.weight" for name in ("q_a_proj" if rank else "q_proj", "kv_a_proj_with_mqa")
    )
    parts = (rank or q_size, sizes.entry)
    first = Param.stack("linear", sources, parts, hidden)
    order = FirstOrder(0 if rank else sizes.head, sizes.rotated) if sizes.is_interleaved else None
    # latents are those of all ranks; without one of queries, each rank has its heads' queries
    shared = {"shard_axis": None} if rank else {"units": (num, 1)}
    up = Param.one("heads", attn + "kv_b_proj.weight", kv_size, sizes.latent, shard_axis=0)
    declared = {
        "attn_norm_D": Param.one("norm", prefix + "input_layernorm.weight", hidden),
        "first_ED": first._replace(adapt=order, **shared),
        "kv_norm_L": Param.one("norm", attn + "kv_a_layernorm.weight", sizes.latent),
        "kv_up_XL": up._replace(units=(num,), adapt=KeysFirst(sizes.plain, sizes.value)),
        "out_DQ": Param.one(
            "linear", attn + "o_proj.weight", hidden, num * sizes.value, shard_axis=1
        ),
        "mlp_norm_D": Param.one("norm", prefix + "post_attention_layernorm.weight", hidden),
    }
    if rank:
        q_up = Param.one("linear", attn + "q_b_proj.weight", q_size, rank, shard_axis=0)
        of_heads = FirstOrder(sizes.head, sizes.rotated, has_entry=False)
        declared["q_norm_A"] = Param.one("norm", attn + "q_a_layernorm.weight", rank)
        declared["q_up_QA"] = q_up._replace(units=(num,), adapt=order and of_heads)
    if cfg.qkv_bias:
        biases = tuple(source.removesuffix("weight") + "bias" for source in sources)
        bias = Param("bias", (sum(parts),), biases, parts, None)
        declared["first_bias_E"] = bias._replace(adapt=order)
    if cfg.out_bias:
        declared["out_bias_D"] = dense.summed_bias(attn + "o_proj.bias", hidden)
    return declared
