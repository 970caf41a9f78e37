"""Captured graphs without a device: records the ops between capture begin and end for replays.

torch_npu's own `NPUGraph`, npugraph_ex, and the replacement of lengths of both run unmodified; this
file implements only the runtime functions that they call. On a device, ops do not run while they
are captured. Here they do, which changes only padding.

A captured attention op waits for an event, which is recorded when its lengths have been replaced:
before the replay, or while it waits. A replay that waits for ever reaches no later op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.npu.host import Host, Step


@dataclass
class Group:
    """Steps of a tape that can be replaced."""

    tape: list[list[Step]]
    index: int


@dataclass
class Runtime:
    """The streams' state: events that are recorded, and the replay that waits for one."""

    recorded: set[int]
    replay: Iterator[None] | None = None

    def start(self, tape: list[list[Step]]) -> None:
        assert self.replay is None, "the replay before waits for lengths"
        self.replay = self._run(tape)
        self.proceed()

    def proceed(self) -> None:
        if self.replay is not None and next(self.replay, "done") == "done":
            self.replay = None

    def _run(self, tape: list[list[Step]]) -> Iterator[None]:
        for group in list(range(len(tape))):  # groups are replaced during the run
            for step in tape[group]:
                if isinstance(step, Wait):
                    while id(step.event) not in self.recorded:
                        yield
                else:
                    step()


@dataclass
class Wait:
    """The step of a tape that waits for an event."""

    event: Any

    def __call__(self) -> None:
        raise AssertionError("the runtime handles it")


def install(host: Host, monkeypatch: Any) -> None:
    from torch_npu import npu
    from torch_npu.npu import graphs, streams

    original_begin, original_end = graphs.NPUGraph.capture_begin, graphs.NPUGraph.capture_end
    runtime = Runtime(set())

    def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        original_begin(graph, *args, **kwargs)
        host.recording = graph._tape = [[]]

    def capture_end(graph: Any) -> None:
        host.recording = None
        original_end(graph)

    def replay(graph: Any) -> None:
        runtime.start(graph._tape)

    def group_begin(stream: Any) -> None:
        assert host.recording is not None, "a task group outside a capture"
        host.recording.append([])

    def group_end(stream: Any) -> Group:
        assert host.recording is not None and len(host.recording[-1]) == 1, "one op in a task group"
        group = Group(host.recording, len(host.recording) - 1)
        host.recording.append([])
        return group

    def update_begin(stream: Any, group: Group) -> None:
        group.tape[group.index] = []
        host.recording, host.replacing = group.tape, group.index

    def update_end(stream: Any) -> None:
        host.recording = host.replacing = None

    def event_wait(event: Any, stream: Any = None) -> None:
        assert host.recording is not None, "an external event outside a capture"
        host.recording[-1].append(Wait(event))

    def event_reset(event: Any, stream: Any = None) -> None:
        assert host.recording is not None, "an external event outside a capture"
        host.recording[-1].append(lambda: runtime.recorded.discard(id(event)))

    def event_record(event: Any, stream: Any = None) -> None:
        runtime.recorded.add(id(event))
        runtime.proceed()

    for owner, functions in (
        (
            graphs.NPUGraph,
            {"capture_begin": capture_begin, "capture_end": capture_end, "replay": replay},
        ),
        (streams.ExternalEvent, {"wait": event_wait, "reset": event_reset, "record": event_record}),
    ):
        for name, function in functions.items():
            monkeypatch.setattr(owner, name, function)
    task_functions = {
        "graph_task_group_begin": group_begin,
        "graph_task_group_end": group_end,
        "graph_task_update_begin": update_begin,
        "graph_task_update_end": update_end,
    }
    for name, function in task_functions.items():
        monkeypatch.setattr(graphs, name, function)
        monkeypatch.setattr(npu, name, function)
