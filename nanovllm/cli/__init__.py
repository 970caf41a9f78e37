"""The command `nanovllm`: one file for each of its commands."""
