"""vLLM's and nano-vllm's names and interfaces, implemented on this engine."""
