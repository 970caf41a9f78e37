"""Hints for clients that request an unknown path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CHAT, COMPLETIONS = "POST /v1/chat/completions", "POST /v1/completions"
EMBEDDINGS, TOKENIZE = "POST /v1/embeddings", "POST /tokenize"
MODELS, MODEL, VERSION = "GET /v1/models", "GET /v1/models/NAME", "GET /version"
HEALTH, READY, METRICS = "GET /health", "GET /ready", "GET /metrics"

# Paths of other servers and their equivalents here. Sources: the API documentation
# of ollama, llama.cpp's server, SGLang, text-generation-inference, SageMaker and KServe.
ELSEWHERE = {
    "/api/chat": CHAT, "/api/generate": COMPLETIONS, "/api/embed": EMBEDDINGS,
    "/api/embeddings": EMBEDDINGS, "/api/tags": MODELS, "/api/ps": MODELS, "/api/show": MODEL,
    "/api/version": VERSION,
    "/completion": COMPLETIONS, "/embedding": EMBEDDINGS, "/props": MODELS, "/slots": METRICS,
    "/generate": COMPLETIONS, "/encode": EMBEDDINGS, "/health_generate": HEALTH,
    "/get_model_info": MODELS, "/model_info": MODELS, "/get_server_info": MODELS,
    "/server_info": MODELS,
    "/generate_stream": COMPLETIONS, "/info": MODELS, "/chat_tokenize": TOKENIZE,
    "/invocations": CHAT, "/ping": HEALTH,
    "/v2/health/live": HEALTH, "/v2/health/ready": READY, "/v2/models": MODELS,
    "/healthz": HEALTH, "/livez": HEALTH, "/readyz": READY,
}  # fmt: skip


def hint(path: str, known: Iterable[str]) -> str:
    """The hint after "there is no such path: ". known: the paths of this server."""
    endpoint = ELSEWHERE.get(path.rstrip("/"))
    if endpoint is not None:
        return f"use {endpoint}"
    near = difflib.get_close_matches(path, known, n=1)
    return f"did you mean {near[0]}?" if near else "GET /openapi.json lists the paths"
