"""Stands for the device's captured graphs: what runs between capture begin and end is kept and run again by a replay.

torch_npu's own `NPUGraph` and its way of replacing lengths before a replay run as they are; only what they ask of the
runtime is done here. On a device ops that are being captured do not run; here they do, which changes only padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.npu.host import Host, Step


@dataclass
class Group:
    """Some steps of a tape that can be replaced."""

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
