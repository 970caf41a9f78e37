"""Compress the experts of a model to fit their results on calibration data.

    python scripts/collect_moe_calib.py --model-path ./Mixtral-8x7B-v0.1 --out calib.safetensors
    python scripts/distill_experts_activation_aware.py --model-path ./Mixtral-8x7B-v0.1 \\
        --calib-path calib.safetensors --rank 1024

The files have the layout of decompose_experts.py, and answers are better at the same size: bases
and matrices are fitted to the experts' real inputs, by ridge regression, and down compensates for
the errors of gate and up. An interrupted run continues with the next layer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

import torch
from compress import arguments
from compress.bases import OVERSAMPLE
from compress.calibration import Calibration
from compress.distill import Settings, distill
from compress.output import Output
from compress.source import Source, check_rank, choose_device, fingerprint, open_source
from tqdm import tqdm

from nanovllm.models.svd_experts import Metadata
from nanovllm.tools import command_line


def run(
    source: Source,
    calib_path: Path,
    folder: Path,
    settings: Settings,
    dtype: str,
    device: torch.device,
) -> None:
    """Compress all layers to `folder`; shows a progress bar."""
    calibration = Calibration(calib_path, source)
    made_from: dict[str, object] = {
        "checkpoint": source.fingerprint(),
        "calibration": fingerprint(calib_path),
        **asdict(settings),
    }
    cfg = source.model.config
    metadata = Metadata.of(cfg, "distilled", settings.rank, dtype, made_from)
    output = Output(folder, metadata, source.sparse_layers)
    if output.is_complete:
        print(f"{folder} is complete already")
        return
    for layer_idx in tqdm(source.sparse_layers, desc="distilling", unit="layer"):
        if not output.has_layer(layer_idx):
            inputs = calibration.layer_inputs(layer_idx)
            experts = source.read(layer_idx, device)
            output.write_layer(layer_idx, *distill(experts, inputs, settings))
    output.finish()
    print(arguments.summary(source, folder, settings.rank))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_common(parser)
    parser.add_argument(
        "--calib-path", type=Path, required=True, help="the file of collect_moe_calib.py"
    )
    parser.add_argument(
        "--ridge",
        type=float,
        default=0.01,
        help="weight of the distance from the original matrices",
    )
    parser.add_argument("--chunk", type=int, default=4096, help="inputs at a time for gate and up")
    parser.add_argument("--chunk-w2", type=int, default=4096, help="inputs at a time for down")
    parser.add_argument(
        "--pca-oversample",
        type=int,
        default=OVERSAMPLE,
        help="more columns in the random search for a basis: slower, and a little better",
    )
    args = parser.parse_args()
    arguments.check_positive(parser, args, "chunk", "chunk_w2")
    if not 0 < args.ridge < float("inf"):
        parser.error(f"--ridge is {args.ridge}: it must be a positive number")
    if args.pca_oversample < 0:
        parser.error(f"--pca-oversample is {args.pca_oversample}: it must be at least 0")
    return args


def main() -> None:
    args = parse_args()
    device = choose_device(args.device)
    source = open_source(args.model_path)
    check_rank(source, args.rank)
    settings = Settings(args.rank, args.ridge, args.chunk, args.chunk_w2, args.pca_oversample)
    folder, dtype = arguments.output_folder(args, source), arguments.dtype_name(args, source)
    with torch.inference_mode():
        run(source, args.calib_path, folder, settings, dtype, device)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
