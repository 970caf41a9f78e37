"""Captured graphs without a device: records the ops between capture begin and end for replays.

torch_npu's own `NPUGraph` and its replacement of lengths before a replay run unmodified; this file
implements only the runtime functions that they call. On a device, ops do not run while they are
captured. Here they do, which changes only padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.npu.host import Host, Step


@dataclass
class Group:
    """Steps of a tape that can be replaced."""

    tape: list[list[Step]]
    index: int


def install(host: Host, monkeypatch: Any) -> None:
    from torch_npu.npu import graphs

    original_begin, original_end = graphs.NPUGraph.capture_begin, graphs.NPUGraph.capture_end

    def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        original_begin(graph, *args, **kwargs)
        host.recording = graph._tape = [[]]

    def capture_end(graph: Any) -> None:
        host.recording = None
        original_end(graph)

    def replay(graph: Any) -> None:
        for group in graph._tape:
            for step in group:
                step()

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

    for name, function in (
        ("capture_begin", capture_begin),
        ("capture_end", capture_end),
        ("replay", replay),
    ):
        monkeypatch.setattr(graphs.NPUGraph, name, function)
    monkeypatch.setattr(graphs, "graph_task_group_begin", group_begin)
    monkeypatch.setattr(graphs, "graph_task_group_end", group_end)
    monkeypatch.setattr(graphs, "graph_task_update_begin", update_begin)
    monkeypatch.setattr(graphs, "graph_task_update_end", update_end)
