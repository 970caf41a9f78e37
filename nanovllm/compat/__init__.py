"""Names and interfaces of vLLM and nano-vllm, on top of this engine's own."""
