"""The program of a sandbox process that compiles grammars before the engine process does.

The library recurses into grammars: one that is nested too deeply overflows the stack and crashes
this process instead of the engine's. Compiling also cannot be interrupted; on a timeout this
process is killed. Threads have a smaller stack here than in the engine, so what compiles here
compiles there.

It reads the special tokens, then requests, and writes answers (`confined.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from nanovllm import confined, programs
from nanovllm.structured import library
from nanovllm.structured.library import Source

if TYPE_CHECKING:
    import llguidance

STACK_BYTES = 1 << 20
MEMORY_BYTES = 4 << 30


class Vocabulary:
    """The vocabulary for the library's tokenizer: the 256 bytes, and the special tokens with the
    model's ids, since grammars may name them. Text tokens of the model do not affect grammars."""

    bos_token_id = None

    def __init__(self, special: Mapping[int, str]) -> None:
        free = (index for index in count() if index not in special)
        of_byte = {next(free): bytes([byte]) for byte in range(256)}
        self._ids = list(of_byte)
        self.eos_token_id = next(free)
        found = of_byte | {index: text.encode() for index, text in special.items()}
        self.tokens = [found.get(index, b"") for index in range(max(*found, self.eos_token_id) + 1)]
        self.special_token_ids = [*special, self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._ids[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def new_tokenizer(special: Mapping[int, str]) -> llguidance.LLTokenizer:
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(special)))


def tried(tokenizer: llguidance.LLTokenizer, found: Source) -> dict[str, str]:
    """The grammar of a source, or its error."""
    import llguidance

    try:
        text = library.grammar(found)
    except (ValueError, RecursionError) as error:
        return {"error": library.short(str(error))}
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=library.limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return {"grammar": text}
    return {"error": library.short(matcher.get_error())}


def answer(tokenizer: llguidance.LLTokenizer, request: dict[str, Any]) -> dict[str, str]:
    """Run `tried` in a thread. Ends the process on a timeout."""
    answers: list[dict[str, str]] = []
    found = Source(request["kind"], request["text"])
    thread = threading.Thread(target=lambda: answers.append(tried(tokenizer, found)), daemon=True)
    thread.start()
    thread.join(request["timeout_s"])
    if thread.is_alive():
        os._exit(1)
    return answers[0] if answers else {"error": "the compiler failed"}


def main() -> None:
    programs.begin()  # a grammar may crash this process
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    special = confined.request() or {}
    tokenizer = new_tokenizer({int(token_id): text for token_id, text in special.items()})
    while (asked := confined.request()) is not None:
        confined.answer(answer(tokenizer, asked))


if __name__ == "__main__":
    main()
