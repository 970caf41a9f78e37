"""Random requests of all kinds with deterministic answers, for `stress.py`."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

Json = dict[str, Any]

QUESTIONS = (
    "What is 37 + 45?", "Reverse the word lamp.", "Who are you?", "What is 3 + 4?",
    "Count from 1 to 9.", "What colour is snow?", "Tell me a story. \N{SNOWMAN} \N{PARTY POPPER}",
)  # fmt: skip
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["small", "large"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 999}},
                "required": ["count"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "remove")
]
# the template of tiny-qwen3, which has no tools, with tools
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<tool_call></tool_call><|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "white", "black")


def picture(chance: random.Random) -> Json:
    """A part of a message: a PNG of two colours."""
    image = Image.new(
        "RGB", (chance.randint(20, 99), chance.randint(20, 99)), chance.choice(COLOURS)
    )
    image.paste(Image.new("RGB", (16, 16), chance.choice(COLOURS)), (3, 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class RequestMaker:
    """sees: whether the model takes images. A text model has CHAT_TEMPLATE."""

    def __init__(self, chance: random.Random, *, sees: bool) -> None:
        self._chance, self._sees = chance, sees

    def request(self, number: int) -> tuple[str, Json]:
        """The path and the body of a request."""
        make = (self._chat, self._chat, self._completion, self._completion, self._response)
        return make[number % len(make)]()

    def _sampling(self) -> Json:
        chance = self._chance
        body: Json = {"max_tokens": chance.choice([1, 5, 19, 64, 150]), "temperature": 0}
        if chance.random() < 0.4:
            body["ignore_eos"] = True
        if chance.random() < 0.6:
            body |= {"temperature": chance.choice([0.5, 1.0, 1.7]), "seed": chance.randrange(999)}
            body |= {"n": chance.choice([1, 1, 2, 3])}
        options: list[Json] = [
            {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.05}, {"repetition_penalty": 1.3},
            {"presence_penalty": 0.7}, {"frequency_penalty": 0.9}, {"stop": ["e", " 1"]},
            {"stop": "a", "include_stop_str_in_output": True}, {"logit_bias": {"11": 5, "9": -100}},
            {"bad_words": ["the"]}, {"stop_token_ids": [20, 30]},
            {"min_tokens": min(4, body["max_tokens"])},
        ]  # fmt: skip
        for option in chance.sample(options, chance.randint(0, 3)):
            body |= option
        return body

    def _structure(self) -> Json:
        form = self._chance.choice([
            {"json": SCHEMA}, {"regex": r"[a-c]{3}-\d{2,4}"}, {"choice": ["yes", "no", "maybe"]},
        ])  # fmt: skip
        limits = {"temperature": 1.0, "seed": self._chance.randrange(99), "max_tokens": 80}
        return {"structured_outputs": form, **limits}

    def _completion(self) -> tuple[str, Json]:
        chance = self._chance
        text = " ".join(chance.choice(QUESTIONS) for _ in range(chance.choice([1, 1, 3, 20])))
        ids = [chance.randrange(256) for _ in range(chance.choice([1, 19, 64, 99]))]
        body: Json = {"prompt": chance.choice([text, ids])}
        if chance.random() < 0.2:
            return "/v1/completions", body | self._structure()
        body |= self._sampling()
        if chance.random() < 0.3:
            body["echo"] = True
        if chance.random() < 0.4:
            body["logprobs"] = chance.choice([0, 2])
        return "/v1/completions", body

    def _messages(self) -> list[Json]:
        chance = self._chance
        content: Any = chance.choice(QUESTIONS)
        if self._sees and chance.random() < 0.6:
            parts = [picture(chance)]
            if chance.random() < 0.5:  # the same twice
                parts *= 2
            content = [*parts, {"type": "text", "text": "What is left of the square?"}]
        return [{"role": "user", "content": content}]

    def _chat(self) -> tuple[str, Json]:
        chance = self._chance
        body: Json = {"messages": self._messages()}
        kind = chance.random()
        if kind < 0.15:
            return "/v1/chat/completions", body | self._structure()
        if kind < 0.3 and not self._sees:
            forced = chance.choice(["required", {"type": "function", "function": {"name": "add"}}])
            limits = {"temperature": 1.0, "seed": chance.randrange(99), "max_tokens": 90}
            return "/v1/chat/completions", body | {"tools": TOOLS, "tool_choice": forced, **limits}
        body |= self._sampling()
        if chance.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": chance.choice([0, 3])}
        return "/v1/chat/completions", body

    def _response(self) -> tuple[str, Json]:
        body: Json = {"input": self._chance.choice(QUESTIONS), "temperature": 0}
        body["max_output_tokens"] = self._chance.choice([1, 7, 30])
        if self._chance.random() < 0.3:
            form = {"type": "json_schema", "name": "thing", "schema": SCHEMA}
            body |= {"text": {"format": form}, "max_output_tokens": 80}
        return "/v1/responses", body
