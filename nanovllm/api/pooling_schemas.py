"""Request bodies of models that pool: every supported field with its type."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Input = str | list[str | int | list[int]]
Texts = str | list[str]
Json = dict[str, Any]


class Pooled(msgspec.Struct, kw_only=True):
    """Fields that all have in common."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None


class EmbeddingBody(Pooled, kw_only=True):
    """POST /v1/embeddings. In place of `input` there may be a conversation, which the chat template
    makes one text of."""

    input: Input | None = None
    messages: list[Json] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None


class PoolingBody(EmbeddingBody, kw_only=True):
    """POST /pooling: what the model makes, as it is."""

    task: Literal["embed", "classify"] | None = None


class ClassifyBody(Pooled, kw_only=True):
    """POST /classify."""

    input: Input
    use_activation: bool | None = None


class ScoreBody(Pooled, kw_only=True):
    """POST /score: two texts, or one text and several. The two sides have one of three names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    use_activation: bool | None = None
    instruction: str | None = None


class RerankBody(Pooled, kw_only=True):
    """POST /v1/rerank, /v2/rerank and /rerank, with the fields of Jina and Cohere."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | None = None
    use_activation: bool | None = None
    instruction: str | None = None
