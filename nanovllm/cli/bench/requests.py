"""The requests of `nanovllm bench serve`: prompts, lengths of answers, and send times."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from nanovllm import hub
from nanovllm.cli.bench.workload import TOP_TOKEN, draw_requests, read_fields
from nanovllm.models.gguf.header import is_gguf

NUM_PROMPTS = {"random": 1000, "nanovllm": 256}
TEMPERATURE = {"random": 0.0, "nanovllm": 0.6}


def bodies(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The bodies of all requests. Raises ValueError for conflicting arguments."""
    vocab_size = _vocab_size(args, model)
    if args.dataset_name == "nanovllm":
        lengths = args.min_len, args.max_len
        prompts, output_lens = draw_requests(args.num_prompts, lengths, vocab_size, args.seed)
    else:
        prompts, output_lens = _random_requests(args, vocab_size)
    common = _common(args, model)
    if not _as_text(args):
        asked: list[Any] = prompts
    else:
        asked = _texts(args.tokenizer or model, prompts)
    requests = []
    for prompt, num_tokens in zip(asked, output_lens):
        if is_chat(args):
            what = {"messages": [{"role": "user", "content": prompt}]}
        else:
            what = {"prompt": prompt}
        requests.append({**common, **what, "max_tokens": num_tokens, **args.extra_body})
    return requests


def warm_ups(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Bodies of short requests whose prompts share nothing with the others."""
    short = argparse.Namespace(**vars(args))
    short.dataset_name, short.seed, short.num_prompts = "random", args.seed - 1, args.num_warmups
    short.random_input_len, short.random_output_len, short.random_range_ratio = 16, 8, 0.0
    return bodies(short, model)


def send_times(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Send times in seconds after the start, with gamma-distributed gaps.

    As in `vllm bench serve`, the times are scaled so that the last one matches the rate.
    """
    if rate == math.inf:
        return [0.0] * num
    rng, times = random.Random(seed), [0.0]
    while len(times) < num:
        times.append(times[-1] + rng.gammavariate(burstiness, 1 / (rate * burstiness)))
    factor = (num - 1) / rate / times[-1] if times[-1] else 1.0
    return [time * factor for time in times]


def is_chat(args: argparse.Namespace) -> bool:
    return args.backend == "openai-chat" or (args.endpoint or "").endswith("/chat/completions")


def _as_text(args: argparse.Namespace) -> bool:
    return args.random_text or is_chat(args)


def _common(args: argparse.Namespace, model: str) -> dict[str, Any]:
    temperature = TEMPERATURE[args.dataset_name] if args.temperature is None else args.temperature
    has_lengths = args.dataset_name == "nanovllm"
    body = {
        "model": model, "temperature": temperature, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if has_lengths if args.ignore_eos is None else args.ignore_eos:
        body["ignore_eos"] = True
    given = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p")}
    return body | {name: value for name, value in given.items() if value is not None}


def _random_requests(
    args: argparse.Namespace, vocab_size: int
) -> tuple[list[list[int]], list[int]]:
    rng, ratio = random.Random(args.seed), args.random_range_ratio

    def drawn(length: int) -> int:
        return max(
            1, rng.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio)))
        )

    prompts, output_lens = [], []
    for _ in range(args.num_prompts):
        num = drawn(args.random_input_len)
        prompts.append([rng.randrange(vocab_size) for _ in range(num)])
        output_lens.append(drawn(args.random_output_len))
    return prompts, output_lens


def _vocab_size(args: argparse.Namespace, model: str) -> int:
    """From --vocab-size or a local model; else a number valid for every large model."""
    if args.vocab_size is not None:
        return int(args.vocab_size)
    name = args.tokenizer or model
    path = Path(name).expanduser()
    if is_gguf(path) and path.is_file():
        return int(read_fields(path)["vocab_size"])
    if name in hub.EMBEDDED or (path / "config.json").is_file():
        config = json.loads((hub.resolve(name, weights=False) / "config.json").read_text())
        return int(config["vocab_size"])
    return TOP_TOKEN + 1


def _texts(tokenizer: str, prompts: list[list[int]]) -> list[str]:
    from nanovllm.tokenizer import load_full  # imports transformers

    full = load_full(hub.resolve_tokenizer(tokenizer))
    return [full.decode(prompt, skip_special_tokens=True) for prompt in prompts]
