"""Common arguments and summary of the scripts that compress experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.source import Source

from nanovllm.models import svd_experts


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", required=True, help="a folder, or an embedded model")
    parser.add_argument("--rank", type=int, required=True, help="columns of each shared basis")
    parser.add_argument(
        "--dtype", choices=tuple(svd_experts.DTYPES), help="of the files; default: the checkpoint's"
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu, …; default: a GPU if any")
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="default: svd_experts in the model's folder, where `LLM` uses it",
    )


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with an error unless these numbers are at least 1."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1"
            )


def output_folder(args: argparse.Namespace, source: Source) -> Path:
    folder: Path | None = args.output_dir
    return source.folder / svd_experts.FOLDER if folder is None else folder


def dtype_name(args: argparse.Namespace, source: Source) -> str:
    stored = str(source.model.config.dtype).removeprefix("torch.")
    name: str = args.dtype or stored
    if name not in svd_experts.DTYPES:
        raise ValueError(
            f"the checkpoint's dtype is {name}: choose {', '.join(svd_experts.DTYPES)} with --dtype"
        )
    return name


def num_weights(source: Source, rank: int | None) -> int:
    """Weights of the experts of a layer: in bases of a rank, or (None) uncompressed."""
    cfg, moe = source.model.config, source.moe
    hidden, size, num = cfg.hidden_size, moe.expert_size, moe.num_experts
    if rank is None:
        return 3 * num * hidden * size
    return rank * (2 * hidden + size + num * (2 * size + hidden))


def summary(source: Source, folder: Path, rank: int) -> str:
    share = num_weights(source, rank) / num_weights(source, None)
    return f"{folder}: rank {rank}, {share:.1%} of the experts' weights"
