"""What deterministic=True costs: tokens per second of a plain and of a deterministic engine, and
whether a request has the same bits among others.

    python scripts/bench/deterministic.py --shape Qwen3-0.6B --out deterministic.json

Both engines run in this process, one after the other, with random weights and few buckets, so that
a cold start is short. Rows have prompts of 100 to 400 tokens and answers of the same length; the
time of prompts is part of the measurement. The best of the repetitions counts. `bench.py` measures
one engine as users run it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS

MAX_LEN = 1024


def measure(llm: LLM, vocab_size: int, num_rows: int, num_tokens: int, repeats: int) -> float:
    """Tokens per second of answers of rows that begin together."""
    rng, found = random.Random(0), 0.0
    lengths = [rng.randrange(100, 400) for _ in range(num_rows)]
    params = SamplingParams(temperature=0.6, max_tokens=num_tokens, ignore_eos=True, seed=1)
    for _ in range(repeats + 1):  # the first time warms up
        prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        found = max(found, num_rows * num_tokens / (time.perf_counter() - started))
    return found


def bits(logprobs: list[dict[int, float]], tokens: list[int]) -> list[tuple[int, str]]:
    """Tokens and the bits of their log-probabilities."""
    return [(token, float(one[token]).hex()) for token, one in zip(tokens, logprobs, strict=True)]


def has_same_bits(llm: LLM, vocab_size: int, num_rows: int) -> dict[str, bool]:
    """Whether a request has the same tokens and log-probabilities alone, among others, and as a
    prompt."""
    rng = random.Random(1)
    first, *others = (
        [rng.randrange(vocab_size) for _ in range(rng.randrange(50, 300))] for _ in range(num_rows)
    )
    params = SamplingParams(temperature=0.6, max_tokens=40, ignore_eos=True, seed=1, logprobs=1)
    plain = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (alone,) = llm.generate([first], params, use_tqdm=False)
    expected = bits(alone["logprobs"], alone["token_ids"])
    among = llm.generate([first, *others], [params, *[plain] * len(others)], use_tqdm=False)[0]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (prompt,) = llm.generate([first + alone["token_ids"]], asked, use_tqdm=False)
    of_prompt = bits(prompt["prompt_logprobs"][len(first) :], alone["token_ids"])
    return {
        "among others": bits(among["logprobs"], among["token_ids"]) == expected,
        "as a prompt": of_prompt == expected,
    }


def other_bits(llm: LLM, vocab_size: int, num_rows: int, num_schedules: int) -> int:
    """In how many random schedules a request has other bits than alone. Its companions are of any
    number up to the rows, before and after it, end early or late, and may share its prefix."""
    rng, different = random.Random(2), 0
    first = [rng.randrange(vocab_size) for _ in range(190)]
    params = SamplingParams(temperature=0.8, max_tokens=16, ignore_eos=True, seed=1, logprobs=1)
    (alone,) = llm.generate([first], params, use_tqdm=False)
    expected = bits(alone["logprobs"], alone["token_ids"])
    for done in range(num_schedules):
        if done % 100 == 0:
            print(done, "schedules,", different, "with other bits", flush=True)
        num = min(num_rows - 1, rng.choice((0, 1, 2, 7, 15, 16, 33, 100, 255)))
        place = rng.randrange(num + 1)
        prompts = [
            first[: rng.choice((0, 0, 64, 130, 190))]
            + [rng.randrange(vocab_size) for _ in range(rng.choice((1, 2, 17, 150)))]
            for _ in range(num)
        ]
        others = [
            SamplingParams(temperature=0.6, max_tokens=rng.randrange(1, 24), ignore_eos=True)
            for _ in range(num)
        ]
        if rng.random() < 0.3:
            llm.reset_prefix_cache()
        prompts.insert(place, first)
        found = llm.generate(prompts, [*others[:place], params, *others[place:]], use_tqdm=False)[
            place
        ]
        different += bits(found["logprobs"], found["token_ids"]) != expected
    return different


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=CONFIGS, default="Qwen3-0.6B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--schedules", type=int, default=0, help="random ones, of each engine")
    parser.add_argument("--skip-plain", action="store_true", help="no plain engine: no shares")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    config: dict[str, Any] = CONFIGS[args.shape]
    results: dict[str, Any] = {"shape": args.shape}
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for deterministic in (True, False)[: 1 + (not args.skip_plain)]:
            started = time.perf_counter()
            llm = LLM(
                folder, random_weights=True, skip_tokenizer_init=True, max_model_len=MAX_LEN,
                max_num_seqs=max(args.rows), graph_batch_sizes=args.rows, device=args.device,
                max_num_batched_tokens=4096, deterministic=deterministic,
            )  # fmt: skip
            name = "deterministic" if deterministic else "plain"
            results[f"{name} start s"] = round(time.perf_counter() - started, 1)
            results[f"{name} bits"] = has_same_bits(llm, config["vocab_size"], max(args.rows))
            print(name, results[f"{name} bits"], flush=True)
            if args.schedules:
                differ = other_bits(llm, config["vocab_size"], max(args.rows), args.schedules)
                results[f"{name} schedules with other bits"] = differ
                print(name, differ, "of", args.schedules, "schedules", flush=True)
            for num_rows in args.rows:
                speed = measure(llm, config["vocab_size"], num_rows, args.tokens, args.repeats)
                results[f"{name} {num_rows}"] = round(speed, 1)
                print(name, num_rows, round(speed, 1), flush=True)
                if not deterministic:
                    share = results[f"deterministic {num_rows}"] / speed
                    results[f"share {num_rows}"] = round(share, 4)
                if args.out is not None:
                    args.out.write_text(json.dumps(results) + "\n")
            llm.close()
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
