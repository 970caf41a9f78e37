"""Embeds the lines of a file, or of stdin, one JSON object per line.

    nanovllm embed texts.txt --model Qwen/Qwen3-Embedding-0.6B > embeddings.jsonl
    nanovllm embed texts.txt --model BAAI/bge-small-en-v1.5 -o embeddings.npy

A line of the output has "index", "embedding" and "num_tokens". A file that ends with .npy gets an
array instead: float32, one row per line. nanovllm batch answers files of JSON objects, and resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from nanovllm import log
from nanovllm.cli.engine_options import add_engine_options, engine_options
from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser

USAGE = "FILE [options]"
NUM_AT_ONCE = 4096  # lines
ARRAY = ".npy"


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="a file with one text per line; - is stdin")
    add("-o", "--output", type=Path, metavar="FILE", help="the file to write (default: stdout)")
    add("--dimensions", type=int, metavar="N", help="keep the first N numbers")
    truncate = "keep the first N tokens of a text; -1: as many as the model takes"
    add("--truncate", type=int, metavar="N", help=truncate)
    progress = argparse.BooleanOptionalAction
    add("--progress", action=progress, default=True, help="show a progress bar")
    add_quiet(parser)
    add_engine_options(parser, skip=("task",))


def main(args: argparse.Namespace) -> None:
    """Write the embeddings. Raises ValueError, with the line's number, and OSError."""
    from nanovllm import LLM, PoolingParams

    params = PoolingParams(dimensions=args.dimensions, truncate_prompt_tokens=args.truncate)
    model, options = engine_options(args, skip=("task",))
    log.configure()
    with ExitStack() as stack:
        source = sys.stdin
        if args.file != "-":
            _check_output(Path(args.file), args.output)
            source = stack.enter_context(open(args.file, encoding="utf-8"))
        llm = LLM(model, task="embed", **options)
        stack.callback(llm.close)
        is_array = args.output is not None and args.output.suffix == ARRAY
        target: TextIO = sys.stdout
        if args.output is not None and not is_array:
            # not before: a model that does not load must not empty an older output
            target = stack.enter_context(open(args.output, "w", encoding="utf-8"))
        found = _embedded(llm, source, params, show_progress=args.progress)
        if is_array:
            _save_array(args.output, found)
        else:
            for index, output in enumerate(found):
                numbers, num_tokens = output.outputs.embedding, len(output.prompt_token_ids)
                fields = {"index": index, "embedding": numbers, "num_tokens": num_tokens}
                target.write(f"{json.dumps(fields)}\n")
            target.flush()


def _check_output(source: Path, target: Path | None) -> None:
    if target is not None and target.is_file() and target.samefile(source):
        raise ValueError(f"{target} is the input: use another file with -o")


def _embedded(llm: Any, source: TextIO, params: Any, *, show_progress: bool) -> Iterator[Any]:
    """The outputs of all lines, in order."""
    first = 1
    while texts := [line.rstrip("\r\n") for line in islice(source, NUM_AT_ONCE)]:
        _check(texts, first)
        yield from llm.embed(texts, pooling_params=params, use_tqdm=show_progress)
        first += len(texts)


def _check(texts: Sequence[str], first: int) -> None:
    for number, text in enumerate(texts, first):
        if not text:
            raise ValueError(f"line {number} is empty: it must have at least 1 token")


def _save_array(path: Path, found: Iterator[Any]) -> None:
    import numpy as np

    rows = [np.array(output.outputs.embedding, np.float32) for output in found]
    if not rows:
        raise ValueError("there are no lines to embed")
    np.save(path, np.stack(rows))
