"""nanovllm: a compiler-centric, graph-mode inference engine for large language models.

Importing it does not import torch: the first `LLM` does, once other processes have begun to import it as well.
"""

from nanovllm.config import EngineConfig
from nanovllm.llm import LLM
from nanovllm.sampling import SamplingParams

__version__ = "0.1.0"


def print_attention_backend_info(device: str = "auto") -> None:
    """Print what the device is, what is installed, which attention_backend runs and why, and how to get what is missing.

    `device` as for `LLM`; raises ValueError for one that is not there.
    """
    from nanovllm.platforms.attention import attention_backend_info

    print(attention_backend_info(device))


__all__ = ["LLM", "EngineConfig", "SamplingParams", "print_attention_backend_info"]
