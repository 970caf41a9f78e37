"""Writes a model folder without weights, for servers and benchmarks of published shapes.

    python scripts/bench/shape_folder.py OUT --shape Qwen3-0.6B
    nanovllm serve OUT --random-weights

The folder has the shape's config.json, and a byte-level tokenizer whose vocabulary is as large as
the model's: 256 bytes and made-up words. Decoding costs about as much as with a real one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS

SYLLABLES = [first + vowel for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
SPACE = "\u0120"  # a space, as byte-level tokenizers write it
EOS = "<|endoftext|>"


def words(num: int) -> list[str]:
    """`num` different tokens: most begin with a space, as in tokenizers of published models."""
    rng, found = random.Random(0), dict[str, None]()
    while len(found) < num:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4))))
        found[(SPACE if rng.random() < 0.6 else "") + word] = None
    return list(found)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = islice([*alphabet, EOS, *words(vocab_size - len(alphabet) - 1)], vocab_size)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def write_folder(out: Path, config: dict[str, Any]) -> None:
    """Write a config.json and a tokenizer with as many tokens."""
    (out / "config.json").write_text(json.dumps(config))
    make_tokenizer(config["vocab_size"]).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder, or an empty one")
    parser.add_argument("--shape", choices=sorted(CONFIGS), default="Qwen3-0.6B")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    write_folder(args.out, CONFIGS[args.shape])


if __name__ == "__main__":
    sys.exit(command_line.run(main))
