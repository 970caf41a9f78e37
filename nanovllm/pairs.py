"""Pairs of texts for models that score them: their prompts, and scores of two embeddings.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from nanovllm.checks import InvalidValue
from nanovllm.pooling_params import PoolingInfo
from nanovllm.prompts import Prompt, PromptRefused, checked_text
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

Text = TypeVar("Text")

# The published prompt of Qwen3-Reranker
START = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# That of Qwen3-VL-Reranker: vLLM's examples/pooling/score/template/qwen3_vl_reranker.jinja
VL_END = "<|im_end|>\n<|im_start|>assistant\n"
VL_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
IS_WRITTEN = "<|im_start|>"  # texts that begin so have the prompt's form already


def pair_prompt(
    info: PoolingInfo,
    tokenizer: Tokenizer | None,
    first: str,
    second: str,
    instruction: str | None = None,
    limit: int | None = None,
) -> Prompt:
    """The prompt of a query and a document for a model with a head for pairs.

    An encoder's tokenizer joins them, and with a limit the end of the second is dropped; a
    reranker with a published form has that, with its instruction; others get one text after the
    other. Raises ValueError for an empty text, for an instruction where none is read, and for a
    first text that takes the limit.
    """
    for text in (first, second):
        if not text:
            raise PromptRefused("a text of the pair is empty: it must have at least 1 token")
        checked_text("a text of the pair", text)
    if info.template and not first.startswith(IS_WRITTEN):
        return Prompt(_published(info.template, first, second, instruction), None)
    if instruction is not None:
        raise InvalidValue("instruction", "instruction is given, but this model reads none")
    if not info.has_pairs or tokenizer is None:
        return Prompt(first + second, None)
    token_ids, second_at = tokenizer.encode_pair(first, second, limit)
    return Prompt(None, token_ids, second_at=second_at if info.has_types else 0)


def _published(template: str, first: str, second: str, instruction: str | None) -> str:
    if template == "qwen3_vl":
        what = instruction or VL_INSTRUCTION
        return f"{START}<Instruct>: {what}<Query>:{first}\n<Document>:{second}{VL_END}"
    what = instruction or INSTRUCTION
    return f"{START}<Instruct>: {what}\n<Query>: {first}\n<Document>: {second}{END}"


def paired(firsts: Sequence[Text], seconds: Sequence[Text]) -> list[tuple[Text, Text]]:
    """The pairs of two lists of equal lengths, or of one text with each of several. Raises
    ValueError for other lengths."""
    if not firsts or not seconds:
        raise ValueError("there are no pairs: both sides need at least one text")
    if len(firsts) == 1:
        firsts = [*firsts] * len(seconds)
    if len(firsts) != len(seconds):
        raise ValueError(
            f"{len(firsts)} and {len(seconds)} texts do not make pairs: give one, or as many as on "
            "the other side"
        )
    return list(zip(firsts, seconds))


def cosine(a_O: np.ndarray, b_O: np.ndarray) -> float:
    """a · b / (|a| |b|)."""
    length = math.sqrt(float(a_O @ a_O)) * math.sqrt(float(b_O @ b_O))
    return float(a_O @ b_O) / max(length, 1e-12)
