"""Times what adapters add to the products of a decoder's layers, for several sizes of programs.

# about 30 s on one GPU, and about 15 s for each other variant
python scripts/bench/lora_tiles.py --out lora-tiles.json
python scripts/bench/lora_tiles.py --out lora-tiles.json --variants "as it is" "4 warps"

The products are those of Qwen3-8B, in bf16, with cuBLAS, captured as one graph. Each layer has its
own weights and adapters, so neither is in the L2. `extra_us` is the time of a layer with adapters
less that of one without. `beside` computes inner values on a second stream, during the product.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.kernels import reference
from nanovllm.kernels.triton import lora, lora_sizes
from nanovllm.kernels.triton.norm_act import silu_mul
from nanovllm.tools import command_line
from scripts.bench.gpu_timing import time_launches

HIDDEN, FFN, RANK = 4096, 12288, 16
# name -> (sizes of the parts of the outputs, depth)
PRODUCTS = {
    "qkv": ((4096, 1024, 1024), HIDDEN),
    "out": ((HIDDEN,), 4096),
    "gate_up": ((FFN, FFN), HIDDEN),
    "down": ((HIDDEN,), FFN),
}
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "3 stages": {"MOST_STAGES": 3},
    "4 warps": {"MANY_NUMBERS": 1 << 20},
    "128 outputs": {"MAX_OUTPUTS": 128},
    "up to 4 splits": {"MAX_SPLITS": 4},
    "splits of 256": {"MIN_COLUMNS_OF_MANY": 256},
    "splits of 1024": {"MIN_COLUMNS_OF_MANY": 1024},
    "8 warps shrink": {"SHRINK_WARPS": 8},
    "32 tokens": {"TOKENS": 32},
    "16 tokens of many": {"MANY_TOKENS": 16},
}


class Product(NamedTuple):
    weight_OD: Tensor
    a_NLD: Tensor
    b_NOR: Tensor
    rows: tuple[int, ...]


def layers(num: int, num_slots: int) -> list[dict[str, Product]]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5

    return [
        {
            name: Product(
                drawn(sum(rows), depth),
                drawn(num_slots, len(rows) * RANK, depth),
                drawn(num_slots, sum(rows), RANK),
                rows,
            )
            for name, (rows, depth) in PRODUCTS.items()
        }
        for _ in range(num)
    ]


def step(
    all_layers: list[dict[str, Product]], h_TD: Tensor, tokens: Any, side: Any
) -> Callable[[], None]:
    """The products of all layers, with adapters if `tokens` are given."""

    def product(one: Product, x_TD: Tensor, *, silu: bool = False) -> Tensor:
        if tokens is None:
            y_TO = x_TD @ one.weight_OD.t()
            return silu_mul(y_TO) if silu else y_TO
        if side is None:
            y_TO = x_TD @ one.weight_OD.t()
            z_STL = lora.shrink(x_TD, *tokens, one.a_NLD)
        else:
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                z_STL = lora.shrink(x_TD, *tokens, one.a_NLD)
            y_TO = x_TD @ one.weight_OD.t()
            current.wait_stream(side)
        out_TF = y_TO.new_empty(len(y_TO), FFN) if silu else None
        lora.expand(y_TO, out_TF, z_STL, tokens, one.b_NOR, one.rows)
        return y_TO if out_TF is None else out_TF

    def run() -> None:
        for one in all_layers:
            q_TE = product(one["qkv"], h_TD)
            x_TD = product(one["out"], q_TE[:, :HIDDEN].contiguous())
            product(one["down"], product(one["gate_up"], x_TD, silu=True))

    return run


@contextmanager
def changed(constants: dict[str, int]) -> Iterator[None]:
    places = {
        name: reference.lora if hasattr(reference.lora, name) else lora_sizes for name in constants
    }
    before = {name: getattr(place, name) for name, place in places.items()}
    for name, value in constants.items():
        setattr(places[name], name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(places[name], name, value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=["as it is"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 8192])
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()
    made, side = layers(args.layers, args.slots), torch.cuda.Stream()
    for num_tokens in args.tokens:
        h_TD = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        plain = time_launches(step(made, h_TD, None, None), [()]) / args.layers
        for num in args.adapters:
            adapter_T = torch.arange(num_tokens, device="cuda") % num + 1
            found = {}
            for name in args.variants:
                constants = VARIANTS[name]
                with changed(constants):
                    tokens = reference.lora.adapter_tiles(adapter_T)
                    for beside in (None, side) if not constants else (None,):
                        took = time_launches(step(made, h_TD, tokens, beside), [()]) / args.layers
                        found[name + (", beside" if beside else "")] = round(took - plain, 2)
            line = json.dumps({
                "tokens": num_tokens, "adapters": num, "plain_us": round(plain, 1),
                "extra_us": dict(sorted(found.items(), key=lambda one: one[1])),
            })  # fmt: skip
            print(line, flush=True)
            with args.out.open("a", encoding="utf-8") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
