"""A small decode step, as regions and tensors, for the tests of the persistent kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nanovllm.compile.lower.persistent.plan import Plan
from nanovllm.compile.lower.persistent.step import Weights
from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import input_leaves
from nanovllm.kernels import ops
from nanovllm.kernels.cuda.persistent import Experts, Inputs
from nanovllm.models import loader
from nanovllm.models.config import ModelConfig, MoeConfig
from nanovllm.models.dense import dense_model
from nanovllm.models.formats.format import Format
from nanovllm.models.formats.fp8 import Fp8Rounded, Fp8Weight
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.formats.rounded import Rounded
from nanovllm.models.model import Batch, LayerCache, LayerCall
from nanovllm.models.moe import QWEN_NAMES, moe_model
from nanovllm.models.rope import rotary_table
from nanovllm.models.schemes import Converted
from nanovllm.platforms.attention import Attention
from nanovllm.runner.persistent import Parts, plan_of

DTYPE, BLOCK_SIZE, HEAD = torch.bfloat16, 16, 128


class Shape(NamedTuple):
    """Of a model, Qwen3's form."""

    hidden: int = 1024
    heads: int = 2
    kv_heads: int = 1
    ffn: int = 128
    vocab: int = 64
    layers: int = 2
    experts: Experts | None = None  # in place of an MLP
    is_qwen2: bool = False  # a bias, and no norms of queries and keys
    stored: Format | None = None  # of weights, in place of bf16


SMALL = Shape()
QWEN2 = Shape(hidden=192, heads=3, is_qwen2=True)
FP8_BLOCKS = Shape(hidden=1280, ffn=384, stored=Fp8Rounded((128, 128), "weight_scale"))
FP8_ROWS = Shape(ffn=192, stored=Fp8Rounded((1, 0), "weight_scale"))
FP8_EXPERTS = Shape(
    hidden=256, stored=FP8_BLOCKS.stored, experts=Experts(16, 4, 128, True), layers=1
)
INT4 = Shape(heads=8, kv_heads=2, ffn=1024, layers=1, stored=Rounded())
SMALL_EXPERTS = Shape(hidden=256, experts=Experts(16, 4, 64, True))


class Case(NamedTuple):
    """A step: its regions with their inputs, its plan, and its tensors."""

    parts: Parts
    batch: Batch
    layer: Any
    head: Any
    inputs: list[dict[str, object]]  # of each layer
    plan: Plan
    weights: Weights
    given: Inputs

    def states(self) -> list[Tensor]:
        """The hidden states after each layer of the regions, which also write to their caches."""
        found = [self.given.h_RD]
        for inputs in self.inputs:
            found.append(self.layer(*{**inputs, "h_TD": found[-1]}.values()))
        return found[1:]

    def expected(self) -> Tensor:
        """The logits of the regions."""
        own = self.weights.head
        return self.head(own["final_norm_D"], own["head_VD"], self.states()[-1])

    def caches(self) -> list[Tensor]:
        return [one for inputs in self.inputs for one in inputs["kv"][:2]]  # type: ignore[index]

    def exact(self) -> Case:
        """The same regions with tensors in fp32 on a CPU, and caches of their own."""

        def copied(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return one.float().cpu() if one.is_floating_point() else one.cpu()

        def real(one: Any) -> Any:
            return one.rows(0) if is_coded(one) else one

        plain = [tree_map(real, one, is_leaf=is_coded) for one in self.inputs]
        inputs = [tree_map(copied, one) for one in plain]
        head = {name: copied(one) for name, one in self.weights.head.items()}
        weights = self.weights._replace(head=head)
        given = self.given._replace(h_RD=copied(self.given.h_RD))
        return self._replace(inputs=inputs, weights=weights, given=given)


def config(shape: Shape, **changed: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM", "vocab_size": shape.vocab, "hidden_size": shape.hidden,
        "ffn_size": shape.ffn, "num_layers": shape.layers, "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads, "head_dim": HEAD, "norm_eps": 1e-6, "max_position": 4096,
        "inv_freq": tuple(1e4 ** (-i / 64) for i in range(64)), "rope_scale": 1.0,
        "tied_embeddings": False, "qk_norm": True, "dtype": DTYPE,
    }  # fmt: skip
    if shape.is_qwen2:
        values |= {"architecture": "Qwen2ForCausalLM", "qk_norm": False, "qkv_bias": True}
    if shape.experts is not None:
        values["moe"] = MoeConfig(*shape.experts)
    return ModelConfig(**{**values, **changed})


def case(
    lens: tuple[int | tuple[int, ...], ...],
    shape: Shape = SMALL,
    device: str = "cpu",
    compiler: Compiler | None = None,
    **changed: Any,
) -> Case:
    """A step of rows with so many tokens each, the new one included; tuples are of one request. The
    hidden states after the first and the last layer are kept. Pages are in no order. The plan is in
    the store of `compiler`, if there is one."""
    of_request = [(one,) if isinstance(one, int) else one for one in lens]
    len_R = list(chain.from_iterable(of_request))
    torch.manual_seed(0)
    where, cfg = torch.device(device), config(shape, **changed)
    is_sparse = (True,) * shape.layers
    model = dense_model(cfg) if shape.experts is None else moe_model(cfg, QWEN_NAMES, is_sparse)
    if shape.stored is not None:
        model = model.with_scheme(Converted(shape.stored, has_head=False))
    params = loader.random(model, loader.Target(where), 0, int)
    for one in params.layers:  # norms at one would hide mistakes
        for name in ("attn_norm_D", "mlp_norm_D", "q_norm_H", "k_norm_H"):
            if getattr(one, name) is not None:
                getattr(one, name).uniform_(0.5, 1.5)
        if one.qkv_bias_E is not None:
            one.qkv_bias_E.normal_()
        for weight in matrices(one):  # and so would results that are small beside the residual
            values = weight if isinstance(weight, Tensor) else weight.rows(0)
            factor = values.shape[-1] ** -0.5 / values[..., :64].float().std()
            for part in parts_of_scale(weight):
                part.mul_(factor)
        if shape.experts is not None:  # neighbours in the router's order are seldom near each other
            order_E = torch.randperm(shape.experts.num, device=where)
            one.router_ED.mul_((3 * 1.5 ** -order_E.to(DTYPE))[:, None])
    each = -(-max(len_R) // BLOCK_SIZE)
    table_RP = torch.randperm(len(len_R) * each).view(len(len_R), each).int() + 1
    requests = torch.tensor([idx for idx, one in enumerate(of_request) for _ in one])
    table_RP = table_RP[requests]
    pos_R = torch.tensor(len_R) - 1
    block_R = table_RP.gather(1, (pos_R // BLOCK_SIZE)[:, None])[:, 0].long()
    batch = Batch(
        rope_pos_T=pos_R.to(where),
        slot_T=(block_R * BLOCK_SIZE + pos_R % BLOCK_SIZE).to(where),
        block_table_RP=table_RP.to(where),
        seq_len_R=(pos_R + 1).int().to(where),
        q_start_S=torch.arange(len(len_R) + 1).int().to(where),
    )
    cos_sin_MH = rotary_table(cfg.inv_freq, cfg.rope_scale, 4096, where)
    h_RD = torch.randn(len(len_R), shape.hidden, device=where).to(DTYPE)
    cache_shape = (len(len_R) * each + 1, BLOCK_SIZE, shape.kv_heads, cfg.head_dim)

    def layer_inputs(w: Any) -> dict[str, object]:
        drawn = [torch.randn(cache_shape, device=where).to(DTYPE) for _ in range(2)]
        kv = LayerCache(drawn[0], drawn[1])
        return {"w": w, "kv": kv, "cos_sin_MH": cos_sin_MH, "batch": batch, "h_TD": h_RD}

    inputs = [layer_inputs(one) for one in params.layers]
    if shape.stored is not None and shape.experts is not None:
        model = replace(model, layer=partial(as_on_a_gpu, model.layer))
    layer = partial(model.layer, cfg, LayerCall("", model.layer_kinds[0], 1))
    head = partial(model.head, cfg)
    of_head = {"final_norm_D": params.final_norm_D, "head_VD": params.head_VD, "h_RD": h_RD}
    caches: tuple[Any, ...] = tuple(one["kv"] for one in inputs)
    parts = Parts(
        model, params, caches, cos_sin_MH, Attention(), compiler or Compiler(None), is_plain=True
    )
    plan = plan_of(parts, h_RD, batch)
    plan = plan._replace(has_several=len(of_request) < len(len_R), keeps=True)
    kept_RLD = torch.zeros(len(len_R), 2, shape.hidden, dtype=DTYPE, device=where)
    weights = Weights(
        plan, [dict(input_leaves(one)) for one in inputs], dict(input_leaves(of_head)),
        {0: kept_RLD[:, 0], shape.layers - 1: kept_RLD[:, 1]},
    )  # fmt: skip
    logits_RV = torch.zeros(len(len_R), shape.vocab, dtype=DTYPE, device=where)
    places = batch.rope_pos_T, batch.slot_T, batch.block_table_RP, batch.seq_len_R
    given = Inputs(h_RD, logits_RV, cos_sin_MH, *places)
    return Case(parts, batch, layer, head, inputs, plan, weights, given)


def as_on_a_gpu(layer: Callable[..., Tensor], *inputs: object) -> Tensor:
    """A layer with the op of experts in fp8, for which a CPU has no kernel but the reference."""
    with patch.object(ops, "has_kernel", lambda *_: True):
        return layer(*inputs)


def is_coded(one: Any) -> bool:
    return isinstance(one, (Fp8Weight, PackedWeight))


def matrices(layer: Any) -> list[Tensor | Fp8Weight | PackedWeight]:
    """Of a layer, those of its experts included."""
    leaves = tree_leaves(layer, is_leaf=is_coded)
    return [one for one in leaves if is_coded(one) or (isinstance(one, Tensor) and one.dim() > 1)]


def parts_of_scale(weight: Tensor | Fp8Weight | PackedWeight) -> list[Tensor]:
    """What to multiply if a weight is to be multiplied."""
    if isinstance(weight, Tensor):
        return [weight]
    if isinstance(weight, Fp8Weight):
        return [weight.scale_RG]
    return [one for one in (weight.scale_OG, weight.offset_OG) if one is not None]


def error(found: Tensor, expected: Tensor) -> float:
    """The root of the mean square difference, of that of the expected numbers."""
    difference = (found.double() - expected.double()).square().mean()
    return float((difference / expected.double().square().mean()).sqrt())
