"""Accuracy of a model over the size of its compressed experts, PCA against distilled ones.

    python scripts/compare_compressed.py --device cpu

Compresses the experts of an embedded model to several ranks, both ways, and runs the held-out
questions of scripts/accuracy.py on each. Prints a line of JSON for each, and a table in Markdown.
Files are temporary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

import decompose_experts
import distill_experts_activation_aware as distill_experts
import torch
from accuracy import ask, questions
from collect_moe_calib import collect
from compress import arguments, calibration
from compress.arguments import num_weights
from compress.bases import OVERSAMPLE
from compress.distill import Settings
from compress.prompts import TASKS, conversations
from compress.source import Source, check_rank, choose_device, open_source

from nanovllm import LLM, SamplingParams
from nanovllm.models import svd_experts
from nanovllm.tools import command_line

RIDGE, CHUNK = 0.01, 4096
METHODS = ("pca", "distilled")


def ranks(source: Source, shares: list[float]) -> list[int]:
    """For each share of the bytes of all experts, the largest rank that takes no more."""
    per_rank = num_weights(source, 1) / num_weights(source, None)
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"a share is {share}: it must be above 0, and at most 1")
    return [max(1, int(share / per_rank)) for share in shares]


def linked(source: Source, folder: Path) -> Path:
    """A folder with links to the checkpoint's files, where experts can be compressed."""
    folder.mkdir()
    for path in source.folder.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def accuracy(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of a folder's model, in all and by kind of question."""
    llm = LLM(str(folder), device=args.device, dtype=args.dtype)
    by_kind, total, _ = ask(llm, questions(str(folder), args.num, args.seed))
    llm.close()
    return {"accuracy": round(total, 4), "by_kind": {k: round(v, 4) for k, v in by_kind.items()}}


def results(args: argparse.Namespace, source: Source, folder: Path) -> Iterator[dict[str, Any]]:
    """The measurements, in the order of the table: first the uncompressed model."""
    device, chosen = choose_device(args.device), args.ranks or ranks(source, args.shares)
    for rank in chosen:
        check_rank(source, rank)
    yield {"method": "whole", "rank": None, "share": 1.0} | accuracy(
        linked(source, folder / "whole"), args
    )
    calib_path = folder / "calibration.safetensors"
    params = SamplingParams(temperature=args.temperature, max_tokens=64)
    recorder = collect(
        str(folder / "whole"),
        conversations(args.model, TASKS, args.num_prompts),
        params,
        args.cap_per_group,
        device=args.device,
        dtype=args.dtype,
    )
    calibration.save(calib_path, source, recorder.groups)
    dtype = str(source.model.config.dtype).removeprefix("torch.")
    for rank in chosen:
        for method in METHODS:
            target = linked(source, folder / f"{method}_{rank}")
            output, started = target / svd_experts.FOLDER, time.perf_counter()
            with torch.inference_mode():
                if method == "pca":
                    decompose_experts.run(source, output, rank, dtype, device)
                else:
                    settings = Settings(rank, RIDGE, CHUNK, CHUNK, OVERSAMPLE)
                    distill_experts.run(source, calib_path, output, settings, dtype, device)
            seconds = round(time.perf_counter() - started, 1)
            share = round(num_weights(source, rank) / num_weights(source, None), 4)
            found = {"method": method, "rank": rank, "share": share, "seconds": seconds}
            yield found | accuracy(target, args)


def table(found: list[dict[str, Any]]) -> str:
    """Accuracy by rank in Markdown, with one column for each method."""
    whole = found[0]["accuracy"]
    lines = ["| bytes of experts | rank | PCA | distilled |", "| --- | --- | --- | --- |"]
    lines.append(f"| 100% | not compressed | {whole:.2%} | {whole:.2%} |")
    for rank in dict.fromkeys(one["rank"] for one in found[1:]):
        both = {one["method"]: one for one in found if one["rank"] == rank}
        cells = " | ".join(f"{both[method]['accuracy']:.2%}" for method in METHODS)
        lines.append(f"| {both['pca']['share']:.0%} | {rank} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-mixtral", help="an embedded model, or a folder")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.75, 0.5, 0.35, 0.25],
        help="of the bytes of uncompressed experts",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", help="instead of --shares")
    parser.add_argument("--num", type=int, default=2600, help="number of questions")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--num-prompts", type=int, default=5000, help="for calibration")
    parser.add_argument("--cap-per-group", type=int, default=16384)
    parser.add_argument("--temperature", type=float, default=0.7, help="of calibration's answers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    arguments.check_positive(parser, args, "num", "num_prompts", "cap_per_group")
    source = open_source(args.model)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for one in results(args, source, Path(folder)):
            print(json.dumps(one), flush=True)
            found.append(one)
    print(table(found))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
