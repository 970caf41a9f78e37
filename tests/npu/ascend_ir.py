"""An interpreter of Ascend IR.

It executes the GraphDef that torchair passes to GE op by op on host tensors. An op that is not in
`OPS` is an error. Two dtypes for inputs that must have one are an error as well, because GE
converts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.npu import expert_semantics, hccl, semantics

# Numbers of DataType in ge_ir.proto (tensors) and of ge::DataType (attributes), as CANN publishes.
PROTO_DTYPES = {
    1: torch.float32, 2: torch.float16, 3: torch.int8, 4: torch.uint8, 5: torch.int16,
    7: torch.int32, 8: torch.int64, 11: torch.bool, 12: torch.float64, 27: torch.bfloat16,
}  # fmt: skip
GE_DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8,
    6: torch.int16, 9: torch.int64, 10: torch.uint64, 11: torch.float64, 12: torch.bool,
    27: torch.bfloat16,
}  # fmt: skip


class Attributes:
    """An op's attributes as Python values."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            value = self._op.attr[name]
            kind = value.WhichOneof("value")
            found = getattr(value, kind)
            if kind == "s":
                found = found.decode()
            self._known[name] = list(found.i) if kind == "list" else found
        return self._known[name]

    def get(self, name: str, default: Any) -> Any:
        return self[name] if name in self._op.attr else default


def _same(*tensors: Tensor) -> None:
    assert len({tensor.dtype for tensor in tensors}) == 1, (
        f"dtypes differ: {[tensor.dtype for tensor in tensors]}"
    )


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
        _same(x1, x2)
        return function(x1, x2)

    return run


def _matmul(a: Attributes, x1: Tensor, x2: Tensor, bias: Tensor | None = None) -> Tensor:
    _same(x1, x2)
    left = x1.T if a["transpose_x1"] else x1
    right = x2.T if a["transpose_x2"] else x2
    product = left.float() @ right.float()
    return (product if bias is None else product + bias.float()).to(x1.dtype)


def _matmul_v2(
    a: Attributes, x1: Tensor, x2: Tensor, bias: Tensor | None, offset_w: Tensor | None
) -> Tensor:
    assert offset_w is None and a["offset_x"] == 0, "only products without quantisation"
    return _matmul(a, x1, x2, bias)


def _batch_matmul(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
    _same(x1, x2)
    left = x1.mT if a["adj_x1"] else x1
    right = x2.mT if a["adj_x2"] else x2
    return (left.float() @ right.float()).to(x1.dtype)


def _swish(a: Attributes, x: Tensor) -> Tensor:
    assert a["scale"] == 1.0, "only x · sigmoid(x)"
    return torch.nn.functional.silu(x.float()).to(x.dtype)


def _gather(a: Attributes, x: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
    dim = int(axis)
    assert a["batch_dims"] == 0 and (
        indices.numel() == 0 or 0 <= int(indices.min()) <= int(indices.max()) < x.shape[dim]
    )
    rows = torch.index_select(x, dim, indices.reshape(-1).long())
    return rows.reshape((*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]))


def _strided_slice(
    a: Attributes, x: Tensor, begin: Tensor, end: Tensor, axes: Tensor, strides: Tensor
) -> Tensor:
    assert not any(
        a[f"{name}_mask"] for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    )
    index = [slice(None)] * x.dim()
    bounds = (tensor.reshape(-1).tolist() for tensor in (begin, end, axes, strides))
    for first, last, axis, stride in zip(*bounds, strict=True):
        index[axis] = slice(first, min(last, x.shape[axis]), stride)
    return x[tuple(index)].clone()


def _split(a: Attributes, x: Tensor, sizes: Tensor, dim: Tensor) -> tuple[Tensor, ...]:
    lengths, total = sizes.tolist(), x.shape[int(dim)]
    # one length may be -1
    lengths = [
        total - sum(n for n in lengths if n >= 0) if length == -1 else length for length in lengths
    ]
    return x.split(lengths, int(dim))


def _exp(a: Attributes, x: Tensor) -> Tensor:
    assert (a["base"], a["scale"], a["shift"]) == (-1.0, 1.0, 0.0), "only the natural exponential"
    return torch.exp(x)


def _log(a: Attributes, x: Tensor) -> Tensor:
    assert a["base"] == -1.0, "only the natural logarithm"
    return torch.log(x * a["scale"] + a["shift"])


def _scatter_elements(a: Attributes, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    _same(data, updates)
    assert a["reduction"] == "none" and data.dim() == 1, "used for vectors only"
    out = data.clone()
    for index, update in zip(indices.tolist(), updates):
        out[index] = update
    return out


def _cumsum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    assert not a["exclusive"] and not a["reverse"]
    return torch.cumsum(x, int(axis), dtype=x.dtype)


def _attention(a: Attributes, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    named = dict(zip(ATTENTION_INPUTS, inputs, strict=True))
    used = {
        "query",
        "key0",
        "value0",
        "atten_mask",
        "actual_seq_lengths",
        "actual_seq_lengths_kv",
        "block_table",
    }
    assert all(tensor is None for name, tensor in named.items() if name not in used), (
        "an input that is not modelled"
    )
    lengths = {}
    for name in ("actual_seq_lengths", "actual_seq_lengths_kv"):
        tensor = named[name]
        assert tensor is None or tensor.dtype == torch.int64, f"{name} is {tensor.dtype}"
        lengths[name] = None if tensor is None else tensor.tolist()
    out = semantics.fused_infer_attention_score(
        named["query"], named["key0"], named["value0"], atten_mask=named["atten_mask"],
        block_table=named["block_table"], **{name: a[name] for name in ATTENTION_SETTINGS},
        **lengths,
    )  # fmt: skip
    return out, torch.empty(0)


def _grouped_matmul(a: Attributes, *inputs: Tensor | None) -> Tensor:
    x, weight, *unused, group_list, per_token_scale = inputs
    assert x is not None and weight is not None and group_list is not None
    assert per_token_scale is None and not any(
        tensor.numel() for tensor in unused if tensor is not None
    ), "only products without bias and quantisation"
    assert not (a["transpose_weight"] or a["transpose_x"] or a["act_type"]) and a["dtype"] == -1
    settings = {name: a[name] for name in ("split_item", "group_type", "group_list_type")}
    (y,) = expert_semantics.grouped_matmul([x], [weight], group_list=group_list, **settings)
    return y


def _hcom_all_reduce(a: Attributes, x: Tensor) -> Tensor:
    assert a["reduction"] == "sum" and a["fusion"] == 0
    return hccl.all_reduce(a["group"], x)


def _finalize_routing(a: Attributes, *inputs: Tensor | None) -> Tensor:
    rows, index, skip1, skip2, bias, scales, expert = inputs
    assert rows is not None and index is not None
    return expert_semantics.moe_finalize_routing(
        rows, skip1, skip2, bias, scales, index, expert, a["drop_pad_mode"], a["k"]
    )


INIT_ROUTING_SETTINGS = (
    "active_num", "expert_capacity", "expert_num", "drop_pad_mode", "expert_tokens_num_type",
    "expert_tokens_num_flag", "quant_mode", "active_expert_range", "row_idx_type",
)  # fmt: skip
ATTENTION_SETTINGS = (
    "num_heads",
    "num_key_value_heads",
    "scale",
    "input_layout",
    "sparse_mode",
    "block_size",
)
ATTENTION_INPUTS = (
    "query", "key0", "value0", "pse_shift", "atten_mask", "actual_seq_lengths",
    "actual_seq_lengths_kv", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2",
    "quant_offset2", "antiquant_scale", "antiquant_offset", "block_table", "query_padding_size",
    "kv_padding_size", "key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale",
    "value_antiquant_offset", "key_shared_prefix", "value_shared_prefix",
    "actual_shared_prefix_len", "learnable_sink", "q_start_idx", "kv_start_idx",
)  # fmt: skip

# op type → function (attributes, *inputs in the op's declared order, None for an absent input),
# which returns the result or a tuple of results
OPS: dict[str, Callable[..., Any]] = {
    "Abs": lambda a, x: x.abs(),
    "Add": _binary(torch.add),
    "AddRmsNorm": lambda a, x1, x2, gamma: semantics.add_rms_norm(x1, x2, gamma, a["epsilon"]),
    "ArgMaxV2": lambda a, x, dimension: x.argmax(int(dimension)).to(GE_DTYPES[a["dtype"]]),
    "BatchMatMul": _batch_matmul,
    "BroadcastTo": lambda a, x, shape: x.expand(shape.tolist()).clone(),
    "BitwiseAnd": _binary(torch.bitwise_and),
    "Cast": lambda a, x: x.to(GE_DTYPES[a["dst_type"]]),
    "ClipByValueV2": lambda a, x, low, high: (
        _same(x, low, high),
        torch.minimum(torch.maximum(x, low), high),
    )[1],
    "ConcatV2": lambda a, *inputs: (
        _same(*inputs[:-1]),
        torch.cat(inputs[:-1], dim=int(inputs[-1])),
    )[1],
    "Cos": lambda a, x: torch.cos(x),
    "Cumsum": _cumsum,
    "Equal": _binary(torch.eq),
    "Erf": lambda a, x: torch.erf(x.float()).to(x.dtype),
    "Exp": _exp,
    "Fill": lambda a, dims, value: value.expand(dims.tolist()).clone(),
    "FloorDiv": _binary(torch.floor_divide),
    "FloorMod": _binary(lambda x1, x2: x1 - torch.floor_divide(x1, x2) * x2),
    "FusedInferAttentionScore": _attention,
    "Gelu": lambda a, x: semantics.gelu(x),
    "GatherElements": lambda a, x, index: torch.gather(x, a["dim"], index),
    "GatherV2": _gather,
    "Greater": _binary(torch.gt),
    "GreaterEqual": _binary(torch.ge),
    "GroupedMatmul": _grouped_matmul,
    "HcomAllGather": lambda a, x: hccl.all_gather(a["group"], x, a["rank_size"]),
    "HcomAllReduce": _hcom_all_reduce,
    "Identity": lambda a, x: x.clone(),
    "LayerNormV4": lambda a, x, shape, gamma, beta: semantics.layer_norm(
        x, shape.tolist(), gamma, beta, a["epsilon"]
    ),
    "Less": _binary(torch.lt),
    "Log": _log,
    "Log1p": lambda a, x: torch.log1p(x),
    "LogicalAnd": _binary(torch.logical_and),
    "LogicalNot": lambda a, x: torch.logical_not(x),
    "LogicalOr": _binary(torch.logical_or),
    "MatMul": _matmul,
    "MatMulV2": _matmul_v2,
    "MoeFinalizeRoutingV2": _finalize_routing,
    "MoeGatingTopKSoftmax": lambda a, x, finished: expert_semantics.moe_gating_top_k_softmax(
        x, finished, a["k"]
    ),
    "MoeInitRoutingV3": lambda a, x, expert_idx, scale, offset: (
        expert_semantics.moe_init_routing_v2(
            x,
            expert_idx,
            scale=scale,
            offset=offset,
            **{name: a[name] for name in INIT_ROUTING_SETTINGS},
        )
    ),
    "Mul": _binary(torch.mul),
    "Neg": lambda a, x: -x,
    "NotEqual": _binary(torch.ne),
    "Pack": lambda a, *inputs: (_same(*inputs), torch.stack(inputs, dim=a["axis"]))[1],
    "Range": lambda a, start, limit, delta: torch.arange(
        start.item(), limit.item(), delta.item(), dtype=limit.dtype
    ),
    "Pow": _binary(torch.pow),
    "RealDiv": _binary(torch.true_divide),
    "Reciprocal": lambda a, x: torch.reciprocal(x),
    "ReduceAny": lambda a, x, axes: x.any(int(axes), keepdim=a["keep_dims"]),
    "ReduceMean": lambda a, x, axes: x.mean(axes.reshape(-1).tolist(), keepdim=a["keep_dims"]),
    "ReduceSum": lambda a, x, axes: x.sum(
        axes.reshape(-1).tolist(), keepdim=a["keep_dims"], dtype=x.dtype
    ),
    "Relu": lambda a, x: torch.relu(x),
    "Reshape": lambda a, x, shape: x.reshape(shape.tolist()),
    "Rsqrt": lambda a, x: torch.rsqrt(x),
    "RmsNorm": lambda a, x, gamma: semantics.rms_norm(x, gamma, a["epsilon"]),
    "RotaryMul": lambda a, x, r1, r2: semantics.rotary_mul(x, r1, r2),
    "ScatterElements": _scatter_elements,
    "ScatterNdUpdate": lambda a, var, indices, updates: semantics.scatter_nd_update(
        var, indices, updates
    ),
    "SelectV2": lambda a, condition, then, other: (
        _same(then, other),
        torch.where(condition, then, other),
    )[1],
    "Sin": lambda a, x: torch.sin(x),
    "Sigmoid": lambda a, x: torch.sigmoid(x.float()).to(x.dtype),
    "Shape": lambda a, x: torch.tensor(x.shape, dtype=GE_DTYPES[a["dtype"]]),
    "SplitV": _split,
    "Squeeze": lambda a, x: x.squeeze(a["axis"]) if a["axis"] else x.squeeze(),
    "StridedSliceV2": _strided_slice,
    "Sub": _binary(torch.sub),
    "SwiGlu": lambda a, x: semantics.swiglu(x, a["dim"]),
    "Swish": _swish,
    "TensorMove": lambda a, x: x.clone(),
    "Transpose": lambda a, x, perm: x.permute(perm.tolist()),
    "Unpack": lambda a, x: (
        x.unbind(a["axis"]) if a["num"] == x.shape[a["axis"]] else _unsupported("another number")
    ),
    "Unsqueeze": lambda a, x: (
        x.unsqueeze(a["axes"][0]) if len(a["axes"]) == 1 else _unsupported("Unsqueeze of two axes")
    ),
    "ZerosLike": lambda a, x: torch.zeros_like(x),
}
STRUCTURE = ("Data", "Const", "NetOutput")  # handled by `Program`


def _unsupported(what: str) -> Any:
    raise NotImplementedError(what)


def constant(op: Any) -> Tensor:
    """The value of a Const op."""
    value = op.attr["value"].t
    dtype, shape = PROTO_DTYPES[value.desc.dtype], list(value.desc.shape.dim)
    if not value.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(shape)


Observer = Callable[[Any, Sequence["Tensor | None"]], None]


class Call(NamedTuple):
    """An op that computes."""

    op: Any
    type: str
    name: str
    function: Callable[..., Any]
    attributes: Attributes
    inputs: list[str]


class Program:
    """A graph, read once: reading it took most of the time of a run."""

    def __init__(self, graph: Any) -> None:
        missing = {op.type for op in graph.op} - {*OPS, *STRUCTURE}
        assert not missing, f"ops without a meaning: {missing}"
        self._data: list[tuple[str, int]] = []
        self._constants: dict[str, Tensor] = {}
        self._calls: list[Call] = []
        self._outputs: list[str] | None = None
        for op in graph.op:
            # :-1 marks an edge of order, not of data
            names = [name for name in op.input if not name.endswith(":-1")]
            if op.type == "Data":
                self._data.append((f"{op.name}:0", op.attr["index"].i))
            elif op.type == "Const":
                self._constants[f"{op.name}:0"] = constant(op)
            elif op.type == "NetOutput":
                self._outputs = names
                break
            else:
                call = Call(op, op.type, op.name, OPS[op.type], Attributes(op), names)
                self._calls.append(call)

    def run(self, inputs: Sequence[Tensor], observe: Observer | None = None) -> list[Tensor]:
        """Execute it on host tensors; returns the outputs of the net.

        Ops with a reference input change it in place. `observe(op, inputs)` is called before each
        op that computes.
        """
        if self._outputs is None:
            raise ValueError("the graph has no NetOutput")
        values: dict[str, Any] = {name: value.clone() for name, value in self._constants.items()}
        values.update((name, inputs[index]) for name, index in self._data)
        for op, op_type, op_name, function, attributes, names in self._calls:
            arguments = [values[name] if name else None for name in names]
            if observe is not None:
                observe(op, arguments)
            try:
                results = function(attributes, *arguments)
            except Exception as error:
                raise type(error)(f"{op_type} {op_name}: {error}") from error
            for index, result in enumerate(results if isinstance(results, tuple) else (results,)):
                values[f"{op_name}:{index}"] = result
        return [values[name] for name in self._outputs]
