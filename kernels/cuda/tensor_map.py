"""Descriptions of tensors for the copy unit of sm_90 and later (CUtensorMap)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc

NUM_BYTES = 128
_ALIGNMENT = 64
# cuda.h: CUtensorMapDataType, CUtensorMapSwizzle by the bytes of a row of a box, and
# CUtensorMapL2promotion
_TYPES = {torch.uint8: 0, torch.bfloat16: 9}
_SWIZZLES = {64: 2, 128: 3}
_PROMOTION_256 = 3


def encode(matrix: Tensor, box: tuple[int, int]) -> bytes:
    """The CUtensorMap of a matrix [rows, columns] in boxes [rows, columns], whose rows have 64 or
    128 bytes and are exchanged in shared memory in pieces of 16 bytes. Outside there are zeros.

    Rows begin at multiples of 16 bytes. Raises RuntimeError if the driver refuses it.
    """
    size = matrix.element_size()
    room = ctypes.create_string_buffer(NUM_BYTES + _ALIGNMENT)
    at = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    sizes = (ctypes.c_uint64 * 2)(matrix.shape[1], matrix.shape[0])
    strides = (ctypes.c_uint64 * 1)(matrix.stride(0) * size)
    boxes, ones = (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1)
    nvrtc.check(
        nvrtc.driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _TYPES[matrix.dtype], 2, ctypes.c_void_p(matrix.data_ptr()),
            sizes, strides, boxes, ones, 0, _SWIZZLES[box[1] * size], _PROMOTION_256, 0,
        )
    )  # fmt: skip
    return ctypes.string_at(at, NUM_BYTES)
