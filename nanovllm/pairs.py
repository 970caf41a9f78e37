"""Pairs of texts for models that score them: their prompts, and scores of two embeddings.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

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


class Form(NamedTuple):
    """A pair in a published form. start: all before the document, with the query. end: all after
    it."""

    start: str
    document: str
    end: str


def pair_prompt(
    info: PoolingInfo,
    tokenizer: Tokenizer | None,
    first: str,
    second: str,
    instruction: str | None = None,
    limit: int | None = None,
) -> Prompt:
    """The prompt of a query and a document for a model with a head for pairs.

    An encoder's tokenizer joins them; a reranker with a published form has that, with its
    instruction; others get one text after the other. With a limit the end of the second is dropped,
    and what stands around it stays. Raises ValueError for an empty text, for an instruction where
    none is read, and for a first text that takes the limit.
    """
    for text in (first, second):
        if not text:
            raise PromptRefused("a text of the pair is empty: it must have at least 1 token")
        checked_text("a text of the pair", text)
    if info.template and not first.startswith(IS_WRITTEN):
        return _within(_published(info.template, first, second, instruction), tokenizer, limit)
    if instruction is not None:
        raise InvalidValue("instruction", "instruction is given, but this model reads none")
    if info.template:
        end = VL_END if info.template == "qwen3_vl" else END
        document = second.removesuffix(end)
        return _within(Form(first, document, second[len(document) :]), tokenizer, limit)
    if not info.has_pairs or tokenizer is None:
        return Prompt(first + second, None)
    token_ids, second_at = tokenizer.encode_pair(first, second, limit)
    return Prompt(None, token_ids, second_at=second_at if info.has_types else 0)


def _published(template: str, first: str, second: str, instruction: str | None) -> Form:
    if template == "qwen3_vl":
        what = instruction or VL_INSTRUCTION
        return Form(f"{START}<Instruct>: {what}<Query>:{first}\n<Document>:", second, VL_END)
    what = instruction or INSTRUCTION
    return Form(f"{START}<Instruct>: {what}\n<Query>: {first}\n<Document>: ", second, END)


def _within(form: Form, tokenizer: Tokenizer | None, limit: int | None) -> Prompt:
    """The prompt of a form, with at most `limit` tokens. The model answers after the form's end, so
    the document is cut in front of it."""
    text = "".join(form)
    if tokenizer is None or limit is None:
        return Prompt(text, None)
    found = tokenizer.encode_first(text, limit + 1)
    if len(found) <= limit:
        return Prompt(text, found)
    num_after = tokenizer.num_around()[1]
    end_ids = tokenizer.encode(form.end, add_special_tokens=False) + found[len(found) - num_after :]
    start_ids = tokenizer.encode(form.start)
    del start_ids[len(start_ids) - num_after :]
    kept = found[: max(0, limit - len(end_ids))]
    if kept == start_ids[: len(kept)]:
        raise ValueError(
            f"the query and the text around the pair take {len(start_ids) + len(end_ids)} tokens: "
            f"with at most {limit} none is left for the document"
        )
    return Prompt(text, kept + end_ids)


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
