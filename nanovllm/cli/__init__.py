"""The command `nanovllm`: one file per command."""
