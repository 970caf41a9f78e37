"""Products of weights in packed codes and in fp8: `packed.cpp`, called as in `library.py`.

Rows of x are quantized to int8 with a scale for each block of 32 inputs, as llama.cpp does, and
multiplied with the codes as integers: an input changes by at most 1/254 of the largest magnitude in
its block, whatever the dtype of x. Weights whose levels are not small integers times a scale (nf4,
fp8, tables of 8 bits, groups that cut 16 columns) are dequantized to fp32, and inputs stay as they
are. With bf16 and many tokens, all weights are rounded to bf16 instead. `configure(exact=True)`
keeps inputs as they are, and weights in fp32.

The library is compiled or loaded at the first call, so other models never wait for it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import weakref
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from nanovllm.kernels import ops, reference
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu import library as cpu_library

BLOCK = 32
INTERLEAVED = reference.packed.INTERLEAVED  # rows
INPUT_CODES = {torch.float32: 0, torch.bfloat16: 1}

# bf16: from so many tokens on, blocks of weights are dequantized to bf16 for torch's product, so
# many bytes at a time that they stay in a cache. Products of integers are fast for longer.
_WIDEN_TOKENS, _WIDEN_INTEGER_TOKENS, _WIDEN_BYTES = 17, 64, 4 << 20

PACKED = build.ArgumentStruct(
    "Packed",
    pointers="out x expert code scale offset table bias residual",
    integers="num_pairs x_repeats num_experts num_outputs depth x_stride code_stride_E code_stride "
    "scale_stride_E scale_stride offset_stride_E offset_stride num_groups group block_rows bits "
    "is_fp8 exact scale_dtype offset_dtype dtype num_threads ordered interleaved",
)


class _State:
    exact: ClassVar[bool] = False


def are_exact() -> bool:
    """Whether inputs are never quantized."""
    return _State.exact


def configure(exact: bool) -> None:
    """With `exact`, inputs are never quantized: products are as exact as fp32, and slower."""
    _State.exact = exact


@functools.cache
def _load() -> ctypes.CDLL:
    """Compile the library or find it in the cache, and load it. Raises as `build.load` does."""
    library = build.load(Path(__file__).with_suffix(".cpp"), (PACKED,))
    for name in (
        "packed_linear",
        "packed_is_integer",
        "packed_is_faster_interleaved",
        "packed_lookup",
        "widen_packed",
    ):
        function = getattr(library, f"nanovllm_{name}")
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    cpu_library.lend_threads(cpu_library.load(), library)
    return library


class Weight(NamedTuple):
    """Codes [O, C], scales and offsets [O, G] (those of fp8 for blocks of rows), or of experts.
    Rows may be interleaved: see `reference.packed`."""

    code: Tensor
    scale: Tensor | None  # None: in the blocks of codes
    offset: Tensor | None
    table: Tensor | None
    bits: int
    group: int
    block_rows: int = 1
    is_fp8: bool = False

    @property
    def is_interleaved(self) -> bool:
        return reference.packed.is_interleaved(self.code)

    @property
    def num_outputs(self) -> int:
        return reference.packed.num_rows(self.code)

    def fits(self, depth: int) -> bool:
        """True if the kernel reads these tensors as they are."""
        code, scale, offset, table, bits, group, block_rows, is_fp8 = self
        num_bytes, num_groups = code.shape[-1], -(-depth // group)
        shape = (*code.shape[:-2], -(-self.num_outputs // block_rows), num_groups)
        if self.is_interleaved:
            tensors = [one for one in (code, scale, offset) if one is not None]
            if not all(one.is_contiguous() for one in tensors):
                return False
            num_bytes, shape = code.shape[-3] * 4, (*code.shape[:-3], num_groups, INTERLEAVED)
        return (
            code.dtype is (torch.float8_e4m3fn if is_fp8 else torch.uint8)
            and code.stride(-1) == 1
            and num_bytes >= (depth if bits == 8 else -(-depth // BLOCK) * (BLOCK // 2))
            and bits in (4, 8)
            and (table is None or table.shape == (2**bits,))
            and scale is not None
            and _are_scales(scale, shape)
            and (offset is None or _are_scales(offset, shape))
        )

    def with_table(self) -> Weight:
        """The table in fp32."""
        table = self.table
        if table is None or (table.dtype is torch.float32 and table.is_contiguous()):
            return self
        return self._replace(table=table.float().contiguous())

    def rows(self, first: int, end: int) -> Weight:
        """Some outputs; `first` begins a block of rows, or of those that are interleaved."""
        together = INTERLEAVED if self.is_interleaved else self.block_rows
        blocks = slice(first // together, -(-end // together))
        return self._replace(
            code=self.code[blocks if self.is_interleaved else slice(first, end)],
            scale=None if self.scale is None else self.scale[blocks],
            offset=None if self.offset is None else self.offset[blocks],
        )


def _are_scales(scale: Tensor, shape: tuple[int, ...]) -> bool:
    return (
        scale.dtype in cpu_library.DTYPE_CODES
        and scale.shape == shape
        and (scale.stride(-1) == 1 or shape[-1] == 1)
    )


class _Layout(NamedTuple):
    """The numbers that a product needs to know of a weight, beside its addresses: `sizes` from
    code_stride_E to is_fp8, and the codes of the dtypes of scales and offsets."""

    num_outputs: int
    sizes: tuple[int, ...]
    dtypes: tuple[int, int]


def _layout(weight: Weight) -> _Layout:
    code, scale, offset, _, bits, group, block_rows, is_fp8 = weight
    by_16 = weight.is_interleaved
    strides, dtypes, num_groups = [*_strides(code, -4 if by_16 else -2)], [], 0
    for one in (scale, offset):
        strides += (0, 0) if one is None else _strides(one, -3 if by_16 else -2)
        dtypes.append(0 if one is None else cpu_library.DTYPE_CODES[one.dtype])
    if scale is not None:
        num_groups = scale.shape[-2 if weight.is_interleaved else -1]
    sizes = (*strides, num_groups, group, block_rows, bits, is_fp8)
    return _Layout(weight.num_outputs, sizes, (dtypes[0], dtypes[1]))


def _strides(tensor: Tensor, axis: int) -> tuple[int, int]:
    """From expert to expert, and from row to row: an entry of the axis is a row, or 16 of them."""
    num_rows = 1 if axis == -2 else INTERLEAVED
    return (tensor.stride(0) if tensor.dim() > -axis else 0), tensor.stride(axis) // num_rows


class _Known(NamedTuple):
    code: weakref.ref[Tensor]
    others: tuple[Tensor | None, ...]  # scale, offset and table
    sizes: tuple[int, ...]
    layout: _Layout | None


_known: dict[int, _Known] = {}  # by the id of the codes, as long as they live


def _layout_if_fits(weight: Weight, depth: int) -> _Layout | None:
    """The layout of a weight that the kernel reads as it is, else None. It is computed once, since
    that takes as long as a small product."""
    key, others, sizes = id(weight.code), weight[1:4], (depth, *weight[4:])
    known = _known.get(key)
    if (
        known is not None
        and known.code() is weight.code
        and known.sizes == sizes
        and all(map(operator.is_, known.others, others))
    ):
        return known.layout
    found = _layout(weight) if weight.fits(depth) else None
    code = weakref.ref(weight.code, lambda _: _known.pop(key, None))
    _known[key] = _Known(code, others, sizes, found)
    return found


def arguments_of(
    out: Tensor,
    x: Tensor,
    expert_TK: Tensor | None,
    weight: Weight,
    depth: int,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    layout: _Layout | None = None,
    *,
    ordered: bool = False,
) -> bytes:
    code, scale, offset, table = weight[:4]
    num_outputs, sizes, dtypes = _layout(weight) if layout is None else layout
    repeats, num_pairs, num_experts = 1, x.shape[0], 1
    if expert_TK is not None:
        repeats = expert_TK.shape[1] if x.dim() == 2 else 1
        num_pairs, num_experts = expert_TK.numel(), code.shape[0]
    return PACKED.pack(
        out.data_ptr(),
        x.data_ptr(),
        0 if expert_TK is None else expert_TK.data_ptr(),
        code.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        0 if table is None else table.data_ptr(),
        0 if bias_O is None else bias_O.data_ptr(),
        0 if residual_TO is None else residual_TO.data_ptr(),
        num_pairs,
        repeats,
        num_experts,
        num_outputs,
        depth,
        x.stride(-2),
        *sizes,
        _State.exact,
        *dtypes,
        INPUT_CODES[x.dtype],
        torch.get_num_threads(),
        ordered,
        weight.is_interleaved,
    )


def prefers_interleaved(weight: Weight, depth: int) -> bool:
    """Whether products with these rows are faster if they are interleaved."""
    weight = weight.with_table()
    if weight.is_interleaved or not weight.fits(depth):
        return False
    unread = weight.code.new_empty((1, depth), dtype=torch.float32)
    arguments = arguments_of(unread, unread, None, weight, depth)
    return bool(_load().nanovllm_packed_is_faster_interleaved(arguments))


def is_dense(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype is dtype and tensor.is_contiguous())


def product(
    x_TD: Tensor,
    weight: Weight,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    *,
    ordered: bool = False,
) -> Tensor | None:
    """None if the kernel does not cover these tensors. If `ordered`, any number of rows takes the
    kernel of few."""
    num_tokens, depth = x_TD.shape if x_TD.dim() == 2 else (0, 0)
    if not num_tokens or x_TD.dtype not in INPUT_CODES or not is_dense(bias_O, x_TD.dtype):
        return None
    weight = weight.with_table()
    layout = _layout_if_fits(weight, depth)
    if layout is None or not depth:
        return None
    if residual_TO is not None:
        if residual_TO.dtype is not x_TD.dtype or residual_TO.shape != (
            num_tokens, layout.num_outputs,
        ):  # fmt: skip
            return None
        residual_TO = residual_TO.contiguous()
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    out_TO = x_TD.new_empty((num_tokens, layout.num_outputs))
    arguments = arguments_of(
        out_TO, x_TD, None, weight, depth, bias_O, residual_TO, layout, ordered=ordered
    )
    if (
        x_TD.dtype is torch.bfloat16
        and not ordered
        and num_tokens >= _WIDEN_TOKENS
        and not _State.exact
        and (
            num_tokens >= _WIDEN_INTEGER_TOKENS or not _load().nanovllm_packed_is_integer(arguments)
        )
    ):
        _widened_product(out_TO, x_TD, weight, bias_O)
        return out_TO if residual_TO is None else out_TO.add_(residual_TO)
    _load().nanovllm_packed_linear(arguments)
    return out_TO


def _widened_product(out_TO: Tensor, x_TD: Tensor, weight: Weight, bias_O: Tensor | None) -> None:
    """Blocks of weights are rounded to bf16 for torch's product."""
    depth, num_outputs = x_TD.shape[1], out_TO.shape[1]
    padded = depth + -depth % BLOCK  # see cpu.linear: oneDNN reads past the end of other rows
    if padded != depth:
        x_TD = torch.nn.functional.pad(x_TD, (0, padded - depth))
    step = max(64, _WIDEN_BYTES // (2 * padded))
    together = math.lcm(weight.block_rows, INTERLEAVED)
    step = -(-step // together) * together
    widened_OD = torch.zeros((min(step, num_outputs), padded), dtype=torch.bfloat16)
    for first in range(0, num_outputs, step):
        end = min(first + step, num_outputs)
        part = widened_OD[: end - first]
        _load().nanovllm_widen_packed(
            arguments_of(part, part, None, weight.rows(first, end), depth)
        )
        bias = None if bias_O is None else bias_O[first:end]
        out_TO[:, first:end] = torch.nn.functional.linear(x_TD, part, bias)


def packed_lookup(
    row_T: Tensor,
    code_VC: Tensor,
    scale_VG: Tensor,
    offset_VG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    depth: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.packed.packed_lookup`; raises IndexError for a row that is not there."""
    weight = Weight(code_VC, scale_VG, offset_VG, table, bits, group).with_table()
    layout = _layout_if_fits(weight, depth)
    if layout is None or dtype not in INPUT_CODES or row_T.dim() != 1:
        return reference.packed.packed_lookup(
            row_T, code_VC, scale_VG, offset_VG, table, bits, group, depth, dtype
        )
    out_TD = torch.empty((len(row_T), depth), dtype=dtype)
    row_T = row_T.to(torch.int32).contiguous()
    if len(row_T) and not _load().nanovllm_packed_lookup(
        arguments_of(out_TD, out_TD, row_T.unsqueeze(1), weight, depth, layout=layout)
    ):
        raise missing_row(row_T, weight.num_outputs)
    return out_TD


def missing_row(row_T: Tensor, num_rows: int) -> IndexError:
    low, high = int(row_T.min()), int(row_T.max())
    return IndexError(f"rows {low} to {high} are read, and there are {num_rows}")


def packed_linear(
    x_TD: Tensor,
    code_OC: Tensor,
    scale_OG: Tensor,
    offset_OG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.packed.packed_linear`, with x quantized to int8 where the module says so."""
    weight = Weight(code_OC, scale_OG, offset_OG, table, bits, group)
    out_TO = product(x_TD, weight, bias_O, residual_TO)
    if out_TO is None:
        out_TO = reference.packed.packed_linear(
            x_TD, code_OC, scale_OG, offset_OG, table, bits, group, bias_O, residual_TO
        )
    return out_TO


def fp8_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_RG: Tensor,
    block_rows: int,
    block_columns: int,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`reference.packed.fp8_linear`; inputs are not quantized.

    With many tokens and bf16, weights times their scales are rounded to bf16.
    """
    weight = of_fp8(weight_OD, scale_RG, block_rows, block_columns)
    out_TO = product(x_TD, weight, bias_O, residual_TO)
    if out_TO is None:
        out_TO = reference.packed.fp8_linear(
            x_TD, weight_OD, scale_RG, block_rows, block_columns, bias_O, residual_TO
        )
    return out_TO


def of_fp8(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Weight:
    return Weight(weight, scale, None, None, 8, block_columns, block_rows, is_fp8=True)


def packed_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    code_EOC: Tensor,
    scale_EOG: Tensor,
    offset_EOG: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """`reference.packed.packed_expert_linear`; raises IndexError for an expert not there."""
    weight = Weight(code_EOC, scale_EOG, offset_EOG, table, bits, group)
    out_TKO = _expert_product(x, expert_TK, weight)
    if out_TKO is None:
        out_TKO = reference.packed.packed_expert_linear(
            x, expert_TK, code_EOC, scale_EOG, offset_EOG, table, bits, group
        )
    return out_TKO


def fp8_expert_linear(
    x: Tensor,
    expert_TK: Tensor,
    weight_EOD: Tensor,
    scale_ERG: Tensor,
    block_rows: int,
    block_columns: int,
) -> Tensor:
    """`reference.packed.fp8_expert_linear`; raises IndexError for an expert that is not there."""
    weight = of_fp8(weight_EOD, scale_ERG, block_rows, block_columns)
    out_TKO = _expert_product(x, expert_TK, weight)
    if out_TKO is None:
        out_TKO = reference.packed.fp8_expert_linear(
            x, expert_TK, weight_EOD, scale_ERG, block_rows, block_columns
        )
    return out_TKO


def _expert_product(x: Tensor, expert_TK: Tensor, weight: Weight) -> Tensor | None:
    depth = x.shape[-1]
    if not x.numel() or x.dtype not in INPUT_CODES or not weight.fits(depth):
        return None
    x, expert_TK = x.contiguous(), expert_TK.to(torch.int32).contiguous()
    weight = weight.with_table()
    out_TKO = x.new_empty((*expert_TK.shape, weight.num_outputs))
    if not _load().nanovllm_packed_linear(arguments_of(out_TKO, x, expert_TK, weight, depth)):
        refuse(expert_TK, len(weight.code))
    return out_TKO


def refuse(expert_TK: Tensor, num_experts: int) -> NoReturn:
    low, high = int(expert_TK.min()), int(expert_TK.max())
    raise IndexError(f"experts {low} to {high} are chosen, and there are {num_experts}")


KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        packed_linear,
        packed_lookup,
        packed_expert_linear,
        fp8_linear,
        fp8_expert_linear,
    )
}


def register() -> None:
    """Make these the ops' CPU kernels. Later calls do nothing."""
    ops.register_kernels("CPU", KERNELS)
