"""Extracts the comparable parts of answers, for `stress.py`."""

from __future__ import annotations

from typing import Any

LOGPROB_TOLERANCE = 1e-3

Json = dict[str, Any]


def parts_of(path: str, body: Json) -> list[Json]:
    """The comparable parts of an unstreamed answer: a dict for each choice, without ids."""
    if path == "/v1/responses":
        items = [
            [item["type"], item.get("content"), item.get("name"), item.get("arguments")]
            for item in body["output"]
        ]
        return [
            {"status": body["status"], "items": items, "tokens": body["usage"]["output_tokens"]}
        ]
    found = []
    for choice in sorted(body["choices"], key=lambda choice: choice["index"]):
        message = choice.get("message") or {}
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        found.append({
            "text": choice.get("text", message.get("content")) or "", "calls": calls,
            "reason": choice["finish_reason"], "logprobs": logprobs_of(choice["logprobs"]),
            "tokens": body["usage"]["completion_tokens"],
        })  # fmt: skip
    return found


def logprobs_of(of: Json | None) -> list[Any]:
    """A token and its log-probability, for each position."""
    if of is None:
        return []
    if "content" in of:
        return [(entry["token"], entry["logprob"]) for entry in of["content"] or ()]
    return list(zip(of["tokens"], of["token_logprobs"], strict=True))


def joined(path: str, events: list[Json]) -> list[Json]:
    """The same for a streamed answer."""
    for event in events:
        if event.get("error"):
            raise ValueError(f"error in a stream: {event['error']}")
    if path == "/v1/responses":
        text = "".join(
            event["delta"] for event in events if event["type"] == "response.output_text.delta"
        )
        whole: Json = events[-1]["response"]
        said = "".join(
            part["text"] for item in whole["output"] for part in item.get("content") or ()
        )
        if text != said:
            raise ValueError(f"the deltas are {text!r}, the whole is {said!r}")
        return parts_of(path, whole)
    found: dict[int, Json] = {}
    for event in events:
        for choice in event["choices"]:
            of = found.setdefault(
                choice["index"], {"text": "", "calls": [], "reason": None, "logprobs": []}
            )
            delta = choice.get("delta") or {}
            of["text"] += choice.get("text", delta.get("content")) or ""
            of["logprobs"] += logprobs_of(choice.get("logprobs"))
            of["reason"] = choice["finish_reason"] or of["reason"]
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(of["calls"]):
                    of["calls"].append({"name": call["function"]["name"], "arguments": ""})
                of["calls"][call["index"]]["arguments"] += call["function"].get("arguments") or ""
    tokens = events[-1]["usage"]["completion_tokens"]
    return [{**found[index], "tokens": tokens} for index in sorted(found)]


def differs(one: Any, other: Any) -> bool:
    """Whether two answers differ, apart from rounding in log-probabilities."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) > LOGPROB_TOLERANCE
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differs(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(map(differs, one, other))
    return bool(one != other)
