"""nanovllm: a compiler-centric, graph-mode inference engine for large language models.

Importing the package does not import torch. The first `LLM` imports torch, after it has started the
worker processes, which import torch at the same time.
"""

import sys

from nanovllm import import_path

if import_path.begins_with_working_directory():
    del sys.path[0]

from typing import TYPE_CHECKING, Any

from nanovllm import checkout

if checkout.problem():
    raise ImportError(checkout.problem())

from nanovllm.compat import modules
from nanovllm.compat.engine_args import AsyncEngineArgs, EngineArgs
from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.lora_request import LoRARequest
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import TextPrompt, TokensPrompt
from nanovllm.sampling import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.compat.llm_engine import LLMEngine
    from nanovllm.outputs import CompletionOutput, RequestOutput
    from nanovllm.pooling_outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from nanovllm.serving.async_llm import AsyncLLM as AsyncLLM
    from nanovllm.serving.async_llm import AsyncLLMEngine as AsyncLLMEngine

__version__ = "0.1.0"

# imported on first use, since their modules import torch or start processes; by module
_LATE = {
    "AsyncLLM": "nanovllm.serving.async_llm",
    "AsyncLLMEngine": "nanovllm.serving.async_llm",
    "LLMEngine": "nanovllm.compat.llm_engine",
    "CompletionOutput": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
    **dict.fromkeys(
        (
            "ClassificationOutput", "ClassificationRequestOutput", "EmbeddingOutput",
            "EmbeddingRequestOutput", "PoolingOutput", "PoolingRequestOutput", "ScoringOutput",
            "ScoringRequestOutput",
        ),
        "nanovllm.pooling_outputs",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)


modules.install()


def print_attention_backend_info(device: str = "auto") -> None:
    """Print the device, the installed packages, and why each attention_backend can or cannot run.

    The text includes how to install missing backends. `device` as for `LLM`; raises ValueError if
    this machine does not have it.
    """
    from nanovllm.platforms.attention import attention_backend_info

    print(attention_backend_info(device))


__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "LLMEngine",
    "LoRARequest",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "TextPrompt",
    "TokensPrompt",
    "print_attention_backend_info",
]
