"""The measured workload: the model's shape, prompts, answers, and the length they need."""

from __future__ import annotations

import argparse
import json
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanovllm import hub
from nanovllm.tools.shapes import CONFIGS

MAX_MODEL_LEN = 4096  # unless the model has fewer positions or a request needs more
TOP_TOKEN = 10000  # the largest token id of prompts, unless the model has fewer


@dataclass(frozen=True)
class Workload:
    """A model and its requests.

    model: the argument of `LLM`. config: the content of its config.json. max_model_len: that of
    `LLM`.
    """

    model: str
    config: dict[str, Any]
    prompts: list[list[int]]
    output_lens: list[int]
    max_model_len: int


def make_workload(args: argparse.Namespace, stack: ExitStack) -> Workload:
    """The workload for a benchmark's arguments. Raises ValueError if it does not fit the model.

    With random weights, the model is a folder with only a config.json that exists as long as
    `stack`.
    """
    model, config = args.model, {}
    if model is None:
        model, config = stack.enter_context(TemporaryDirectory()), _random_config(args)
        (Path(model) / "config.json").write_text(json.dumps(config))
    else:
        config = read_fields(hub.resolve(model, weights=False))
    for name in ("vocab_size", "max_position_embeddings"):
        if type(config.get(name)) is not int:
            raise ValueError(f"config.json of {model} has {config.get(name)!r} for {name}")
    prompts, output_lens = _requests(args, config["vocab_size"])
    needed = max(len(prompt) + num for prompt, num in zip(prompts, output_lens))
    if args.stall:
        needed = args.stall + 16
    max_model_len = _max_model_len(args, needed, config["max_position_embeddings"])
    return Workload(model, config, prompts, output_lens, max_model_len)


def varied(prompts: list[list[int]], run_idx: int, vocab_size: int) -> list[list[int]]:
    """Different prompts for each run: the prefix cache would skip the prefill of repeated ones."""
    return [[(token + run_idx) % vocab_size for token in prompt] for prompt in prompts]


def _random_config(args: argparse.Namespace) -> dict[str, Any]:
    name, path = args.random_weights, Path(args.random_weights)
    if name not in CONFIGS and not path.is_file():
        raise ValueError(
            f"--random-weights is {name!r}, which is not a config.json: use one, or one of "
            f"{', '.join(CONFIGS)}"
        )
    config = dict(CONFIGS[name]) if name in CONFIGS else _read(path)
    if args.layers:
        config["num_hidden_layers"] = args.layers
    return config


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json, or those of a GGUF file."""
    from nanovllm.startup.config_file import read_stored  # imports torch

    return read_stored(folder)


def _read(path: Path) -> dict[str, Any]:
    from nanovllm.startup.config_file import read_object  # imports torch

    return read_object(path)


def _requests(args: argparse.Namespace, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, output lengths)."""
    if args.latency:
        rng = random.Random(0)
        return [[rng.randint(0, _top(vocab_size)) for _ in range(128)]], [512]
    lengths = args.min_len, args.max_len
    prompts, output_lens = draw_requests(args.num_seqs, lengths, vocab_size)
    return prompts[: args.first], output_lens[: args.first]


def draw_requests(
    num: int, lengths: tuple[int, int], vocab_size: int, seed: int = 0
) -> tuple[list[list[int]], list[int]]:
    """(prompts, output lengths), drawn as in nano-vllm: all prompts first, then all lengths.

    `lengths` are the minimum and maximum of prompts and answers. The first N of many requests have
    different output lengths from N requests.
    """
    rng, top = random.Random(seed), _top(vocab_size)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(*lengths))] for _ in range(num)]
    return prompts, [rng.randint(*lengths) for _ in range(num)]


def _top(vocab_size: int) -> int:
    """The largest token id in prompts."""
    return min(TOP_TOKEN, vocab_size - 1)


def _max_model_len(args: argparse.Namespace, needed: int, positions: int) -> int:
    asked, name = args.max_model_len, args.model or args.random_weights
    request = f"a request of this workload has up to {needed} tokens, prompt and answer together"
    if asked is not None and asked < needed:
        raise ValueError(f"{request}, but --max-model-len is {asked}")
    if asked is None and positions < needed:
        option = f"--stall ({args.stall})" if args.stall else f"--max-len ({args.max_len})"
        shorter = "leave out --latency" if args.latency else f"lower {option}"
        raise ValueError(f"{request}, but {name} has {positions} positions: {shorter}")
    return asked or max(needed, min(MAX_MODEL_LEN, positions))
