"""Training conversations as one long sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from tiny import tasks, tool_tasks
from tiny.chat_tokenizer import END, PAD, START
from tiny.tasks import Message, Task, Tool
from tiny.tool_results import as_json
from tiny.tool_tasks import Call, calls_text
from tiny.wordings import MODEL_NAME
from tokenizers import Tokenizer
from tqdm import tqdm

EXAMPLES_PER_CHUNK = 20_000


def conversation(task: Task, model_name: str) -> list[Message]:
    """The task and its answer as chat messages. Answers contain `model_name`."""
    messages = [*task.messages, {"role": "assistant", "content": task.answer}]
    for message in messages:
        if message["role"] == "assistant" and message["content"] is not None:
            message["content"] = message["content"].replace(MODEL_NAME, model_name)
    return messages


def render(messages: list[Message], tools: Sequence[Tool] = ()) -> str:
    """The whole conversation as text, as the chat template writes it."""
    head = ""
    if tools:
        system = ""
        if messages[0]["role"] == "system":
            system, messages = f"{messages[0]['content']}\n", messages[1:]
        listed = "".join(map(_tool_line, tools))
        head = f"{START}system\n{system}<tools>\n{listed}</tools>{END}\n"
    return head + "".join(f"{START}{one['role']}\n{_content(one)}{END}\n" for one in messages)


def _tool_line(tool: Tool) -> str:
    function = tool["function"]
    described = f": {function['description']}" if "description" in function else ""
    return f"{function['name']}{described} {as_json(function['parameters']['properties'])}\n"


def _content(message: Message) -> str:
    if message["content"] is not None:
        return str(message["content"])
    return calls_text([Call(**one["function"]) for one in message["tool_calls"]])


@dataclass(frozen=True)
class Corpus:
    """Conversations one after another. T tokens, D conversations."""

    tokens_T: np.ndarray  # int16
    is_answer_T: np.ndarray  # bool: the tokens of answers, their <|im_end|> included
    starts_D: np.ndarray  # int64


def _encode_chunk(
    tokenizer_json: str, model_name: str, kinds: Sequence[str] | None, seed: str, num: int
) -> Corpus:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab = tokenizer.get_vocab()
    pad, start, end, assistant = (vocab[token] for token in (PAD, START, END, "assistant"))
    pieces: list[list[int]] = []
    examples = (
        tool_tasks.training_examples(seed)
        if kinds is None
        else tasks.training_examples(seed, kinds)
    )
    for task in islice(examples, num):
        text = render(conversation(task, model_name), task.tools)
        pieces.append([*tokenizer.encode(text).ids, pad])
    lens = np.fromiter(map(len, pieces), np.int64, len(pieces))
    tokens_T = np.fromiter(
        (token for piece in pieces for token in piece), np.int16, int(lens.sum())
    )
    heads = (
        np.flatnonzero((tokens_T[:-1] == start) & (tokens_T[1:] == assistant)) + 3
    )  # past 'assistant' and newline
    ends = np.flatnonzero(tokens_T == end)
    tails = ends[np.searchsorted(ends, heads)] + 1
    edges_T = np.zeros(len(tokens_T) + 1, np.int8)
    edges_T[heads], edges_T[tails] = 1, -1
    return Corpus(tokens_T, np.cumsum(edges_T[:-1]).astype(bool), np.cumsum(lens) - lens)


def build_corpus(
    tokenizer_json: str,
    model_name: str,
    *,
    with_tools: bool = False,
    kinds: Sequence[str] = tasks.KINDS,
    seed: int,
    num_examples: int,
    num_workers: int,
) -> Corpus:
    """Generate and encode conversations; `model_name` is the model's name in answers.

    with_tools: those of `tool_tasks`, a part of which have tools; else of these `kinds`.

    The result depends only on the seed and the number of examples, not on the workers.
    """
    sizes = [
        min(EXAMPLES_PER_CHUNK, num_examples - done)
        for done in range(0, num_examples, EXAMPLES_PER_CHUNK)
    ]
    seeds = [f"{seed}.{chunk_idx}" for chunk_idx in range(len(sizes))]
    encode = partial(_encode_chunk, tokenizer_json, model_name, None if with_tools else kinds)
    with ProcessPoolExecutor(num_workers) as pool:
        results = pool.map(encode, seeds, sizes)
        chunks = list(tqdm(results, total=len(sizes), desc="examples", unit="chunk", mininterval=5))
    offsets = np.cumsum([0] + [len(chunk.tokens_T) for chunk in chunks[:-1]])
    return Corpus(
        np.concatenate([chunk.tokens_T for chunk in chunks]),
        np.concatenate([chunk.is_answer_T for chunk in chunks]),
        np.concatenate(
            [chunk.starts_D + offset for chunk, offset in zip(chunks, offsets, strict=True)]
        ),
    )
