"""Tokens per second of this engine and of transformers' `generate`, with the same random weights.

    # the shape of Qwen3-0.6B with 8 layers, fp32, batches of 1, 8 and 16
    python scripts/compare_transformers.py
    python scripts/compare_transformers.py --ours float32 float32+int8 --theirs float32 bfloat16

All run in one process in turns, under the same conditions. Ratios are to the first of `--theirs`;
their medians do not depend on the order within a round. Greedy tokens are compared with those of
the same dtype, because a ratio between different texts means little. In bf16 and
int8 they may differ: random weights give logits that are close together. On Linux, the load of
other programs is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS


def shape(layers: int) -> Qwen3Config:
    """Qwen3-0.6B with this many layers and without end-of-sequence."""
    changed = {"num_hidden_layers": layers, "eos_token_id": None, "dtype": None}
    config: Qwen3Config = Qwen3Config.from_dict(CONFIGS["Qwen3-0.6B"] | changed)
    return config


class Timed(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads of this process
    others: float  # cores used by other programs meanwhile
    tokens: list[list[int]]


def timed(work: Callable[[], list[list[int]]]) -> Timed:
    busy, own, started = _busy_seconds(), time.process_time(), time.perf_counter()
    tokens = work()
    seconds, own, busy = (
        time.perf_counter() - started,
        time.process_time() - own,
        _busy_seconds() - busy,
    )
    return Timed(seconds, own, max(0.0, busy - own) / seconds, tokens)


def undisturbed(
    work: Callable[[], list[list[int]]], most_others: float, patience_s: float
) -> Timed:
    """Repeat a run until other programs take at most `most_others` of a core meanwhile. After
    `patience_s` seconds, return the least disturbed run."""
    deadline, best = time.perf_counter() + patience_s, timed(work)
    while best.others > most_others and time.perf_counter() < deadline:
        time.sleep(0.2)
        best = min(best, timed(work), key=lambda run: run.others)
    return best


def _busy_seconds() -> float:
    """Busy seconds of all cores since the machine started; 0 if unknown."""
    try:
        user, nice, system, _, _, irq, soft_irq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def make_llm(folder: str, kind: str, args: argparse.Namespace) -> LLM:
    """This engine with weights of one `kind`, "dtype" or "dtype+quantization"."""
    dtype, _, quantization = kind.partition("+")
    largest = max(args.batch)
    return LLM(
        folder,
        device="cpu",
        dtype=dtype,
        quantization=quantization or None,
        max_num_seqs=largest,
        graph_batch_sizes=args.batch,
        max_model_len=args.prompt_len + args.new_tokens,
        max_num_batched_tokens=args.prompt_len * largest,
        enable_prefix_caching=False,
    )


def generate(llm: LLM, prompts: torch.Tensor, num_new: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    return [
        output["token_ids"] for output in llm.generate(prompts.tolist(), params, use_tqdm=False)
    ]


def generate_theirs(model: Any, prompts: torch.Tensor, num_new: int) -> list[list[int]]:
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    return tokens[:, prompts.shape[1] :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    kinds = ("float32", "bfloat16", "float32+int8", "bfloat16+int8")
    parser.add_argument("--ours", nargs="+", default=["float32"], choices=kinds)
    parser.add_argument("--theirs", nargs="*", default=["float32"], choices=kinds[:2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument(
        "--most-others",
        type=float,
        default=0.15,
        help="a run is repeated if other programs take more of a core",
    )
    parser.add_argument("--patience", type=float, default=0.0, help="seconds for repeating a run")
    parser.add_argument(
        "--minimum",
        type=float,
        default=0.0,
        help="exit with 1 if the median ratio of the first of --ours is below this",
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(shape(args.layers), dtype=torch.float32).save_pretrained(
            folder
        )
        llms = {kind: make_llm(folder, kind, args) for kind in args.ours}
        references = {
            dtype: AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False
            ).eval()
            for dtype in args.theirs
        }
    worst = float("inf")
    for batch in args.batch:
        prompts = torch.randint(
            0, 10000, (batch, args.prompt_len), generator=torch.Generator().manual_seed(batch)
        )
        works: dict[str, Callable[[int], list[list[int]]]] = {
            **{kind: partial(generate, llm, prompts) for kind, llm in llms.items()},
            **{
                f"transformers {dtype}": partial(generate_theirs, references[dtype], prompts)
                for dtype in args.theirs
            },
        }
        for work in works.values():
            work(args.new_tokens)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        first_token: dict[str, list[float]] = {name: [] for name in works}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in works}
        others: dict[str, list[float]] = {name: [] for name in works}
        texts: dict[str, list[list[int]]] = {}
        for _ in range(args.runs):
            for name, work in works.items():
                run = undisturbed(partial(work, args.new_tokens), args.most_others, args.patience)
                texts[name] = run.tokens
                seconds[name].append(run.seconds)
                cpu_seconds[name].append(run.cpu_seconds)
                others[name].append(run.others)
                first_token[name].append(
                    undisturbed(partial(work, 1), args.most_others, args.patience).seconds
                )
        for name in works:
            other = f"transformers {name.partition('+')[0]}"
            base = f"transformers {args.theirs[0]}" if args.theirs else next(iter(works))
            ratios = [theirs / mine for theirs, mine in zip(seconds[base], seconds[name])]
            step_ms = [
                1e3 * (all_ - one) / (args.new_tokens - 1)
                for all_, one in zip(seconds[name], first_token[name])
            ]
            result = {
                "layers": args.layers,
                "batch": batch,
                "engine": name,
                "prompt_tokens": args.prompt_len,
                "new_tokens": args.new_tokens,
                "threads": torch.get_num_threads(),
                "tok_s": [round(batch * args.new_tokens / spent, 2) for spent in seconds[name]],
                "cores_of_others": [round(share, 2) for share in others[name]],
                "prefill_ms": round(1e3 * statistics.median(first_token[name]), 1),
                "decode_step_ms": round(statistics.median(step_ms), 2),
                f"ratio_to_{base.replace(' ', '_')}": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "cpu_seconds": [round(spent, 2) for spent in cpu_seconds[name]],
            }
            if name in llms and other in texts:
                same = sum(a == b for a, b in zip(texts[name], texts[other]))
                result["same_texts"] = f"{same} of {batch}"
            print(json.dumps(result), flush=True)
            if name == args.ours[0]:
                worst = min(worst, statistics.median(ratios))
    return int(worst < args.minimum)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
