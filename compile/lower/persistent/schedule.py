"""From a plan to a schedule: the tasks of each program, in their order, and their phases.

A phase is a set of tasks on all programs, with one result. A task waits for the words that it
reads, not for phases to end; a program's copies run ahead through its tasks in the same order. A
phase's tiles are divided so that no program has more than one tile above another, and the programs
with the fewest bytes so far get the larger shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import Sizes, Task

MAX_SPLITS = 16  # of a row's keys
# results of a layer's phases; `routed` is of layers with experts
OF_LAYER = ("qkv", "parts", "attended", "out", "routed", "inner", "hidden")
EMBEDDED = 0  # the first phase, whose result is the hidden state before layer 0


class Area(NamedTuple):
    """Words of one kind of result: [R, width] numbers, two in a word, or one in fp32."""

    first: int
    num_words: int


class Schedule(NamedTuple):
    """`programs[b]` are the tasks of program b. Phase p of layer l is 1 + 7 · l + p."""

    plan: Plan
    programs: Sequence[Sequence[Task]]
    areas: dict[str, Area]
    splits: int

    @property
    def num_words(self) -> int:
        return max(area.first + area.num_words for area in self.areas.values())

    @property
    def num_phases(self) -> int:
        return 1 + len(OF_LAYER) * self.plan.num_layers

    @property
    def has_long_layers(self) -> bool:
        """Whether waits are a small part of a layer, by its bytes."""
        return self.plan.layer_bytes // len(self.programs) > persistent.LONG_BYTES

    @property
    def has_whole_chunks(self) -> bool:
        """Whether all chunks of x are of equal columns, which fill stages of codes."""
        plan, chunk = self.plan, self.sizes.max_chunk
        return not any(
            depth % chunk for depth in (plan.hidden, plan.num_heads * persistent.HEAD, plan.ffn)
        )

    @property
    def sizes(self) -> Sizes:
        plan = self.plan
        halves = frozenset(
            task.inputs[0]
            for tasks in self.programs
            for task in tasks
            if task.kind == persistent.PRODUCT and task.flags & persistent.HALF
        ) - {"router"}  # its tiles are those of qkv
        in_flight = persistent.LONG if self.has_long_layers else persistent.SHORT
        if plan.experts is not None:
            in_flight = persistent.OF_EXPERTS
        return Sizes(
            plan.num_rows, plan.hidden, plan.ffn, plan.num_heads, plan.num_kv_heads, self.splits,
            halves, in_flight, max(map(len, self.programs)), plan.experts, plan.has_several,
            plan.keeps, plan.has_bias, plan.codes,
        )  # fmt: skip

    def phase_name(self, phase: int) -> str:
        if phase == EMBEDDED:
            return "the embedded tokens"
        layer, idx = divmod(phase - 1, len(OF_LAYER))
        return f"{OF_LAYER[idx]} of layer {layer}"

    def task_name(self, program: int, task_idx: int) -> str:
        task = self.programs[program][task_idx]
        of = "the head" if task.layer < 0 else f"layer {task.layer}"
        what = "/".join(task.inputs[:1]) or persistent.KINDS[task.kind]
        return f"{persistent.KINDS[task.kind]} {what} of {of} ({task.first} + {task.num})"


def phase_of(layer: int, name: str) -> int:
    """The phase of a layer's result."""
    return 1 + len(OF_LAYER) * layer + OF_LAYER.index(name)


def build(plan: Plan, num_programs: int) -> Schedule:
    """The schedule of a step for so many multiprocessors. Raises Unfit."""
    if plan.experts is not None and plan.num_rows * plan.ffn < 8 * num_programs:
        raise Unfit(f"a token's experts are too small to be divided among {num_programs} programs")
    group = plan.num_heads // plan.num_kv_heads
    if plan.has_several and group >= persistent.WARPS:
        raise Unfit(f"{group} queries share a key: no warp makes the keys of a row's other tokens")
    return _Builder(plan, num_programs).schedule()


class _Builder:
    def __init__(self, plan: Plan, num_programs: int) -> None:
        self.plan, self.num_programs = plan, num_programs
        self.programs: list[list[Task]] = [[] for _ in range(num_programs)]
        self.load = [0] * num_programs  # bytes of weights
        units = plan.num_rows * plan.num_kv_heads
        self.splits = max(1, min(MAX_SPLITS, num_programs // units))
        self.areas = self._areas()

    def _areas(self) -> dict[str, Area]:
        plan, rows = self.plan, self.plan.num_rows
        sizes = {
            "hidden": rows * plan.hidden // 2,
            "out": rows * plan.hidden // 2,
            "qkv": rows * plan.qkv // 2,
            "attended": rows * plan.attended // 2,
            "inner": rows * plan.ffn // 2,
            "parts": rows * plan.num_heads * self.splits * persistent.PART_WORDS,
        }
        if plan.experts is not None:
            sizes["routed"] = rows * plan.experts.num // 2
        areas, first = {}, 0
        for name, size in sizes.items():
            areas[name] = Area(first, size)
            first += size + size % 2  # words are loaded in pairs
        return areas

    def schedule(self) -> Schedule:
        self._embed()
        for layer in range(self.plan.num_layers):
            self._layer(layer)
        self._head()
        for tasks in self.programs:
            tasks.append(Task(persistent.END))
        return Schedule(self.plan, self.programs, self.areas, self.splits)

    def _embed(self) -> None:
        """The programs divide the words of the embedded tokens."""
        area = self.areas["hidden"]
        for program, (first, count) in enumerate(_spans(area.num_words, self.num_programs)):
            task = Task(persistent.EMBED, out_phase=EMBEDDED, out_at=area.first)
            self._append(program, task._replace(first=first, num=count))

    def _layer(self, layer: int) -> None:
        plan, norm, add = self.plan, persistent.NORM, persistent.ADD
        before = phase_of(layer - 1, "hidden") if layer else EMBEDDED
        hidden = "hidden", before
        out = "out", phase_of(layer, "out")
        of_qkv = "qkv", "attn_norm", "qkv_bias" if plan.has_bias else ""
        qkv = self._product(layer, of_qkv, plan.hidden, plan.qkv, norm)
        self._spread(qkv, hidden, ("qkv", phase_of(layer, "qkv")))
        self._attention(layer)
        made = self._product(layer, ("out",), plan.attended, plan.hidden, add)
        self._spread(made, ("attended", phase_of(layer, "attended")), out, hidden)
        routed, of_experts = None, 0
        if plan.experts is not None:
            routed, of_experts = ("routed", phase_of(layer, "routed")), persistent.EXPERT
            # by the kernel's code for qkv
            inputs, flags = ("router", "mlp_norm"), qkv.flags & ~persistent.OF_FP8
            router = qkv._replace(inputs=inputs, flags=flags, num_outs=plan.experts.num)
            self._spread(router, out, routed)
        flags = norm | persistent.SILU | of_experts
        inner = self._product(layer, ("gate_up", "mlp_norm"), plan.hidden, plan.ffn, flags)
        self._spread(inner, out, ("inner", phase_of(layer, "inner")), routed)
        of_down = "down", "kept" if plan.keeps else ""
        down = self._product(layer, of_down, plan.ffn, plan.hidden, add | of_experts)
        after = "hidden", phase_of(layer, "hidden")
        self._spread(down, ("inner", phase_of(layer, "inner")), after, out)

    def _head(self) -> None:
        plan, flags = self.plan, persistent.NORM | persistent.LOGITS
        head = self._product(-1, ("head", "final_norm"), plan.hidden, plan.vocab, flags)
        self._spread(head, ("hidden", phase_of(plan.num_layers - 1, "hidden")), None)

    def _product(
        self, layer: int, inputs: tuple[str, ...], depth: int, num_outs: int, flags: int
    ) -> Task:
        """The task of a product, of which `_spread` makes those of the programs. Tiles have 8 rows
        if the largest share has fewer rows so, but for integers of 4 bits."""
        codes = self.plan.codes
        if codes is not None and (layer >= 0 or codes.has_head):
            flags |= persistent.OF_INT4 if codes.bits == 4 else persistent.OF_FP8
            third = f"{inputs[0]}_offset" if codes.has_offset else inputs[2] if inputs[2:] else ""
            inputs = (*inputs[:2], *[""] * (2 - len(inputs)), third, f"{inputs[0]}_scale")
        may_be_half = not flags & (persistent.SILU | persistent.OF_INT4)
        if may_be_half and num_outs % 16 == 0:
            total = num_outs * self._copies(flags)
            shares = [-(-total // (rows * self.num_programs)) * rows for rows in (8, 16)]
            flags |= persistent.HALF if shares[0] < shares[1] else 0
        elif may_be_half:
            flags |= persistent.HALF
        return Task(persistent.PRODUCT, layer, inputs, flags, depth=depth, num_outs=num_outs)

    def _spread(
        self,
        task: Task,
        read: tuple[str, int],
        made: tuple[str, int] | None,
        residual: tuple[str, int] | None = None,
    ) -> None:
        """Divide a product's tiles. `read`, `made` and `residual` are areas and phases; in place of
        a residual, products of experts have the router's results."""
        rows = 8 if task.flags & persistent.HALF else 16
        num_tiles = task.num_outs * (2 if task.flags & persistent.SILU else 1) // rows
        num_tiles *= self._copies(task.flags)
        task = task._replace(in_at=self.areas[read[0]].first, in_phase=read[1])
        if made is not None:
            task = task._replace(out_at=self.areas[made[0]].first, out_phase=made[1])
        if residual is not None:
            task = task._replace(add_at=self.areas[residual[0]].first, add_phase=residual[1])
        first = 0
        for program, count in enumerate(self._shares(num_tiles)):
            if count:
                self._append(program, task._replace(first=first, num=count))
                self.load[program] += int(count * rows * task.depth * task.weight_size)
            first += count

    def _copies(self, flags: int) -> int:
        """How many matrices a product has: each row has experts of its own."""
        return self.plan.num_rows if flags & persistent.EXPERT else 1

    def _shares(self, num_tiles: int) -> list[int]:
        """The tiles of each program: the larger shares go to those with the fewest bytes."""
        each, more = divmod(num_tiles, self.num_programs)
        order = sorted(range(self.num_programs), key=lambda program: self.load[program])
        larger = set(order[:more])
        return [each + (program in larger) for program in range(self.num_programs)]

    def _attention(self, layer: int) -> None:
        plan = self.plan
        phases = {name: phase_of(layer, name) for name in ("qkv", "parts", "attended")}
        attend = Task(
            persistent.ATTEND, layer, ("keys", "values", "q_norm", "k_norm"),
            in_phase=phases["qkv"], add_phase=phases["parts"], out_phase=phases["attended"],
            in_at=self.areas["qkv"].first, add_at=self.areas["parts"].first,
            out_at=self.areas["attended"].first,
        )  # fmt: skip
        num_units = plan.num_rows * plan.num_kv_heads * self.splits
        for program, (first, count) in enumerate(_spans(num_units, self.num_programs)):
            if count:
                self._append(program, attend._replace(first=first, num=count))
        if self.splits == 1:
            return
        merge = Task(
            persistent.MERGE, layer, in_phase=phases["parts"], out_phase=phases["attended"],
            in_at=self.areas["parts"].first, out_at=self.areas["attended"].first,
        )  # fmt: skip
        num_units = plan.num_rows * plan.num_heads
        # the last programs first: they have the fewest units of attention
        for idx, (first, count) in enumerate(_spans(num_units, self.num_programs)):
            if count:
                program = self.num_programs - 1 - idx
                self._append(program, merge._replace(first=first, num=count))

    def _append(self, program: int, task: Task) -> None:
        self.programs[program].append(task)


def _spans(total: int, num: int) -> list[tuple[int, int]]:
    """(first, count) of each of `num` shares."""
    each, more = divmod(total, num)
    return [(idx * each + min(idx, more), each + (idx < more)) for idx in range(num)]


def packed(schedule: Schedule, address: persistent.Address) -> bytes:
    """The tasks of all programs as the kernel reads them; shorter lists end with END."""
    num_tasks, end = schedule.sizes.num_tasks, Task(persistent.END)
    lists = [[*tasks, *[end] * (num_tasks - len(tasks))] for tasks in schedule.programs]
    return b"".join(task.packed(address) for tasks in lists for task in tasks)
