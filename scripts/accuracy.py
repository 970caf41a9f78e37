"""The accuracy gate: held-out questions of the embedded models' tasks, with greedy decoding.

    python scripts/accuracy.py --model tiny-qwen3
    python scripts/accuracy.py --model tiny-qwen3-vl
    python scripts/accuracy.py --model tiny-qwen3-vl --base-url http://127.0.0.1:8000

With --base-url the questions go to a running server; options of the engine are refused. A vision
model gets questions about pictures, the held-out ones of `tiny.picture_tasks`. A model trained with
tools also gets those of `tiny.tool_tasks`. Prints the accuracy by kind and one line of JSON. Exits
with 1 if the total is below --min-accuracy.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tiny import tasks, tool_tasks
from tiny.tasks import Task
from tiny.tool_results import as_json
from tiny.tool_tasks import Call, calls_text, is_correct

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.hub import resolve
from nanovllm.media import settings
from nanovllm.tools import command_line

MAX_TOKENS = 192  # the longest reference answers, two calls, have up to 180
NUM_SHOWN = 10
NUM_CLIENTS = 16  # requests to a server at once
TIMEOUT_S = 60.0


class Question(NamedTuple):
    task: Task
    messages: list[dict[str, Any]]


def questions(model: str, num: int, seed: int) -> list[Question]:
    """`num` held-out questions of the kind that the model was trained on."""
    folder = resolve(model, weights=False)
    if settings.load(folder) is None:
        arch = json.loads((folder / "config.json").read_text())["model_type"]
        if arch in tool_tasks.ARCHITECTURES:
            asked = tool_tasks.held_out(num, seed)
        else:
            asked = tasks.held_out(num, seed, tasks.kinds_of(arch))
        return [Question(one, list(one.messages)) for one in asked]
    from tiny import picture_tasks  # needs Pillow

    return [Question(one.task, one.messages) for one in picture_tasks.held_out(num, seed)]


def ask(llm: LLM, asked: Sequence[Question]) -> tuple[dict[str, float], float, list[str]]:
    """Greedy answers to questions: accuracy by kind, accuracy of all, and a line per mistake."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    if any(one.task.tools for one in asked):
        prompts = [
            llm.chat_prompts(one.messages, tools=list(one.task.tools) or None)[0] for one in asked
        ]
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    else:
        outputs = llm.chat([one.messages for one in asked], params, use_tqdm=sys.stderr.isatty())
    return score(asked, [output["text"] for output in outputs])


def ask_server(
    url: str, model: str, asked: Sequence[Question]
) -> tuple[dict[str, float], float, list[str]]:
    """The same through chat completions of the server at `url`."""

    def answer(question: Question) -> str:
        body = {
            "model": model, "messages": [_as_json(one) for one in question.messages],
            "temperature": 0, "max_tokens": MAX_TOKENS, "tools": list(question.task.tools) or None,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as given:
            return _as_text(json.load(given)["choices"][0]["message"])

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return score(asked, list(pool.map(answer, asked)))


def _as_text(message: dict[str, Any]) -> str:
    """The model's original text: the server has parsed the calls out of it."""
    functions = [one["function"] for one in message.get("tool_calls") or ()]
    calls = [Call(one["name"], json.loads(one["arguments"])) for one in functions]
    return "\n".join(filter(None, (message["content"], calls_text(calls))))


def _as_json(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose pictures are PNG in data URLs."""
    if "tool_calls" in message:  # in OpenAI's API arguments are text
        functions = [one["function"] for one in message["tool_calls"]]
        calls = [
            {"type": "function", "id": f"call_{idx}",
             "function": {**one, "arguments": as_json(one["arguments"])}}
            for idx, one in enumerate(functions)
        ]  # fmt: skip
        return {**message, "tool_calls": calls}
    if isinstance(message["content"], str):
        return message
    content = []
    for part in message["content"]:
        if part["type"] == "image":
            file = io.BytesIO()
            part["image"].save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        content.append(part)
    return {**message, "content": content}


def score(
    asked: Sequence[Question], texts: Sequence[str]
) -> tuple[dict[str, float], float, list[str]]:
    """Accuracy by kind, accuracy of all, and a line per mistake."""
    num_asked, num_right = Counter(one.task.kind for one in asked), Counter[str]()
    wrong: list[str] = []
    for (task, _), text in zip(asked, texts, strict=True):
        if is_correct(task, text):
            num_right[task.kind] += 1
        else:
            wrong.append(f"{task.question!r} -> {text!r}, not {task.answer!r}")
    by_kind = {kind: num_right[kind] / num for kind, num in num_asked.items()}
    return by_kind, num_right.total() / len(asked), wrong


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the engine."""
    return {
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "expert_offload": args.expert_offload,
        "enforce_eager": args.enforce_eager,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny-qwen3", help="a folder, or the name of an embedded model"
    )
    parser.add_argument("--base-url", help="use this server instead of an engine")
    parser.add_argument("--num", type=int, default=500, help="number of questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=("int8",), help="format of the stored weights")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto or fp8")
    parser.add_argument("--expert-offload", type=int, help="resident experts of each layer")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="run without compiled programs"
    )
    parser.add_argument("--min-accuracy", type=float, default=0.95)
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f"--num is {args.num}: it must be at least 1")
    if args.base_url:
        for name, value in _options(args).items():
            if value != parser.get_default(name):
                option = name.replace("_", "-")
                parser.error(f"--{option} is {value}: the server chooses it with --base-url")

    asked = questions(args.model, args.num, args.seed)
    llm = None if args.base_url else LLM(args.model, **_options(args))
    started = time.perf_counter()
    if llm is None:
        by_kind, accuracy, wrong = ask_server(args.base_url, args.model, asked)
    else:
        by_kind, accuracy, wrong = ask(llm, asked)
    seconds = time.perf_counter() - started

    for line in wrong[:NUM_SHOWN]:
        print(f"wrong: {line}")
    if len(wrong) > NUM_SHOWN:
        print(f"wrong: {len(wrong) - NUM_SHOWN} more")
    num_asked = Counter(one.task.kind for one in asked)
    for kind, value in by_kind.items():
        print(f"{kind:10} {value:7.1%}  of {num_asked[kind]}")
    summary = {
        "model": args.model,
        **({"base_url": args.base_url} if llm is None else _options(args)),
        "num": len(asked),
        "accuracy": round(accuracy, 4),
        "min_accuracy": args.min_accuracy,
        "by_kind": {kind: round(value, 4) for kind, value in by_kind.items()},
        "seconds": round(seconds, 2),
    }
    print(json.dumps(summary))
    return 0 if accuracy >= args.min_accuracy else 1


if __name__ == "__main__":
    sys.exit(command_line.run(main))
