"""Tokens per second of this engine and of transformers' `generate`, in one process, on the same random weights.

    python scripts/compare_transformers.py                 # the Qwen3-0.6B shape cut to 8 layers, fp32, batch 1 and 8

The two take turns, so that both see the same machine; a pair's order does not matter for the ratio's median. Greedy
tokens are compared as well: a ratio between different texts would mean little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from nanovllm import LLM, SamplingParams


def shape(layers: int) -> Qwen3Config:
    """Qwen/Qwen3-0.6B's config.json, with fewer layers."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        eos_token_id=None,
    )


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    tokens = work()
    return time.perf_counter() - started, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--minimum", type=float, default=0.0, help="exit with 1 if a median ratio is below this")
    args = parser.parse_args()
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(shape(args.layers), dtype=getattr(torch, args.dtype)).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        largest = max(args.batch)
        llm = LLM(
            folder,
            device="cpu",
            dtype=args.dtype,
            max_num_seqs=largest,
            graph_batch_sizes=args.batch,
            max_model_len=args.prompt_len + args.new_tokens,
            max_num_batched_tokens=args.prompt_len * largest,
            enable_prefix_caching=False,
        )
    worst = float("inf")
    for batch in args.batch:
        prompts = torch.randint(0, 10000, (batch, args.prompt_len), generator=torch.Generator().manual_seed(batch))
        params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)

        def ours(prompts: torch.Tensor = prompts, params: SamplingParams = params) -> list[list[int]]:
            return [output["token_ids"] for output in llm.generate(prompts.tolist(), params, use_tqdm=False)]

        def theirs(prompts: torch.Tensor = prompts) -> list[list[int]]:
            options = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
            with torch.no_grad():
                tokens = reference.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            return tokens[:, args.prompt_len :].tolist()

        ours(), theirs()
        pairs = [(timed(ours), timed(theirs)) for _ in range(args.runs)]
        same = sum(a == b for (_, mine), (_, other) in pairs for a, b in zip(mine, other))
        num_tokens = batch * args.new_tokens
        ratios = [other / mine for (mine, _), (other, _) in pairs]
        result = {
            "layers": args.layers,
            "dtype": args.dtype,
            "batch": batch,
            "prompt_tokens": args.prompt_len,
            "new_tokens": args.new_tokens,
            "threads": torch.get_num_threads(),
            "nanovllm_tok_s": [round(num_tokens / mine, 2) for (mine, _), _ in pairs],
            "transformers_tok_s": [round(num_tokens / other, 2) for _, (other, _) in pairs],
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "same_texts": f"{same} of {batch * args.runs}",
        }
        worst = min(worst, statistics.median(ratios))
        print(json.dumps(result), flush=True)
    raise SystemExit(worst < args.minimum)


if __name__ == "__main__":
    main()
