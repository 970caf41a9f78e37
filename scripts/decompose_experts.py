"""Compress the experts of a model by principal component analysis, without data.

    python scripts/decompose_experts.py --model-path ./Mixtral-8x7B-v0.1 --rank 1024

For each layer and kind of matrix (gate, up, down), the experts share a basis U, and expert e keeps
V_e = Uᵀ · W_eᵀ. The files go to svd_experts in the model's folder, where `LLM` finds them. An
interrupted run continues with the next layer. distill_experts_activation_aware.py gives better
answers at the same size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

import torch
from compress import arguments
from compress.bases import shared_basis
from compress.output import Output
from compress.source import LayerExperts, Source, check_rank, choose_device, open_source
from torch import Tensor
from tqdm import tqdm

from nanovllm.models import svd_experts
from nanovllm.models.svd_experts import Metadata
from nanovllm.tools import command_line


def decompose(
    experts: LayerExperts, rank: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The bases of one layer by kind, and each expert's matrices by kind."""
    bases: dict[str, Tensor] = {}
    own: list[dict[str, Tensor]] = [{} for _ in experts.gate_EFD]
    for kind in svd_experts.KINDS:
        matrices_EOI = experts.of_kind(kind)
        u_IL = bases[kind] = shared_basis(matrices_EOI, rank)
        for expert, matrix_OI in enumerate(matrices_EOI):
            own[expert][kind] = u_IL.t() @ matrix_OI.float().t()
    return bases, own


def run(source: Source, folder: Path, rank: int, dtype: str, device: torch.device) -> None:
    """Compress all layers to `folder`; shows a progress bar."""
    made_from: dict[str, object] = {"checkpoint": source.fingerprint()}
    metadata = Metadata.of(source.model.config, "pca", rank, dtype, made_from)
    output = Output(folder, metadata, source.sparse_layers)
    if output.is_complete:
        print(f"{folder} is complete already")
        return
    for layer_idx in tqdm(source.sparse_layers, desc="decomposing", unit="layer"):
        if not output.has_layer(layer_idx):
            output.write_layer(layer_idx, *decompose(source.read(layer_idx, device), rank))
    output.finish()
    print(arguments.summary(source, folder, rank))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_common(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    source = open_source(args.model_path)
    check_rank(source, args.rank)
    folder, dtype = arguments.output_folder(args, source), arguments.dtype_name(args, source)
    with torch.inference_mode():
        run(source, folder, args.rank, dtype, device)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
