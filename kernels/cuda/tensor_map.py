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


def encode(tensor: Tensor, box: tuple[int, ...]) -> bytes:
    """The CUtensorMap of a tensor in boxes with as many dimensions, whose last one has 64 or 128
    bytes. In shared memory pieces of 16 bytes of a line are exchanged. Outside there are zeros.

    Lines begin at multiples of 16 bytes. Raises RuntimeError if the driver refuses it.
    """
    size, num_dims = tensor.element_size(), tensor.dim()
    room = ctypes.create_string_buffer(NUM_BYTES + _ALIGNMENT)
    at = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    sizes = (ctypes.c_uint64 * num_dims)(*reversed(tensor.shape))
    strides = [stride * size for stride in reversed(tensor.stride()[:-1])]
    boxes = (ctypes.c_uint32 * num_dims)(*reversed(box))
    ones = (ctypes.c_uint32 * num_dims)(*(1 for _ in box))
    nvrtc.check(
        nvrtc.driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _TYPES[tensor.dtype], num_dims, ctypes.c_void_p(tensor.data_ptr()),
            sizes, (ctypes.c_uint64 * len(strides))(*strides), boxes, ones, 0,
            _SWIZZLES[box[-1] * size], _PROMOTION_256, 0,
        )
    )  # fmt: skip
    return ctypes.string_at(at, NUM_BYTES)
