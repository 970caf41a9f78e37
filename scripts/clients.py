"""Tests a running server with common client libraries, and prints a table of working features.

    python -m venv clients
    clients/bin/pip install anthropic instructor langchain-openai litellm openai openai-agents
    python scripts/clients.py --write-model folder       # in nanovllm's environment
    nanovllm serve folder --served-model-name tiny-qwen3
    clients/bin/python scripts/clients.py

`--write-model` copies tiny-qwen3 with a chat template that has tools. Clients that are not
installed are skipped. litellm requires an openai client below 3; run `--clients openai` also with a
newer one. Each client requests a plain answer, a stream, an answer to a conversation with its own
last answer, a call of a tool and an answer to its result, an answer that matches a schema, and a
model that the server does not have. `scripts/clients.mjs` does the same in JavaScript. Exits with 1
if a case fails.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.tools import command_line

MODEL = "tiny-qwen3"
CASES = ("plain", "stream", "turns", "tools", "form", "error")
QUESTION = "What is 3 + 4?"
USER = {"role": "user", "content": QUESTION}
AGAIN = {"role": "user", "content": "What is 5 + 6?"}
SCHEMA: Any = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"], "additionalProperties": False, "maxProperties": 1,
}  # fmt: skip
TOOL = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
RESULT = "7 degrees"
MOST = 200  # tokens of an answer
TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>\\n' }}{%- for tool in tools %}"
    "{{- (tool | tojson) + '\\n' }}{%- endfor %}{{- '</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}{%- endif %}"
    "{{- message.content }}{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


# copies, since clients change their arguments
def tool() -> Any:
    return copy.deepcopy(TOOL)


def schema() -> Any:
    return copy.deepcopy(SCHEMA)


def check(is_so: Any, words: str) -> None:
    if not is_so:
        raise AssertionError(words)


def check_city(given: Any) -> None:
    check(given in SCHEMA["properties"]["city"]["enum"], f"the city is {given!r}")


def fails(work: Callable[[], Any], name: str = "NotFoundError") -> None:
    """Check that `work` raises the error of an unknown model."""
    try:
        work()
    except Exception as error:
        chain: Any = error
        while chain is not None and type(chain).__name__ != name and name not in str(chain):
            chain = chain.__cause__ or chain.__context__
        if chain is None:
            raise
        check("there is no model" in str(error), f"the message is lost: {error}")
    else:
        raise AssertionError("no error is raised")


class Client:
    """A client. Its methods are the cases; it does not support cases without a method."""

    def __init__(self, url: str, model: str, *, key: str) -> None:
        self.url, self.model, self.key = url, model, key


class OpenAI(Client):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        module = importlib.import_module("openai")
        self.client = module.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def ask(self, messages: Any, **options: Any) -> Any:
        given = {"model": self.model, "max_tokens": MOST, **options}
        return self.client.chat.completions.create(messages=messages, **given)

    def plain(self) -> None:
        check(self.ask([USER]).choices[0].message.content, "there is no text")

    def stream(self) -> None:
        options = {"stream_options": {"include_usage": True}}
        chunks = list(self.ask([USER], stream=True, **options))
        check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), "no text")
        check(chunks[-1].usage.completion_tokens, "no usage")

    def turns(self) -> None:
        message = self.ask([USER]).choices[0].message
        check(self.ask([USER, message, AGAIN]).choices[0].message.content, "no text")
        whole = message.model_dump()  # with what is null
        check(self.ask([USER, whole, AGAIN]).choices[0].message.content, "no text")

    def tools(self) -> None:
        tools = [{"type": "function", "function": tool()}]
        message = self.ask([USER], tools=tools, tool_choice="required",
                           parallel_tool_calls=False).choices[0].message  # fmt: skip
        call = message.tool_calls[0]
        check_city(json.loads(call.function.arguments)["city"])
        result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
        check(self.ask([USER, message, result], tools=tools).choices[0].message, "no answer")

    def form(self) -> None:
        form = {"name": "place", "schema": schema(), "strict": True}
        done = self.ask([USER], response_format={"type": "json_schema", "json_schema": form})
        check_city(json.loads(done.choices[0].message.content)["city"])

    def error(self) -> None:
        fails(lambda: self.ask([USER], model="nothing"))


class Responses(OpenAI):
    """The other API of OpenAI's client."""

    def ask(self, messages: Any, **options: Any) -> Any:
        given = {"model": self.model, "max_output_tokens": MOST, **options}
        return self.client.responses.create(input=messages, **given)

    def plain(self) -> None:
        check(self.ask(QUESTION).output_text, "there is no text")

    def stream(self) -> None:
        events = list(self.ask(QUESTION, stream=True))
        check(events[-1].response.output_text, "no text")

    def turns(self) -> None:
        output = self.ask(QUESTION).output
        check(self.ask([USER, *output, AGAIN]).output_text, "no text")

    def tools(self) -> None:
        tools = [{"type": "function", **tool(), "strict": False}]
        output = self.ask([USER], tools=tools, tool_choice="required",
                          parallel_tool_calls=False).output  # fmt: skip
        call = next(one for one in output if one.type == "function_call")
        check_city(json.loads(call.arguments)["city"])
        result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
        check(self.ask([USER, *output, result], tools=tools).output is not None, "no answer")

    def form(self) -> None:
        form = {"type": "json_schema", "name": "place", "schema": schema(), "strict": True}
        check_city(json.loads(self.ask(QUESTION, text={"format": form}).output_text)["city"])

    def error(self) -> None:
        fails(lambda: self.ask(QUESTION, model="nothing"))


class LiteLLM(OpenAI):
    """It has the methods of OpenAI's client. provider: selects the API."""

    def __init__(self, *args: Any, provider: str = "hosted_vllm", **options: Any) -> None:
        Client.__init__(self, *args, **options)
        self._provider = provider
        self._module = importlib.import_module("litellm")

    def ask(self, messages: Any, **options: Any) -> Any:
        model = f"{self._provider}/{options.pop('model', self.model)}"
        url = self.url if self._provider == "anthropic" else f"{self.url}/v1"
        return self._module.completion(
            model=model, messages=messages, api_base=url, api_key=self.key, num_retries=0,
            **{"max_tokens": MOST, **options},
        )  # fmt: skip


class LangChain(Client):
    def chat(self, **options: Any) -> Any:
        module = importlib.import_module("langchain_openai")
        given = {"model": self.model, "max_tokens": MOST, "max_retries": 0, **options}
        return module.ChatOpenAI(base_url=f"{self.url}/v1", api_key=self.key, **given)

    def plain(self) -> None:
        check(self.chat().invoke(QUESTION).content, "there is no text")

    def stream(self) -> None:
        check("".join(one.content for one in self.chat().stream(QUESTION)), "no text")

    def turns(self) -> None:
        message = self.chat().invoke([USER])
        check(self.chat().invoke([USER, message, AGAIN]).content, "no text")

    def tools(self) -> None:
        messages = importlib.import_module("langchain_core.messages")
        tools = [{"type": "function", "function": tool()}]
        forced = self.chat().bind_tools(tools, tool_choice="any", parallel_tool_calls=False)
        message = forced.invoke([USER])
        call = message.tool_calls[0]
        check_city(call["args"]["city"])
        result = messages.ToolMessage(RESULT, tool_call_id=call["id"])
        check(self.chat().bind_tools(tools).invoke([USER, message, result]), "no answer")

    def form(self) -> None:
        titled = {"title": "place", "description": "A place.", **schema()}
        for method in ("json_schema", "function_calling"):
            asked = self.chat().with_structured_output(titled, method=method)
            check_city(asked.invoke(QUESTION)["city"])

    def error(self) -> None:
        fails(lambda: self.chat(model="nothing").invoke(QUESTION))


class Instructor(Client):
    """Made for structured output: its tool calls are structured output, too."""

    def made(self, mode: str, *, base: str = "openai") -> Any:
        module = importlib.import_module("instructor")
        if base == "anthropic":
            client = importlib.import_module(base).Anthropic(base_url=self.url, api_key=self.key)
            return module.from_anthropic(client, mode=module.Mode[mode])
        client = importlib.import_module(base).OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0
        )
        return module.from_openai(client, mode=module.Mode[mode])

    def place(self) -> Any:
        typing = importlib.import_module("typing")
        create = importlib.import_module("pydantic").create_model
        config = {"extra": "forbid"}  # a small model would continue with other fields
        return create("Place", __config__=config, city=(typing.Literal["Oslo", "Rome"], ...))

    def ask(self, mode: str, messages: Any, form: Any, base: str = "openai", **options: Any) -> Any:
        return self.made(mode, base=base).chat.completions.create(
            messages=messages, response_model=form, max_retries=0,
            **{"model": self.model, "max_tokens": MOST, **options},
        )  # fmt: skip

    def plain(self) -> None:
        check(self.ask("TOOLS", [USER], None).choices[0].message.content, "there is no text")

    def stream(self) -> None:
        found = self.made("JSON_SCHEMA").chat.completions.create_partial(
            messages=[USER], response_model=self.place(), model=self.model, max_tokens=MOST
        )
        check_city(list(found)[-1].city)

    def turns(self) -> None:
        message = self.ask("TOOLS", [USER], None).choices[0].message.model_dump()
        check_city(self.ask("TOOLS", [USER, message, AGAIN], self.place()).city)

    def tools(self) -> None:
        check_city(self.ask("TOOLS", [USER], self.place()).city)
        check_city(self.ask("ANTHROPIC_TOOLS", [USER], self.place(), "anthropic").city)

    def form(self) -> None:
        check_city(self.ask("JSON_SCHEMA", [USER], self.place()).city)

    def error(self) -> None:
        fails(lambda: self.ask("TOOLS", [USER], self.place(), model="nothing"))


class Agents(Client):
    """model_class: selects the API."""

    model_class = "OpenAIChatCompletionsModel"

    def agent(self, *, model: str | None = None, output: Any = None, **options: Any) -> Any:
        self.module = importlib.import_module("agents")
        self.module.set_tracing_disabled(True)
        client = importlib.import_module("openai").AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0
        )
        made = getattr(self.module, self.model_class)(model or self.model, client)
        settings = self.module.ModelSettings(max_tokens=MOST, **options.pop("settings", {}))
        return self.module.Agent(
            name="one", model=made, model_settings=settings, output_type=output, **options
        )

    def run(self, agent: Any, given: Any) -> Any:
        return self.module.Runner.run_sync(agent, given, max_turns=2)

    def plain(self) -> None:
        check(self.run(self.agent(), QUESTION).final_output, "there is no text")

    def stream(self) -> None:
        async def work() -> list[Any]:
            agent = self.agent()
            return [
                e async for e in self.module.Runner.run_streamed(agent, QUESTION).stream_events()
            ]

        kinds = [getattr(one, "data", one).type for one in asyncio.run(work())]
        check("response.output_text.delta" in kinds, f"no text: {kinds}")

    def turns(self) -> None:
        agent = self.agent()
        before = self.run(agent, QUESTION).to_input_list()
        check(self.run(agent, [*before, AGAIN]).final_output, "no text")

    def tools(self) -> None:
        cities: list[str] = []

        async def invoked(_: Any, arguments: str) -> str:
            cities.append(json.loads(arguments)["city"])
            return RESULT

        self.agent()
        tool = self.module.FunctionTool(
            name=TOOL["name"], description=TOOL["description"], params_json_schema=schema(),
            on_invoke_tool=invoked,
        )  # fmt: skip
        settings = {"tool_choice": "required", "parallel_tool_calls": False}
        done = self.run(self.agent(tools=[tool], settings=settings), QUESTION)
        check_city(cities[0])
        check(done.final_output is not None, "no answer")

    def form(self) -> None:
        place = Instructor.place(self)  # type: ignore[arg-type]
        check_city(self.run(self.agent(output=place), QUESTION).final_output.city)

    def error(self) -> None:
        agent = self.agent(model="nothing")
        fails(lambda: self.run(agent, QUESTION))


class ResponsesAgents(Agents):
    model_class = "OpenAIResponsesModel"


class Anthropic(Client):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        module = importlib.import_module("anthropic")
        self.client = module.Anthropic(base_url=self.url, api_key=self.key, max_retries=0)

    def ask(self, messages: Any, **options: Any) -> Any:
        given = {"model": self.model, "max_tokens": MOST, **options}
        return self.client.messages.create(messages=messages, **given)

    def plain(self) -> None:
        done = self.ask([USER], system="Be brief.")
        check(done.content[0].text and done.usage.output_tokens, "there is no text")
        count = self.client.messages.count_tokens(model=self.model, messages=[USER])
        check(count.input_tokens, "nothing is counted")

    def stream(self) -> None:
        given = {"model": self.model, "max_tokens": MOST, "messages": [USER]}
        with self.client.messages.stream(**given) as stream:
            texts = list(stream.text_stream)
            check("".join(texts) == stream.get_final_message().content[0].text, "texts differ")

    def turns(self) -> None:
        answer = {"role": "assistant", "content": self.ask([USER]).content}
        check(self.ask([USER, answer, AGAIN]).content, "no text")

    def tools(self) -> None:
        tools = [
            {"name": TOOL["name"], "description": TOOL["description"], "input_schema": schema()}
        ]
        choice = {"type": "tool", "name": TOOL["name"], "disable_parallel_tool_use": True}
        done = self.ask([USER], tools=tools, tool_choice=choice)
        check_city(done.content[0].input["city"])
        check(done.stop_reason == "tool_use", f"stop_reason is {done.stop_reason}")
        result = {"type": "tool_result", "tool_use_id": done.content[0].id, "content": RESULT}
        answer = {"role": "assistant", "content": done.content}
        check(self.ask([USER, answer, {"role": "user", "content": [result]}], tools=tools), "none")

    def form(self) -> None:
        output = {"format": {"type": "json_schema", "schema": schema()}}
        check_city(json.loads(self.ask([USER], output_config=output).content[0].text)["city"])

    def error(self) -> None:
        fails(lambda: self.ask([USER], model="nothing"))


CLIENTS: dict[str, Callable[..., Client]] = {
    "openai": OpenAI,
    "openai-responses": Responses,
    "litellm": LiteLLM,
    "litellm-openai": lambda *args, **options: LiteLLM(*args, provider="openai", **options),
    "litellm-anthropic": lambda *args, **options: LiteLLM(*args, provider="anthropic", **options),
    "langchain": LangChain,
    "instructor": Instructor,
    "agents": Agents,
    "agents-responses": ResponsesAgents,
    "anthropic": Anthropic,
}


def outcome(client: Client, case: str) -> str:
    work = getattr(client, case, None)
    if work is None:
        return "none"
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def write_model(folder: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "nanovllm" / "assets" / MODEL, folder)
    place = folder / "tokenizer_config.json"
    config = json.loads(place.read_text(encoding="utf-8")) | {"chat_template": TEMPLATE}
    place.write_text(json.dumps(config), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--api-key", default="any")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--write-model", type=Path, help="write a model into a new folder, and end")
    given = parser.parse_args()
    if given.write_model is not None:
        write_model(given.write_model)
        return 0
    os.environ["LITELLM_LOG"] = "ERROR"
    problems = []
    print("| client |", " | ".join(CASES), "|")
    print("|---" * (len(CASES) + 1) + "|")
    for name in given.clients:
        try:
            client = CLIENTS[name](given.url, given.model, key=given.api_key)
            found = {case: outcome(client, case) for case in CASES}
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        problems += [f"{name}, {case}: {text}" for case, text in found.items()
                     if text not in ("ok", "none")]  # fmt: skip
        cells = [text if text in ("ok", "none") else "FAILS" for text in found.values()]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    print("\n".join(["", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
