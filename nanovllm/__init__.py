"""nanovllm: a compiler-centric, graph-mode inference engine for large language models."""

from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.platforms.attention import print_attention_backend_info
from nanovllm.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "print_attention_backend_info"]
