"""Offline inference over a file of prompts: `nanovllm batch prompts.jsonl -o out.jsonl`.

`job` reads rows, passes them to an engine (`worker`) or to several replicas (`replicas`), and
writes the answers in input order (`output`).
"""
