"""Tiny Gemma checkpoints with vision towers, prompts with images, and transformers' answers."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nanovllm import LLM, SamplingParams
from nanovllm.engine.request import MediaPrompt
from nanovllm.runner.encoders import MMItem
from nanovllm.schedule.request import MMSpan

IMAGE, START, END = 90, 91, 92
NUM_ANSWERS = 6
TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "max_position_embeddings": 256, "sliding_window": 21, "eos_token_id": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
# pieces of text as numbers of tokens, and images as None
PROMPTS: tuple[list[int | None], ...] = (
    [None, 9], [7, None, 5, None], [3, None, None], [40, None, 30], [19],
)  # fmt: skip


def randomize(hf: Any, folder: Path) -> Any:
    """Random weights, far from their initial values; answers have no image's token."""
    torch.manual_seed(0)
    scalars = [one for one in hf.named_buffers() if "layer_scalar" in one[0]]
    for name, weight in [*hf.named_parameters(), *scalars]:
        is_norm = "norm" in name or "layer_scalar" in name
        adds_one = "gemma3" in hf.config.model_type and not ("vision" in name or "bias" in name)
        mean = 1.0 if is_norm and not adds_one and not name.endswith("bias") else 0.0
        torch.nn.init.normal_(weight, mean=mean, std=0.1 if is_norm else 0.15)
        if "q_norm" in name and not adds_one:  # as trained weights, which have the factor 1 / √H
            weight.data *= 0.25
    hf.get_output_embeddings().weight.data[80:] = hf.get_output_embeddings().weight.data[0]
    hf.save_pretrained(folder)
    return hf


def check_fields(
    config: type[Any], set_here: Any, changed: dict[str, Any], unread: dict[str, Any]
) -> None:
    """Every field of a tower's config is set by the tests, changed, or unread."""
    own = {one.name for one in fields(config)} - {one.name for one in fields(PretrainedConfig)}
    assert own - {*set_here, *changed, *unread} == set()


def prompt_of(parts: list[int | None], num_tokens: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids, and the first tokens of images."""
    draw, ids, starts = torch.Generator().manual_seed(seed), [2], []
    for part in parts:
        if part is not None:
            ids += torch.randint(3, 80, (part,), generator=draw).tolist()
            continue
        starts.append(len(ids) + 1)
        ids += [START, *[IMAGE] * num_tokens, END]
    return ids, starts


def media_prompt(
    ids: list[int], starts: list[int], num_tokens: int, images: list[tuple[Tensor, tuple[int, ...]]]
) -> MediaPrompt:
    """The prompt with images as (patches, grid), as the engine's own processor makes it."""
    spans = [
        (
            MMSpan(start, num_tokens, hashlib.sha256(one.numpy().tobytes()).digest()),
            MMItem(one, grid),
        )
        for start, (one, grid) in zip(starts, images, strict=True)
    ]
    return MediaPrompt(ids, None, spans)


@torch.no_grad()
def expected(hf: Any, ids: list[int], kinds: str, **inputs: Any) -> tuple[list[int], list[Tensor]]:
    """transformers' greedy tokens after a prompt, and log-probabilities; `kinds` names the input
    with the types of tokens."""
    ids, tokens, logprobs = list(ids), [], []
    for _ in range(NUM_ANSWERS):
        types = torch.tensor([[int(one == IMAGE) for one in ids]])
        more = {kinds: types, **inputs} if inputs else {}
        logits = hf(input_ids=torch.tensor([ids]), **more, use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1))
        ids.append(tokens[-1])
    return tokens, logprobs


def check_answers(llm: LLM, prompts: list[MediaPrompt], wanted: list[Any]) -> list[Any]:
    """Greedy answers with their log-probabilities; returns the completions."""
    params = SamplingParams(temperature=0, max_tokens=NUM_ANSWERS, ignore_eos=True, logprobs=99)
    ids = [llm.engine.add_request(one, params, incremental=False) for one in prompts]
    found: dict[int, Any] = {}
    while len(found) < len(ids):
        llm.engine.advance()
        for output in llm.engine.take():
            found[output.request_id] = output.completion
    for request_id, (tokens, logprobs) in zip(ids, wanted, strict=True):
        done = found[request_id]
        assert done.token_ids == tokens
        for theirs, got in zip(logprobs, done.logprobs, strict=True):
            ours = torch.tensor([got[i].logprob for i in range(99)])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    return [found[one] for one in ids]


def engine(folder: Path, **options: Any) -> LLM:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128}
    return LLM(
        str(folder), dtype="float32", graph_batch_sizes=[4], kvcache_block_size=16,
        skip_tokenizer_init=True, **{"device": "cpu", **sizes, **options},
    )  # fmt: skip
