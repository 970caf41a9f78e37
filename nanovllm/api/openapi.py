"""The server's OpenAPI document, generated from the types of the bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from nanovllm.api import anthropic_schemas, pooling_schemas, schemas
from nanovllm.api.service import Service

POSTS: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": schemas.CompletionBody,
    "/v1/chat/completions": schemas.ChatBody,
    "/v1/responses": schemas.ResponsesBody,
    "/v1/responses/input_tokens": schemas.InputTokensBody,
    "/v1/messages": anthropic_schemas.MessagesBody,
    "/v1/messages/count_tokens": anthropic_schemas.CountTokensBody,
    "/v1/embeddings": pooling_schemas.EmbeddingBody,
    "/pooling": pooling_schemas.PoolingBody,
    "/classify": pooling_schemas.ClassifyBody,
    **dict.fromkeys(("/score", "/v1/score"), pooling_schemas.ScoreBody),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), pooling_schemas.RerankBody),
    "/v1/load_lora_adapter": schemas.LoadAdapterBody,
    "/v1/unload_lora_adapter": schemas.UnloadAdapterBody,
    "/tokenize": schemas.TokenizeBody,
    "/detokenize": schemas.DetokenizeBody,
}
GETS = ("/v1/models", "/health", "/ready", "/version", "/metrics", "/openapi.json")
STATUSES = ("400", "401", "404", "408", "413", "415", "429", "500", "503")
# endpoints whose errors have Anthropic's format
OF_ANTHROPIC = (anthropic_schemas.MessagesBody, anthropic_schemas.CountTokensBody)
ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": "string"},
    },
    "required": ["type", "error", "request_id"],
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def description(service: Service) -> dict[str, Any]:
    """The OpenAPI document."""
    from nanovllm import __version__

    kinds = list(dict.fromkeys(POSTS.values()))
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, schemas))
    for kind in kinds:
        components[kind.__name__]["additionalProperties"] = False
    paths: dict[str, Any] = {
        path: {"post": _operation(kind.__doc__ or "", by_kind[kind], _error_of(kind))}
        for path, kind in POSTS.items()
    }
    paths |= {path: {"get": _operation(f"GET {path}.")} for path in GETS}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"nanovllm: {service.model}", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
        },
    }
    if service.config.root_path:
        document["servers"] = [{"url": service.config.root_path}]
    if service.config.api_key:
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"key": []}, {"header": []}]
    return document


def _error_of(kind: type[msgspec.Struct]) -> str:
    return "AnthropicError" if kind in OF_ANTHROPIC else "Error"


def _operation(
    summary: str, schema: dict[str, Any] | None = None, error_name: str = "Error"
) -> dict[str, Any]:
    ref = {"$ref": f"#/components/schemas/{error_name}"}
    error = {"description": "an error", "content": {"application/json": {"schema": ref}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "the answer"}, **dict.fromkeys(STATUSES, error)},
    }
    if schema is not None:
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation
