"""Reads the regions of a decode step: which tensors its layers and its head multiply and keep.

The graphs are those of a layer and of the head after rotation and store, norms and activations have
been fused with their products. What the kernel does not take is refused with a reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanovllm.compile.keys import narrowed
from nanovllm.compile.lower.persistent.graph_reader import (
    FP8_BLOCK,
    Product,
    Reader,
    check_plain,
    product,
)
from nanovllm.compile.lower.persistent.graph_reader import Unfit as Unfit
from nanovllm.compile.passes.fuse_linear import fuse_linear
from nanovllm.compile.passes.fuse_rope_store import fuse_rope_store
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import CodeFormat, Experts

if TYPE_CHECKING:
    from torch.fx import GraphModule

MAX_ROWS = 8  # the matrix units take so many


class Plan(NamedTuple):
    """The sizes of a step, and the inputs of its regions by what they are for.

    `layer_inputs` are names of a layer's inputs, as in `trace.input_leaves`: attn_norm, qkv,
    qkv_bias, q_norm, k_norm, out, mlp_norm, gate_up, down, keys, values, cos_sin, rope_pos, slot,
    table, seq_len. `head_inputs` are those of the head: final_norm, head. The bias, and norms of
    queries and keys, may be missing. With `experts` gate_up and down are those of all experts,
    `ffn` is the width of a token's experts together, and there is a router. has_several: rows may
    be tokens of one request, one after the other, as in a step that verifies drafts. keeps: hidden
    states after some layers are stored for a head that drafts. With `codes` products have scales
    and perhaps offsets: qkv_scale, qkv_offset and so on.
    """

    num_rows: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab: int
    num_layers: int
    eps: float
    scale: float
    layer_inputs: Mapping[str, str]
    head_inputs: Mapping[str, str]
    experts: Experts | None = None
    has_several: bool = False
    keeps: bool = False
    codes: CodeFormat | None = None

    @property
    def has_bias(self) -> bool:
        return "qkv_bias" in self.layer_inputs

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * persistent.HEAD

    @property
    def attended(self) -> int:
        return self.num_heads * persistent.HEAD

    @property
    def layer_bytes(self) -> int:
        """Of the products of a layer. Each row has experts of its own."""
        mlp = 3 * self.ffn
        if self.experts is not None:
            mlp = mlp * self.num_rows + self.experts.num
        bits = 16 if self.codes is None else self.codes.bits
        return self.hidden * (self.qkv + self.attended + mlp) * bits // 8

    @property
    def weight_bytes(self) -> int:
        """Of all products of a step."""
        bits = 16 if self.codes is None or not self.codes.has_head else self.codes.bits
        return self.num_layers * self.layer_bytes + self.hidden * self.vocab * bits // 8


def read(
    layer: Callable[..., Any],
    head: Callable[..., Any],
    layer_inputs: dict[str, object],
    head_inputs: dict[str, object],
    *,
    varying: Sequence[str] = (),
) -> Plan:
    """The plan of a step with one layer; the caller sets how many there are. Raises Unfit."""
    of_layer = Reader(_fused(layer, layer_inputs, varying))
    of_head = Reader(_fused(head, head_inputs, varying))
    sizes, layer_names = _layer(of_layer)
    of_vocab, head_names = _head(of_head, sizes)
    if of_vocab.codes is not None:
        if of_vocab.codes != sizes["codes"]:
            raise Unfit("the head's weights are in another format than those of layers")
        sizes["codes"] = of_vocab.codes._replace(has_head=True)
    plan = Plan(
        **sizes,
        vocab=of_vocab.weight.meta["val"].shape[0],
        num_layers=1,
        layer_inputs=layer_names,
        head_inputs=head_names,
    )
    _check(plan)
    return plan


def _fused(region: Callable[..., Any], inputs: dict[str, object], varying: Any) -> GraphModule:
    graph, fakes, _ = trace(narrowed(region), inputs, varying=varying)
    graph = fuse_rope_store(graph, fakes)
    taken = (ops.linear, ops.fp8_linear, ops.packed_linear)
    return fuse_linear(graph, fakes, takes={one: lambda *args: True for one in taken})


def _codes(of_products: Sequence[CodeFormat | None]) -> CodeFormat | None:
    """How the weights of all products are kept, None in bf16."""
    found = set(of_products)
    if len(found) > 1:
        raise Unfit("the products of a layer have weights in several formats")
    return found.pop()


def _layer(reader: Reader) -> tuple[dict[str, Any], dict[str, str]]:
    h = reader.calls[0].args[0] if reader.calls else None
    if getattr(h, "op", "") != "placeholder":
        raise Unfit("a layer begins with other calls")
    qkv = product(reader, "a layer's first product", h, norm=True, may_have_bias=True)
    eps = qkv.eps
    rotated, args = reader.take(ops.qk_norm_rope_store, "rotation and store")
    x, q_norm, k_norm, cos_sin, rope_pos, slot, keys, values, num_heads, own_eps, *scales = args
    if x is not qkv.node or any(one is not None for one in scales) or own_eps not in (eps, 0, 0.0):
        raise Unfit("rotation and store have scales, or another eps")
    attended, attention = reader.take(ops.paged_attention, "our own attention")
    query, k, v, table, seq_len, _, max_q_len, scale, window, *others = attention
    if query is not rotated or (k, v) != (keys, values) or max_q_len != 1:
        raise Unfit("attention is of other tokens")
    if window or any(one is not None for one in others):
        raise Unfit("attention has a window, scales, sinks or later tokens")
    out = product(reader, "attention's product", attended, residual=h, norm=False)
    mlp = _experts(reader, out.node) if _has_experts(reader) else _mlp(reader, out.node)
    if reader.calls or reader.result is not mlp.last or mlp.eps != eps:
        raise Unfit("a layer has more calls, or several values of eps")
    named = {
        "attn_norm": qkv.norm, **qkv.named("qkv"), "qkv_bias": qkv.bias, "q_norm": q_norm,
        "k_norm": k_norm, **out.named("out"), **mlp.inputs, "keys": keys, "values": values,
        "cos_sin": cos_sin, "rope_pos": rope_pos, "slot": slot, "table": table, "seq_len": seq_len,
    }  # fmt: skip
    assert h is not None
    cache, rows = keys.meta["val"], h.meta["val"]
    if cache.dtype != torch.bfloat16 or cache.shape[3] != persistent.HEAD:
        raise Unfit(f"the cache has heads of {cache.shape[3]} in {cache.dtype}")
    sizes = {
        "num_rows": rows.shape[0], "hidden": rows.shape[1], "num_heads": num_heads,
        "num_kv_heads": cache.shape[2], "ffn": mlp.ffn, "eps": eps, "scale": scale,
        "experts": mlp.experts,
    }  # fmt: skip
    sizes["codes"] = _codes([qkv.codes, out.codes, *mlp.codes])
    return sizes, {key: node.name for key, node in named.items() if node is not None}


class _Mlp(NamedTuple):
    """The second half of a layer: its last call, and its weights by what they are for."""

    experts: Experts | None
    last: Any
    ffn: int
    inputs: dict[str, Any]
    eps: float
    codes: Sequence[CodeFormat | None]


def _mlp(reader: Reader, out: Any) -> _Mlp:
    inner = product(reader, "the MLP's first product", out, norm=True, silu=True)
    last = product(reader, "the MLP's last product", inner.node, residual=out, norm=False)
    inputs = {"mlp_norm": inner.norm, **inner.named("gate_up"), **last.named("down")}
    ffn = inner.weight.meta["val"].shape[0] // 2  # gates, then ups
    return _Mlp(None, last.node, ffn, inputs, inner.eps, [inner.codes, last.codes])


def _has_experts(reader: Reader) -> bool:
    return any(node.target in (ops.experts, ops.fp8_experts) for node in reader.calls)


def _experts(reader: Reader, out: Any) -> _Mlp:
    """Norm, router and experts. The norm's result has no other readers."""
    normed, (x, norm, eps) = reader.take(ops.rms_norm, "the norm before experts")
    router = product(reader, "the router", normed, norm=False)
    choice, (found, top_k, normalize) = reader.take(ops.topk_softmax, "the choice of experts")
    chosen = [reader.take(operator.getitem, "the choice of experts")[0] for _ in range(2)]
    is_fp8 = bool(reader.calls) and reader.calls[0].target is ops.fp8_experts
    last, args = reader.take(ops.fp8_experts if is_fp8 else ops.experts, "experts")
    inputs, weights, numbers, *rest = args
    num_parts = 8 if is_fp8 else 2
    parts, (residual, *others) = rest[:num_parts], rest[num_parts:]
    if not is_fp8:
        parts = [parts[0], None, 0, 0, parts[1], None, 0, 0]
    gate_up, scale, *sides, down, down_scale, down_rows, down_columns = parts
    is_taken = x is out and found is router.node and inputs is normed and residual is out
    if not is_taken or [weights, numbers] != chosen or any(one is not None for one in others):
        raise Unfit("experts have other neighbours")
    if [node.args for node in chosen] != [(choice, 0), (choice, 1)]:
        raise Unfit("experts have other weights")
    num, hidden, ffn = down.meta["val"].shape
    codes = None
    if is_fp8:
        dtype = scale.meta["val"].dtype
        codes = CodeFormat(8, dtype, FP8_BLOCK)
        if [*sides, down_rows, down_columns] != [FP8_BLOCK] * 4 or (hidden | ffn) % FP8_BLOCK:
            raise Unfit("experts have scales that are not of whole blocks of 128")
        for one in (scale, down_scale):
            check_plain("experts", one, dtype if dtype is torch.bfloat16 else torch.float32)
    check_plain("experts", norm, torch.bfloat16)
    for one in (gate_up, down):
        check_plain("experts", one, torch.float8_e4m3fn if is_fp8 else torch.bfloat16)
    if router.codes is not None:
        raise Unfit("the router's weights are in codes")
    named = {
        "mlp_norm": norm, "router": router.weight, "gate_up": gate_up, "down": down,
        "gate_up_scale": scale, "down_scale": down_scale,
    }  # fmt: skip
    return _Mlp(Experts(num, top_k, ffn, normalize), last, top_k * ffn, named, eps, [codes])


def _head(reader: Reader, sizes: Mapping[str, Any]) -> tuple[Product, dict[str, str]]:
    head = product(reader, "the head", None, norm=True)
    if reader.calls or reader.result is not head.node or head.eps != sizes["eps"]:
        raise Unfit("the head has more calls, or another eps")
    named = {"final_norm": head.norm, **head.named("head")}
    return head, {key: node.name for key, node in named.items() if node is not None}


def _check(plan: Plan) -> None:
    if plan.num_rows > MAX_ROWS:
        raise Unfit(f"{plan.num_rows} rows are more than {MAX_ROWS}")
    group = plan.num_heads // plan.num_kv_heads
    if group > persistent.MAX_GROUP:
        raise Unfit(f"{group} queries share a key, which is more than {persistent.MAX_GROUP}")
    experts = plan.experts or Experts(0, 0, plan.ffn, False)
    if experts.num > persistent.MAX_EXPERTS or experts.top_k > persistent.MAX_TOP_K:
        raise Unfit(
            f"{experts.top_k} of {experts.num} experts are more than {persistent.MAX_TOP_K} of "
            f"{persistent.MAX_EXPERTS}"
        )
    multiples = {
        "hidden size": (plan.hidden, 64),
        "width of the MLP": (experts.ffn, 64),
        "number of experts": (experts.num, 16),
        "vocabulary": (plan.vocab, 16),
    }
    for name, (size, unit) in multiples.items():
        if size % unit:
            raise Unfit(f"the {name} {size} is not a multiple of {unit}")
    if not math.isfinite(plan.scale):
        raise Unfit(f"the scale of attention is {plan.scale}")
