"""Downloads a model from the Hugging Face Hub into its cache: the files that nanovllm reads.

nanovllm pull Qwen/Qwen3-0.6B
nanovllm pull owner/name:Q4_K_M

The second one downloads a GGUF file, by the type in its name.

The other commands also download a model when they need one. For private models, set up
huggingface_hub's token (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse

from nanovllm import hub
from nanovllm.cli.watch import add_quiet
from nanovllm.flags import Parser

USAGE = "MODEL [--revision REVISION]"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hub id (owner/name, or owner/name:TYPE for a GGUF file)"
    )
    parser.add_argument("--revision", help="a branch, tag or commit (default: the main branch)")
    add_quiet(parser)


def main(args: argparse.Namespace) -> None:
    """Print the folder. Raises ValueError for an invalid Hub id or an unusable model."""
    if args.model in hub.EMBEDDED:
        raise ValueError(f"{args.model} is embedded in nanovllm: there is nothing to download")
    if not hub.is_hub_name(args.model):
        raise ValueError(f"{args.model!r} is not a Hub id (owner/name, or owner/name:TYPE)")
    folder = hub.download(args.model, revision=args.revision)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{args.model} has no weights in the safetensors format: if it has GGUF files, name "
            f"one by its type, as in {args.model}:Q4_K_M"
        )
    print(folder)
