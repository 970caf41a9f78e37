"""Runs a schedule on a CPU, task by task, and checks every read.

Programs take turns by chance, or one runs as far ahead as it can. A task runs once all words that
it reads have the tags of their phases; if no task can run, the first missing word is named. Each
word also counts the reads that its value still has to serve: a task that overwrites one too early
is named.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.compile.lower.persistent.schedule import Schedule
from nanovllm.kernels import reference
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import HEAD, MIN_PART, PART_WORDS, Inputs, Task

Find = Callable[[int, str], Tensor | None]  # the tensor of a layer, −1 for the head, and a name


class Fault(RuntimeError):
    """A schedule has a missing dependency, or overwrites what is still to be read."""


class Span(NamedTuple):
    """Words `first` .. `first + num` − 1 in a phase."""

    first: int
    num: int
    phase: int


def part_len(seq_len: int, splits: int) -> int:
    """The earlier keys of a row's parts; the last part has the step's own key too."""
    return max(MIN_PART, -(-(seq_len - 1) // splits))


def num_parts(seq_len: int, splits: int) -> int:
    return max(1, -(-(seq_len - 1) // part_len(seq_len, splits)))


class Interpreter:
    """Computes a step: the logits are in `inputs.logits_RV`, keys and values in the caches."""

    def __init__(self, schedule: Schedule, inputs: Inputs, find: Find, block_size: int) -> None:
        self.schedule, self.plan, self.inputs = schedule, schedule.plan, inputs
        self.find, self.block_size = find, block_size
        # of each row: keys of the step that it attends to, and tokens with the first of these
        self.num_own = self._own_keys()
        self.lens = [len - num + 1 for len, num in zip(inputs.seq_len_R.tolist(), self.num_own)]
        # two numbers in bf16, or one in fp32 and an empty place
        self.values = torch.zeros(schedule.num_words, 2)
        self.phase = torch.full((schedule.num_words,), -1)
        self.reads_left = torch.zeros(schedule.num_words, dtype=torch.int64)
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}  # of a layer, weights and numbers
        self._num_reads = self._count_reads()

    def _own_keys(self) -> list[int]:
        """One for each row, and one for each row before it of the same request: the place before a
        token's own in its cache is that of the row before it."""
        given, found = self.inputs, [1]
        lens = given.seq_len_R.tolist()
        for row in range(1, len(lens)):
            block, offset = divmod(lens[row] - 2, self.block_size)
            before = int(given.table_RP[row, block]) * self.block_size + offset
            follows = lens[row] > 1 and before == int(given.slot_R[row - 1])
            follows &= self.plan.has_several
            found.append(found[-1] + 1 if follows else 1)
        return found

    def run(self, seed: int, *, ahead: bool = False) -> None:
        """Run all tasks. With `ahead` a program goes on until it must wait. Raises Fault."""
        rng = random.Random(seed)
        at = [0] * len(self.schedule.programs)
        waiting = set(range(len(at)))
        while waiting:
            order = sorted(waiting)
            rng.shuffle(order)
            moved = False
            for program in order:
                while self._step(program, at):
                    moved = True
                    if not ahead:
                        break
                if self._task(program, at).kind == persistent.END:
                    waiting.discard(program)
            if waiting and not moved:
                raise Fault(self._missing(min(waiting), at))

    def _task(self, program: int, at: list[int]) -> Task:
        return self.schedule.programs[program][at[program]]

    def _step(self, program: int, at: list[int]) -> bool:
        task = self._task(program, at)
        spans = list(self._reads(task))
        if task.kind == persistent.END or any(self._first_missing(one) >= 0 for one in spans):
            return False
        for span in spans:
            self.reads_left[span.first : span.first + span.num] -= 1
        _RUN[task.kind](self, task)
        at[program] += 1
        return True

    def _first_missing(self, span: Span) -> int:
        wrong = (self.phase[span.first : span.first + span.num] != span.phase).nonzero()
        return span.first + int(wrong[0]) if len(wrong) else -1

    def _missing(self, program: int, at: list[int]) -> str:
        task = self._task(program, at)
        span = next(one for one in self._reads(task) if self._first_missing(one) >= 0)
        word = self._first_missing(span)
        name = self.schedule.task_name(program, at[program])
        return (
            f"program {program} waits in {name!r} for word {word} of "
            f"{self.schedule.phase_name(span.phase)}, which no task writes"
        )

    def _count_reads(self) -> dict[int, Tensor]:
        """How often each word is read in each phase."""
        spans: Counter[Span] = Counter()
        for tasks in self.schedule.programs:
            for task in tasks:
                spans.update(self._reads(task))
        counts: dict[int, Tensor] = {}
        for span, num in spans.items():
            own = counts.setdefault(
                span.phase, torch.zeros(self.schedule.num_words, dtype=torch.int64)
            )
            own[span.first : span.first + span.num] += num
        return counts

    def _write(self, task: Task, first: int, values: Tensor, phase: int) -> None:
        """Write [n, 2] values to the words from `first` on."""
        where = slice(first, first + len(values))
        if (self.reads_left[where] > 0).any():
            raise Fault(
                f"{persistent.KINDS[task.kind]} of layer {task.layer} overwrites "
                f"{self.schedule.phase_name(int(self.phase[where][0]))}, which is still to be read"
            )
        self.values[where], self.phase[where] = values.float(), phase
        counts = self._num_reads.get(phase)
        self.reads_left[where] = 0 if counts is None else counts[where]

    # what tasks read ------------------------------------------------------------------------------

    def _reads(self, task: Task) -> Iterator[Span]:
        rows = self.plan.num_rows
        if task.kind == persistent.PRODUCT:
            yield Span(task.in_at, rows * task.depth // 2, task.in_phase)
            experts = self.plan.experts
            if task.flags & persistent.EXPERT and task.flags & persistent.SILU and experts:
                yield Span(task.add_at, rows * experts.num // 2, task.add_phase)
            if task.flags & persistent.ADD:
                for row, first, num in self._results(task):
                    at = task.add_at + (row * task.num_outs + first) // 2
                    yield Span(at, num // 2, task.add_phase)
        elif task.kind == persistent.ATTEND:
            for row, head, _, part in self._units(task):
                yield from self._attend_reads(task, row, head, part)
        elif task.kind == persistent.MERGE:
            for head, parts in self._merged(task):
                first = task.in_at + head * self.schedule.splits * PART_WORDS
                yield Span(first, parts * PART_WORDS, task.in_phase)

    def _attend_reads(self, task: Task, row: int, head: int, part: int) -> Iterator[Span]:
        plan = self.plan
        first, group = task.in_at + row * plan.qkv // 2, plan.num_heads // plan.num_kv_heads
        yield Span(first + head * group * HEAD // 2, group * HEAD // 2, task.in_phase)
        if part + 1 == num_parts(self.lens[row], self.schedule.splits):
            for before in range(self.num_own[row]):
                at = first - before * plan.qkv // 2
                for kv_head in (plan.num_heads + head, plan.num_heads + plan.num_kv_heads + head):
                    yield Span(at + kv_head * HEAD // 2, HEAD // 2, task.in_phase)

    def _columns(self, task: Task) -> tuple[int, int]:
        """The first result of a product's task, and how many it has."""
        width = 8 if task.flags & (persistent.HALF | persistent.SILU) else 16
        return task.first * width, task.num * width

    def _results(self, task: Task) -> Iterator[tuple[int, int, int]]:
        """Rows of x, the first result of each and how many it has. Products of experts have the
        results of all rows one after the other."""
        first, num = self._columns(task)
        for row in range(self.plan.num_rows):
            if not task.flags & persistent.EXPERT:
                yield row, first, num
                continue
            before = row * task.num_outs
            begin, end = max(first, before), min(first + num, before + task.num_outs)
            if begin < end:
                yield row, begin - before, end - begin

    def _units(self, task: Task) -> Iterator[tuple[int, int, int, int]]:
        """Row, key-value head, number of parts and part of each unit with keys."""
        splits, num_heads = self.schedule.splits, self.plan.num_kv_heads
        for unit in range(task.first, task.first + task.num):
            row, head, part = (
                unit // (num_heads * splits),
                unit // splits % num_heads,
                unit % splits,
            )
            parts = num_parts(self.lens[row], splits)
            if part < parts:
                yield row, head, parts, part

    def _merged(self, task: Task) -> Iterator[tuple[int, int]]:
        """Row · N + query head, and the parts of what is merged."""
        for head in range(task.first, task.first + task.num):
            parts = num_parts(self.lens[head // self.plan.num_heads], self.schedule.splits)
            if parts > 1:
                yield head, parts

    # what tasks compute ---------------------------------------------------------------------------

    def _given(self, layer: int, name: str) -> Tensor:
        found = self.find(layer, name)
        assert found is not None, name
        return found

    def _rows(self, first: int, width: int) -> Tensor:
        """[R, width] in bf16 of the words from `first` on."""
        rows = self.plan.num_rows
        return self.values[first : first + rows * width // 2].view(rows, width).bfloat16()

    def _embed(self, task: Task) -> None:
        values = self.inputs.h_RD.reshape(-1, 2)[task.first : task.first + task.num]
        self._write(task, task.out_at + task.first, values, task.out_phase)

    def _product(self, task: Task) -> None:
        flags = task.flags
        x_RD = self._rows(task.in_at, task.depth)
        if flags & persistent.NORM:
            norm_D = self._given(task.layer, task.inputs[1])
            x_RD = reference.norm_act.rms_norm(x_RD, norm_D, self.plan.eps)
        if flags & persistent.EXPERT and flags & persistent.SILU:
            self._choose(task)
        for row, first, num in self._results(task):
            weight_OD = self._weight(task, row)
            if flags & persistent.SILU:
                y_O = self._inner(task, row, x_RD[row], weight_OD)[first : first + num]
            else:
                y_O = x_RD[row].float() @ weight_OD[first : first + num].float().T
                if "qkv_bias" in task.inputs:
                    y_O += self._given(task.layer, "qkv_bias")[first : first + num].float()
                y_O = y_O.bfloat16()
            if flags & persistent.ADD:
                y_O = y_O + self._rows(task.add_at, task.num_outs)[row, first : first + num]
            if flags & persistent.LOGITS:
                self.inputs.logits_RV[row, first : first + num] = y_O
                continue
            at = task.out_at + (row * task.num_outs + first) // 2
            self._write(task, at, y_O.view(-1, 2), task.out_phase)
            if "kept" in task.inputs:
                kept_RD = self.find(task.layer, "kept")
                if kept_RD is not None:
                    kept_RD[row, first : first + num] = y_O

    def _weight(self, task: Task, row: int) -> Tensor:
        """[O, D] of a product: of experts, those of a row as one MLP, gates before ups."""
        weight, codes = self._given(task.layer, task.inputs[0]), self.plan.codes
        is_of_experts = bool(task.flags & persistent.EXPERT)
        chosen = self.chosen[task.layer][1][row].long() if is_of_experts else slice(None)
        weight = weight[chosen]
        if task.flags & persistent.OF_FP8 and codes is not None:
            sides = (codes.block, codes.block) if codes.block else (1, task.depth)
            scale = self._given(task.layer, task.inputs[3])[chosen]
            weight = reference.packed.of_fp8(weight, scale, *sides)
        if task.flags & persistent.OF_INT4:
            scale_OG = self._given(task.layer, task.inputs[3])
            offset_OG, group = self.find(task.layer, task.inputs[2]), persistent.GROUP_COLUMNS
            parts = weight, scale_OG, offset_OG, None
            return reference.packed.unpacked(*parts, 4, group, task.depth)
        if not task.flags & persistent.EXPERT:
            return weight
        if task.flags & persistent.SILU:
            return weight.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        return weight.transpose(0, 1).flatten(1)

    def _inner(self, task: Task, row: int, x_D: Tensor, weight_GD: Tensor) -> Tensor:
        """SiLU · up of a row; of experts, times their weights."""
        y_F = reference.norm_act.silu_mul((x_D.float() @ weight_GD.float().T).bfloat16())
        if not task.flags & persistent.EXPERT:
            return y_F
        weight_K = self.chosen[task.layer][0][row]
        return (y_F.float() * weight_K.repeat_interleave(len(y_F) // len(weight_K))).bfloat16()

    def _choose(self, task: Task) -> None:
        experts = self.plan.experts
        assert experts is not None
        logits_RE = self._rows(task.add_at, experts.num)
        chosen = reference.experts.topk_softmax(logits_RE, experts.top_k, experts.normalize)
        self.chosen[task.layer] = chosen

    def _attend(self, task: Task) -> None:
        for row, head, parts, part in self._units(task):
            out_GH, lse_G = self._attend_unit(task, row, head, parts, part)
            group = len(lse_G)
            for i in range(group):
                unit = row * self.plan.num_heads + head * group + i
                if parts == 1:
                    values = out_GH[i].bfloat16().view(-1, 2)
                    self._write(task, task.out_at + unit * HEAD // 2, values, task.out_phase)
                    continue
                first = task.add_at + (unit * self.schedule.splits + part) * PART_WORDS
                # two numbers, and in the next word the log of the sums
                lse_n2 = lse_G[i].expand(HEAD // 2, 2)
                values = torch.stack((out_GH[i].view(-1, 2), lse_n2), 1).view(-1, 2)
                self._write(task, first, values, task.add_phase)

    def _attend_unit(
        self, task: Task, row: int, head: int, parts: int, part: int
    ) -> tuple[Tensor, Tensor]:
        """The result [G, H] over a part of a row's keys, and its log of sums [G] in base 2."""
        plan, given, length = self.plan, self.inputs, self.lens[row]
        group, is_last = plan.num_heads // plan.num_kv_heads, part + 1 == parts
        qkv_RNH = self._rows(task.in_at, plan.qkv).view(plan.num_rows, -1, HEAD)
        q_GH = qkv_RNH[row, head * group : (head + 1) * group]
        q_GH = self._rotated(q_GH[None], task, "q_norm", given.rope_pos_R[row : row + 1])[0]
        keys, values = (self._given(task.layer, name) for name in ("keys", "values"))
        each = part_len(length, self.schedule.splits)
        token_S = torch.arange(part * each, length - 1 if is_last else (part + 1) * each)
        slot_S = given.table_RP[row][token_S // self.block_size].long() * self.block_size
        slot_S += token_S % self.block_size
        k_SH, v_SH = (
            one.reshape(-1, plan.num_kv_heads, HEAD)[slot_S, head] for one in (keys, values)
        )
        if is_last:
            own = slice(row + 1 - self.num_own[row], row + 1)
            k_S1H = qkv_RNH[own, plan.num_heads + head, None]
            k_OH = self._rotated(k_S1H, task, "k_norm", given.rope_pos_R[own])[:, 0]
            v_OH = qkv_RNH[own, plan.num_heads + plan.num_kv_heads + head]
            block, offset = divmod(int(given.slot_R[row]), self.block_size)
            keys[block, offset, head], values[block, offset, head] = k_OH[-1], v_OH[-1]
            k_SH, v_SH = torch.cat((k_SH, k_OH)), torch.cat((v_SH, v_OH))
        score_GS = q_GH.float() @ k_SH.float().T * plan.scale
        lse_G = score_GS.logsumexp(-1) * persistent.LOG2_E
        return score_GS.softmax(-1) @ v_SH.float(), lse_G

    def _rotated(self, x_RNH: Tensor, task: Task, norm: str, pos_R: Tensor) -> Tensor:
        weight_H = self.find(task.layer, norm)
        if weight_H is not None:
            x_RNH = reference.norm_act.rms_norm(x_RNH, weight_H, self.plan.eps)
        return reference.rope_store.rope(x_RNH, self.inputs.cos_sin_MH, pos_R)

    def _merge(self, task: Task) -> None:
        for head, parts in self._merged(task):
            first = task.in_at + head * self.schedule.splits * PART_WORDS
            part_Pn22 = self.values[first : first + parts * PART_WORDS].view(parts, -1, 2, 2)
            lse_P = part_Pn22[:, 0, 1, 0]
            weight_P1 = torch.exp2(lse_P - lse_P.max())[:, None]
            sum_H = (weight_P1 * part_Pn22[:, :, 0].reshape(parts, HEAD)).sum(0)
            out_H = (sum_H / weight_P1.sum()).bfloat16()
            at = task.out_at + head * HEAD // 2
            self._write(task, at, out_H.view(-1, 2), task.out_phase)


_RUN: dict[int, Callable[[Interpreter, Task], None]] = {
    persistent.EMBED: Interpreter._embed,
    persistent.PRODUCT: Interpreter._product,
    persistent.ATTEND: Interpreter._attend,
    persistent.MERGE: Interpreter._merge,
}
