"""Copies of rows as calls of the C++ library, for steps that are recorded.

torch takes 10 to 30 us for each copy, a call of the library less than one.

Each function copies as torch does, and returns False, having done nothing, for tensors that it does
not cover: different dtypes or shapes, gaps between columns, tensors with gaps of more than two
dimensions, and indices other than contiguous int64. Nothing checks numbers of rows here; the call
refuses one that is not there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cpu.step import COPY_ROWS, load


class _Rows(NamedTuple):
    """num rows of num_bytes each; the next one begins `step` bytes later."""

    num: int
    num_bytes: int
    step: int


def copy(out: Tensor, x: Tensor) -> bool:
    """`out.copy_(x)`."""
    if out.dtype is not x.dtype or out.shape != x.shape:
        return False
    to, from_ = _rows(out), _rows(x)
    if out.is_contiguous() and x.is_contiguous():
        num_bytes = x.numel() * x.element_size()
        to = from_ = _Rows(1, num_bytes, num_bytes)
    if to is None or from_ is None:
        return False
    return _call(out, to, None, x, from_, None)


def gather(out: Tensor, x: Tensor, row_R: Tensor) -> bool:
    """`torch.index_select(x, 0, row_R, out=out)`."""
    to, from_ = _rows_of_first(out), _rows_of_first(x)
    if out.dtype is not x.dtype or to is None or from_ is None or not _is_index(row_R):
        return False
    return _call(out, to, None, x, from_, row_R)


def scatter(out: Tensor, row_R: Tensor, x: Tensor) -> bool:
    """`out.index_copy_(0, row_R, x)`."""
    to, from_ = _rows_of_first(out), _rows_of_first(x)
    if out.dtype is not x.dtype or to is None or from_ is None or not _is_index(row_R):
        return False
    return _call(out, to, row_R, x, from_, None)


def _rows(x: Tensor) -> _Rows | None:
    size = x.element_size()
    if x.dim() == 1:
        return _Rows(x.shape[0], size, x.stride(0) * size)
    if x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1):
        return _Rows(x.shape[0], x.shape[1] * size, x.stride(0) * size)
    return None


def _rows_of_first(x: Tensor) -> _Rows | None:
    """Those along the first dimension."""
    if x.dim() == 2:
        return _rows(x)
    if not x.dim() or not x.is_contiguous() or not x.numel():
        return None
    num_bytes = x[0].numel() * x.element_size()
    return _Rows(x.shape[0], num_bytes, num_bytes)


def _is_index(row_R: Tensor) -> bool:
    return row_R.dtype is torch.int64 and row_R.dim() == 1 and row_R.is_contiguous()


def _call(
    out: Tensor, to: _Rows, to_R: Tensor | None, x: Tensor, from_: _Rows, from_R: Tensor | None
) -> bool:
    if to.num_bytes != from_.num_bytes:
        return False
    index = to_R if to_R is not None else from_R
    num = to.num if index is None else index.shape[0]
    arguments = COPY_ROWS.pack(
        out.data_ptr(),
        x.data_ptr(),
        0 if to_R is None else to_R.data_ptr(),
        0 if from_R is None else from_R.data_ptr(),
        num,
        to.num_bytes,
        to.step,
        from_.step,
        to.num,
        from_.num,
    )
    if not load().nanovllm_copy_rows(arguments):
        raise IndexError(f"a row is not among those of {list(out.shape)} or {list(x.shape)}")
    return True
