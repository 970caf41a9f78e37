"""A decode step of a model in bf16 as one kernel: tasks and launch of persistent.cu."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.cuda.nvrtc import Function, Launch

# As in persistent.cu.
END, EMBED, PRODUCT, ATTEND, MERGE = range(5)
KINDS = "end", "embed", "product", "attend", "merge"
SILU, HALF, NORM, ADD, LOGITS, EXPERT, OF_FP8, OF_INT4 = 1, 2, 4, 8, 16, 32, 64, 128
HEAD, WARPS, WIDE, TOKENS, PART_WORDS, MIN_PART, AT_ONCE = 128, 8, 512, 32, 128, 32, 4
MAX_GROUP = 8  # query heads that share a key
GROUP_COLUMNS = 128  # that share a scale of integers of 4 bits
SCALES = torch.float32, torch.bfloat16, torch.float16
MAX_EXPERTS, MAX_TOP_K = 256, 32
MAYBE_HALF = "qkv", "out", "down", "head"  # products by their weights
TIMES = "start", "arrived", "ready", "computed", "finished"  # of a task
MAX_SHARED_BYTES = 227 << 10
MIN_STAGES = 4
RESIDENT_BYTES = 24 << 10  # of x that stays in shared memory while a product by codes runs, at most
MAX_POLLS = 4 << 20  # of a thread in a step, seconds
_TASK = struct.Struct("4Q12I")
# Args in persistent.cu
_ARGUMENTS = struct.Struct("12Q4Q4I2f")
STATUS_WORDS = 8
LOG2_E = math.log2(math.e)
Address = Callable[[int, str], int]  # of a tensor by its layer, −1 for the head, and name; 0: none


class Task(NamedTuple):
    """An instruction of a program. Places are numbers of words; see persistent.cu.

    `inputs` names the tensors of its four pointers, of layer `layer` or, with −1, of the head.
    """

    kind: int
    layer: int = -1
    inputs: tuple[str, ...] = ()
    flags: int = 0
    in_phase: int = 0
    add_phase: int = 0
    out_phase: int = 0
    in_at: int = 0
    add_at: int = 0
    out_at: int = 0
    depth: int = 0
    num_outs: int = 0
    first: int = 0
    num: int = 0

    @property
    def weight_size(self) -> float:
        """The bytes of a number of a product's weight."""
        return 0.5 if self.flags & OF_INT4 else 1.0 if self.flags & OF_FP8 else 2.0

    def packed(self, address: Address) -> bytes:
        """The struct of the kernel."""
        pointers = [address(self.layer, name) for name in self.inputs]
        return _TASK.pack(*pointers, *[0] * (4 - len(pointers)), self.kind, *self[3:])


class InFlight(NamedTuple):
    """The stages of a program that memory is asked for at a time: at most, and while results are
    waited for, which queue behind them."""

    most: int
    waiting: int


SHORT, LONG, OF_EXPERTS = InFlight(3, 2), InFlight(4, 4), InFlight(4, 2)
LONG_BYTES = 512 << 10  # of a program's weights of a layer: waits are a small part of it


class Experts(NamedTuple):
    """The experts of each layer: of `num`, a token chooses `top_k` of width `ffn`. With `normalize`
    their weights are divided by their sum."""

    num: int
    top_k: int
    ffn: int
    normalize: bool


class CodeFormat(NamedTuple):
    """Weights in codes. Those of 8 bits are float8_e4m3fn, with scales of blocks of `block` rows
    and columns or, with 0, of rows; those of 4 bits are integers in groups of 128 columns, with
    scales and perhaps offsets. has_head: the head's weights are in codes too."""

    bits: int
    scale: torch.dtype
    block: int = 0
    has_offset: bool = False
    has_head: bool = False


class Sizes(NamedTuple):
    """What a program is compiled for. `ffn` is that of a token's experts together. `num_tasks` are
    those of a program, `splits` the most parts of a row's keys. `halves` names the products whose
    tiles are halves. has_several, keeps, has_bias, codes: see `Plan`. all_arrive: for race
    checkers, see persistent.cu."""

    num_rows: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    splits: int
    halves: frozenset[str]
    in_flight: InFlight
    num_tasks: int
    experts: Experts | None = None
    has_several: bool = False
    keeps: bool = False
    has_bias: bool = False
    codes: CodeFormat | None = None
    num_warps: int = WARPS
    has_clocks: bool = False
    all_arrive: bool = False

    @property
    def max_chunk(self) -> int:
        """The columns of x that are in registers at most: all of small models in bf16, since more
        would go to local memory."""
        depth = max(self.hidden, self.ffn, self.num_heads * HEAD)
        is_small = depth < 4096 and depth % (2 * WIDE) == 0
        is_whole = is_small and self.num_rows <= 4 and self.experts is None and self.codes is None
        return 4096 if is_whole else 2048

    @property
    def num_copiers(self) -> int:
        """Of the four warps beside the others, those that copy. Where codes are converted, fewer
        take turns from the others; experts have more copies for their bytes."""
        return 4 if self.codes is None or self.experts is not None else 2

    @property
    def resident_bytes(self) -> int:
        """Of x that stays in shared memory. Without codes a ring of more stages is faster."""
        return 0 if self.codes is None else RESIDENT_BYTES

    @property
    def max_own(self) -> int:
        """The keys of the step that a row attends to at most."""
        return self.num_rows if self.has_several else 1

    @property
    def other_bytes(self) -> int:
        """Of shared memory beside the ring, with up to 128 bytes for the alignment. A stage's two
        barriers are in `stage_bytes`."""
        group = self.num_heads // self.num_kv_heads
        sums = 2 * AT_ONCE * 8 * ((self.num_rows + 1) // 2) * self.num_warps * 4
        scratch = 8 * self.num_warps + (group + self.max_own) * HEAD + 2 * group * TOKENS + sums
        pieces = max(map(self._pieces, (self.hidden, self.num_heads * HEAD, self.ffn)))
        x = self.num_rows * self.num_warps * 64 * (pieces + 1)
        chosen = self.num_rows * (1 if self.experts is None else self.experts.top_k)
        return 128 + self.num_tasks * _TASK.size + 80 + -(-chosen // 2) * 16 + scratch * 4 + x

    def _pieces(self, depth: int) -> int:
        """Of 32 columns, those of whole stages, of a row of x that a warp has in shared memory at
        most."""
        of_stage = 1024 if self.codes is None else 2048
        num = -(-depth // self.max_chunk)
        chunk = min(depth, self.max_chunk) if depth % (num * 2 * WIDE) else depth // num
        num_chunks, pieces = -(-depth // chunk), -(-chunk // of_stage) * of_stage // 256
        is_resident = num_chunks > 1 and self.num_rows * depth * 2 <= self.resident_bytes
        return pieces * num_chunks if is_resident else pieces

    @property
    def stage_bytes(self) -> int:
        """Of the ring, with a stage's two barriers."""
        return 16 * (WIDE * 2 + 64) + 16

    @property
    def num_stages(self) -> int:
        return max(0, MAX_SHARED_BYTES - self.other_bytes) // self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        return self.num_stages * self.stage_bytes + self.other_bytes

    @property
    def function(self) -> Function:
        experts = self.experts or Experts(0, 1, self.ffn, False)
        codes = self.codes or CodeFormat(16, torch.bfloat16)
        values = {
            "ROWS": self.num_rows, "HIDDEN": self.hidden, "FFN": self.ffn, "HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads, "SPLITS": self.splits, "NUM_TASKS": self.num_tasks,
            **{f"{name.upper()}_HALF": name in self.halves for name in MAYBE_HALF},
            "EXPERTS": experts.num, "TOP_K": experts.top_k, "EXPERT_FFN": experts.ffn,
            "NORMALIZE": experts.normalize, "STAGES": self.num_stages,
            "WARPS": self.num_warps, "COPIERS": self.num_copiers,
            "IN_FLIGHT": self.in_flight.most, "WAITING_IN_FLIGHT": self.in_flight.waiting,
            "SHARED_BYTES": self.shared_bytes,
            "MAX_CHUNK": self.max_chunk, "RESIDENT_BYTES": self.resident_bytes,
            "CLOCKS": self.has_clocks, "ALL_ARRIVE": self.all_arrive,
            "SEVERAL": self.has_several, "KEEPS": self.keeps, "QKV_BIAS": self.has_bias,
            "LAYER_BITS": codes.bits, "HEAD_BITS": codes.bits if codes.has_head else 16,
            "BLOCK": codes.block, "SCALE": SCALES.index(codes.scale), "OFFSET": codes.has_offset,
        }  # fmt: skip
        return Function("persistent", nvrtc.constants(values), is_specific=True)


class Buffers(NamedTuple):
    """The memory of a step: what tasks exchange, and what they tell.

    tasks uint8 [grid · NUM_TASKS · 80] | words int64 | steps int32 [grid], those that ended
    status int32 [8] | clocks int64 [grid · NUM_TASKS · 5], cycles of each multiprocessor: a task's
    TIMES, as thread 0 has them (0: there is none)
    """

    tasks: Tensor
    words: Tensor
    steps: Tensor
    status: Tensor
    clocks: Tensor

    @classmethod
    def new(
        cls, sizes: Sizes, tasks: bytes, num_programs: int, num_words: int, device: torch.device
    ) -> Buffers:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        num_clocks = num_programs * sizes.num_tasks * len(TIMES) if sizes.has_clocks else 0
        return cls(
            torch.frombuffer(bytearray(tasks), dtype=torch.uint8).to(device),
            zeros(num_words),
            zeros(num_programs, dtype=torch.int32),
            zeros(STATUS_WORDS, dtype=torch.int32),
            zeros(num_clocks),
        )


class Inputs(NamedTuple):
    """The tensors of a step beside weights and caches, which tasks have.

    h_RD and logits_RV in bf16; cos_sin_MH in fp32; rope_pos_R and slot_R int64; table_RP and
    seq_len_R int32.
    """

    h_RD: Tensor
    logits_RV: Tensor
    cos_sin_MH: Tensor
    rope_pos_R: Tensor
    slot_R: Tensor
    table_RP: Tensor
    seq_len_R: Tensor


class Numbers(NamedTuple):
    """The other arguments of a launch. `strides` are those of a cache's blocks, slots and heads,
    `kept_stride` that of rows of kept results, 0 without any."""

    strides: Sequence[int]
    kept_stride: int
    block_size: int
    num_phases: int
    eps: float
    scale: float
    max_polls: int = MAX_POLLS


def packed_arguments(buffers: Buffers, inputs: Inputs, numbers: Numbers) -> bytes:
    own = buffers.steps, buffers.status, buffers.clocks
    every = buffers.tasks, buffers.words, *inputs, *own
    return _ARGUMENTS.pack(
        *(one.data_ptr() for one in every),
        *numbers.strides,
        numbers.kept_stride,
        inputs.table_RP.stride(0),
        numbers.block_size,
        numbers.num_phases,
        numbers.max_polls,
        numbers.eps,
        numbers.scale * LOG2_E,
    )


def compile_kernel(sizes: Sizes, device: torch.device) -> None:
    """Compile the kernel of a step, or find it on disk."""
    nvrtc.compile_function(sizes.function, torch.cuda.get_device_capability(device))


def load(sizes: Sizes, device: torch.device) -> None:
    """Compile and load the kernel of a step, which cannot be done while one is captured."""
    nvrtc.load(sizes.function, sizes.shared_bytes, device)


def launch(sizes: Sizes, buffers: Buffers, inputs: Inputs, numbers: Numbers) -> None:
    """Run a step: its logits are in `inputs.logits_RV`. It can be captured."""
    how = Launch(
        (len(buffers.steps), 1, 1), 32 * sizes.num_warps + 128, sizes.shared_bytes,
        overlaps=False, all_run=True,
    )  # fmt: skip
    device = inputs.h_RD.device
    nvrtc.launch(sizes.function, how, lambda: packed_arguments(buffers, inputs, numbers), device)
