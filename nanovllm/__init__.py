"""nanovllm: a compiler-centric, graph-mode inference engine for large language models.

Importing the package does not import torch. The first `LLM` imports torch, after it has started the
worker processes, which import torch at the same time.
"""

from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.sampling import SamplingParams

__version__ = "0.1.0"


def print_attention_backend_info(device: str = "auto") -> None:
    """Print the device, what is installed, and why each attention_backend can or cannot run.

    The text says how to install missing backends. `device` as for `LLM`; raises ValueError if this
    machine does not have it.
    """
    from nanovllm.platforms.attention import attention_backend_info

    print(attention_backend_info(device))


__all__ = ["LLM", "EngineConfig", "SamplingParams", "print_attention_backend_info"]
