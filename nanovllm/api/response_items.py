"""The items of a streamed response: reasoning, a message, tool calls.

An item's `index` is its position in the output; `place` has the fields that identify it in events;
`event` is the prefix of the events about its text.
"""

from __future__ import annotations

import secrets
from typing import Any

from nanovllm.api.chat_messages import is_object
from nanovllm.parsers import ArgumentsPart, CallStart, Part, ReasoningPart


class TextItem:
    """A message, or the reasoning before it."""

    is_whole = False  # its text does not show it

    def __init__(self, index: int, *, is_reasoning: bool) -> None:
        self.index, self.is_reasoning = index, is_reasoning
        self.id = f"{'rs' if is_reasoning else 'msg'}_{secrets.token_hex(16)}"
        self.event = "response.reasoning_text" if is_reasoning else "response.output_text"
        self.texts: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def takes(self, part: Part) -> bool:
        """Whether a part of the answer belongs to this item."""
        is_text = not isinstance(part, (CallStart, ArgumentsPart))
        return is_text and isinstance(part, ReasoningPart) == self.is_reasoning

    def add(self, part: Part) -> str:
        """Add a part of the answer. Returns its text."""
        assert not isinstance(part, CallStart)
        self.texts.append(part.text)
        return part.text

    def done(self) -> dict[str, Any]:
        """The fields of the event that ends its text."""
        return {"text": "".join(self.texts), "logprobs": []}

    def content(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def fields(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.content()]
        if self.is_reasoning:
            return {
                "type": "reasoning", "id": self.id, "status": status, "summary": [],
                "content": content,
            }  # fmt: skip
        return {
            "type": "message", "id": self.id, "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip


class CallItem:
    """A tool call."""

    event = "response.function_call_arguments"

    def __init__(self, index: int, start: CallStart) -> None:
        self.index, self._start = index, start
        self.id = f"fc_{secrets.token_hex(16)}"
        self._texts: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}

    @property
    def is_whole(self) -> bool:
        """Whether the arguments are complete."""
        return is_object("".join(self._texts))

    def takes(self, part: Part) -> bool:
        return isinstance(part, ArgumentsPart) and part.index == self._start.index

    def add(self, part: Part) -> str:
        assert isinstance(part, ArgumentsPart)
        self._texts.append(part.text)
        return part.text

    def done(self) -> dict[str, Any]:
        return {"name": self._start.name, "arguments": "".join(self._texts)}

    def fields(self, status: str) -> dict[str, Any]:
        return {
            "type": "function_call", "id": self.id, "call_id": self._start.id, "status": status,
            **self.done(),
        }  # fmt: skip


def item_for(index: int, part: Part) -> TextItem | CallItem:
    """The item that a part starts."""
    if isinstance(part, CallStart):
        return CallItem(index, part)
    return TextItem(index, is_reasoning=isinstance(part, ReasoningPart))
