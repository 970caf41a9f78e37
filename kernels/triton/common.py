"""Shared by the Triton kernels: facts about the device, launch options, and device functions.

Code with NVIDIA instructions is guarded by `target_info.is_cuda()`, which the compiler decides; AMD
and the interpreter use plain Triton instead. The constant PDL asks for programmatic dependent
launch; only `launch_options` sets it.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from nanovllm.kernels import reference

# A score that no key reaches. It is finite, because inf − inf is NaN.
NO_SCORE = tl.constexpr(-1.0e30)
LOG2_E = 1.4426950408889634
FP8_MAX = tl.constexpr(reference.rope_store.FP8_MAX)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """a @ b + acc in fp32. UPCAST is for the interpreter, which multiplies bf16 as raw integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))


@triton.jit
def to_fp8(x, scale):
    """x · (1 / scale) in float8_e4m3fn, to nearest even.

    It saturates, so that finite values do not become NaN.
    """
    y = tl.clamp(
        x.to(tl.float32) * (1.0 / scale), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL
    )
    if INTERPRETED:
        # The interpreter's conversion drops the carry of a mantissa that rounds up, so the value is
        # rounded here: normal numbers to their upper 12 bits, smaller ones to multiples of 2⁻⁹. NaN
        # needs all three mantissa bits.
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        rounded = tl.where(y == y, rounded, 0x7FF00000)
        y = tl.where(
            tl.abs(y) < 0.015625, (y + 24576.0) - 24576.0, rounded.to(tl.float32, bitcast=True)
        )
    return y.to(tl.float8e4nv)


@triton.jit
def to_fp16(x, UPCAST: tl.constexpr):
    """bf16 in fp16, saturated.

    Products with an fp8 cache are in fp16: it holds keys and values exactly, and one conversion
    makes two of them where bf16 takes three. Queries above 65504 saturate; no product bears such
    queries anyway.
    """
    if x.dtype == tl.bfloat16 and not UPCAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; shl.b32 low, $1, 16; and.b32 high, $1, 0xffff0000;"
            " cvt.rn.satfinite.f16x2.f32 $0, high, low; }",
            "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x


@triton.jit
def from_fp8(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float8_e4m3fn in `dtype`, exactly."""
    if UPCAST:
        # the interpreter reads NaN as 480
        is_nan = (x.to(tl.int8, bitcast=True) & 0x7F) == 0x7F
        return tl.where(is_nan, float("nan"), x.to(tl.float32)).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def from_fp8_in_place(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """The same, four at a time for fp16, in the layout in which x was loaded.

    Use it for operands that are summed along rows: the values. The loads for the matrix units
    transpose 16 bits at a time. The compiler moves a pure conversion behind this change of layout
    and then reads 8-bit values one byte at a time, with an instruction each. It does not move
    assembly that is not pure.
    """
    if UPCAST or dtype != tl.float16:
        return from_fp8(x, dtype, UPCAST)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r", [x.to(tl.int8, bitcast=True)], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def exp2(x, UPCAST: tl.constexpr):
    """2^x by the hardware's approximation.

    `tl.exp2` adds three instructions for results below 2^-126.
    """
    if UPCAST or not target_info.is_cuda():
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_index(ptr, UPCAST: tl.constexpr):
    """One int32 that addresses depend on, loaded so that the pipeliner treats it as arithmetic.

    A plain load would get pipeline stages of its own, and the loads of keys and values behind it
    fewer: with three stages one tile in flight instead of two. The compiler may move this load, so
    its address must depend on a value that is loaded after `wait_for_earlier_kernels`.
    """
    if UPCAST or not target_info.is_cuda():
        return tl.load(ptr)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [ptr], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def load_sinks(at, mask):
    """The sinks of heads, as exponents of 2; 0 where `mask` is false."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def wait_for_earlier_kernels(PDL: tl.constexpr, EARLY: tl.constexpr = False):
    """Waits until the results of earlier kernels are visible.

    Call it before the first memory access.

    With programmatic dependent launch (sm_90), the programs of a kernel are placed while the kernel
    before it still runs, and wait here. Every program must call this: if all programs of a kernel
    skipped the wait, the kernel could end before its predecessor, and its successor would start too
    early.

    The successor may be placed after the wait or, if EARLY, before it. In a chain of short kernels
    EARLY lets a product load its first weights while two kernels before it still run. It is faster
    for steps of one row and slower for 8 rows.
    """
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def finish(y, up, dtype: tl.constexpr, SILU_MUL: tl.constexpr, ALPHA: tl.constexpr = 0.0,
           LIMIT: tl.constexpr = 0.0):  # fmt: skip
    """A product's result in its dtype: y, or silu(y) · up. Rounds where the reference rounds.

    With a LIMIT above 0 it is `reference.norm_act.clamped_swiglu` in place of SiLU, and below 0
    `reference.norm_act.gelu_mul`.
    """
    if LIMIT < 0:
        y = y.to(dtype).to(tl.float32)
        # y/2 · (1 + tanh(u)) is y · sigmoid(2u)
        twice_u = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        y = (y / (1.0 + tl.exp(-twice_u))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    elif LIMIT > 0:
        y = tl.minimum(y.to(dtype).to(tl.float32), LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up.to(dtype).to(tl.float32), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = (up + 1.0) * y / (1.0 + tl.exp(-ALPHA * y))
    elif SILU_MUL:
        y = y.to(dtype).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    return y.to(dtype)


class Clamp(NamedTuple):
    """What replaces SiLU between the products of experts, and their biases: see `finish`. There may
    be no biases."""

    gate_up_bias_EG: Tensor
    down_bias_ED: Tensor
    alpha: float
    limit: float


NO_CLAMP = Clamp(None, None, 0.0, 0.0)  # type: ignore[arg-type]
GELU = Clamp(None, None, 0.0, -1.0)  # type: ignore[arg-type]


class Places(NamedTuple):
    """Where the matrices of offloaded experts are: see `reference.offload.offloaded_experts`."""

    num_experts: int
    first_1: Tensor
    slot_I: Tensor
    others_gate_up: Tensor
    others_down: Tensor


@triton.jit
def local_expert(local_ptr, expert, EXPERT_PARALLEL: tl.constexpr):
    """The places of experts among the matrices that are here; negative for those elsewhere.

    Unless EXPERT_PARALLEL all are here, in their order. A negative number stays negative.
    """
    if EXPERT_PARALLEL:
        expert = tl.load(local_ptr + expert, mask=expert >= 0, other=-1)
    return expert


@triton.jit
def expert_at(weight_ptr, others_ptr, first_ptr, slot_ptr, expert, SIZE: tl.constexpr,
              OFFLOADED: tl.constexpr):  # fmt: skip
    """Where the matrix of an expert begins, of SIZE elements.

    It is a matrix of the weights or, if OFFLOADED, in a slot or of the others (see `Places`).
    """
    if OFFLOADED:
        slot = tl.load(slot_ptr + tl.load(first_ptr) + expert).to(tl.int64)
        return tl.where(slot >= 0, weight_ptr + slot * SIZE, others_ptr + (-1 - slot) * SIZE)
    else:
        return weight_ptr + expert.to(tl.int64) * SIZE


@triton.jit
def prefetch_rows(row_at, FIRST: tl.constexpr, END: tl.constexpr, LINES_P: tl.constexpr):
    """Prefetches columns FIRST … END − 1 of rows that begin at `row_at` into the L2.

    Elements have 2 bytes; a line has 128 bytes.
    """
    line = FIRST + tl.arange(0, LINES_P) * 64
    address = (row_at[:, None] + tl.minimum(line, END - 1)[None, :]).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_and_wait(
    weight_at, up_rows, FIRST: tl.constexpr, END: tl.constexpr, LINES_P: tl.constexpr,
    SILU_MUL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With PDL prefetches rows of weights as `prefetch_rows` does, unless LINES_P is 0, and waits
    for earlier kernels.

    With SILU_MUL it prefetches the rows `up_rows` elements further on, too: those of up.
    """
    if PDL:
        if LINES_P > 0:
            prefetch_rows(weight_at, FIRST, END, LINES_P)
            if SILU_MUL:
                prefetch_rows(weight_at + up_rows, FIRST, END, LINES_P)
        tl.extra.cuda.gdc_wait()


def padded_rows(num_rows: int) -> int:
    """A power of two of at least num_rows + 2; few values, so that few kernels are compiled."""
    return next(
        (rows for rows in (16, 64, 512) if num_rows + 2 <= rows),
        triton.next_power_of_2(num_rows + 2),
    )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 8 in the interpreter, so that work is divided there, too."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 8
    )


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """The most shared memory that one program may use."""
    if device.type != "cuda":
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # the stubs lack the fields
    if torch.version.hip is not None:  # a block cannot opt in to more
        return int(getattr(properties, "shared_memory_per_block", 64 * 1024))
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """True if Triton uses the device's matrix units. It does not use those of Turing (sm_75)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of every launch, including the constant PDL."""
    # an AMD gfx942 has capability 9.4
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


# The arrival counters must be zero before a launch, and the launch leaves them zero. They outlive
# the calls, because a fill before each launch would cost as much as the launch. Launches that share
# counters must not run at the same time, so each stream has its own. A graph uses those of the
# stream of its capture: give engines that run side by side one stream each.
_MAX_STREAMS = 128
_COUNTERS_PER_STREAM = 4096
_counters: dict[torch.device, Tensor] = {}
_stream_slots: dict[tuple[torch.device, int], int] = {}
counters_are_fake = False  # True while a dry run records launches without a device


def arrival_counters(device: torch.device, num_counters: int) -> Tensor:
    """Zeroed int32 counters of the device's current stream."""
    if device.type != "cuda" or counters_are_fake:
        return torch.zeros(num_counters, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _counters and not capturing:
        _counters[device] = torch.zeros(
            _MAX_STREAMS, _COUNTERS_PER_STREAM, dtype=torch.int32, device=device
        )
        torch.cuda.synchronize(device)  # once per process: other streams may use them next
    stream = (device, torch.cuda.current_stream(device).cuda_stream)
    slot = _stream_slots.setdefault(stream, len(_stream_slots))
    if device not in _counters or slot >= _MAX_STREAMS or num_counters > _COUNTERS_PER_STREAM:
        # correct, but adds a fill to every launch and replay
        return torch.zeros(num_counters, dtype=torch.int32, device=device)
    return _counters[device][slot]
