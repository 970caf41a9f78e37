"""A GGUF model in llama.cpp, through the functions of its C interface that llama-cpp-python has.

Build the package on the machine, for the machine's own instructions:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python

T tokens of a call | V tokens of the vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]
INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
FP32 = 0  # GGML_TYPE_F32
NO_FLASH_ATTENTION = 0


class Token(NamedTuple):
    """A token at a place of a sequence; `wants` asks for the logits after it."""

    token_id: int
    place: int
    sequence: int = 0
    wants: bool = True


def library() -> Any:
    """The package llama_cpp. Raises ValueError if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise ValueError(f"this needs the package llama-cpp-python: {INSTALL}") from None
    return llama_cpp


class LlamaCpp:
    """A model with room for sequences of `max_tokens` each. `exact` keeps the cache in fp32 and
    computes attention in it; otherwise llama.cpp's defaults hold. Raises ValueError for a file that
    it cannot load."""

    def __init__(
        self,
        path: Path,
        num_threads: int,
        max_tokens: int,
        num_sequences: int = 1,
        *,
        exact: bool = False,
    ) -> None:
        self._lib: Any = library()
        self._silent = self._lib.llama_log_callback(lambda *_: None)  # kept as long as it is set
        self._lib.llama_log_set(self._silent, None)
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._num_vocab = self._lib.llama_vocab_n_tokens(self._vocab)
        context = self._lib.llama_context_default_params()
        context.n_ctx = num_sequences * max_tokens
        context.n_batch, context.n_ubatch = max(512, max_tokens), 512
        context.n_seq_max = num_sequences
        context.n_threads = context.n_threads_batch = num_threads
        if exact:
            context.type_k = context.type_v = FP32
            context.flash_attn_type = NO_FLASH_ATTENTION
        self._context = self._lib.llama_init_from_model(self._model, context)
        if not self._context:
            raise ValueError(f"llama.cpp has no memory for {num_sequences} x {max_tokens} tokens")
        self._most = context.n_batch
        self._batch = self._lib.llama_batch_init(self._most, 0, 1)

    def tokenize(self, text: str) -> list[int]:
        """With the tokens that the model begins a text with, and without special tokens in it."""
        raw = text.encode()
        found = (ctypes.c_int32 * (len(raw) + 8))()
        num = self._lib.llama_tokenize(self._vocab, raw, len(raw), found, len(found), True, False)
        return list(found[:num])

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, tokens: Iterable[Token]) -> Logits:
        """Compute a step; the logits [T, V] after those tokens that want them, a copy."""
        batch, wanted = self._batch, []
        num = 0
        for num, one in enumerate(tokens, 1):
            i = num - 1
            batch.token[i], batch.pos[i] = one.token_id, one.place
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, one.sequence, one.wants
            if one.wants:
                wanted.append(i)
        batch.n_tokens = num
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {num} tokens returns {code}")
        found = [
            np.ctypeslib.as_array(
                self._lib.llama_get_logits_ith(self._context, i), (self._num_vocab,)
            )
            for i in wanted
        ]
        return np.stack(found)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
