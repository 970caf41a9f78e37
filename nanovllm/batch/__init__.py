"""Offline inference over a file of prompts: `nanovllm batch prompts.jsonl -o out.jsonl`.

`job` reads rows, gives them to an engine or to replicas of one (`worker`), and writes the answers
in the order of the input (`output`).
"""
