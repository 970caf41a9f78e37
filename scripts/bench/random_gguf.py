"""Writes a GGUF file of the shape of Qwen3-0.6B with random weights, for measurements of speed.

    python scripts/bench/random_gguf.py --tokenizer SmolLM2.gguf --type Q4_K -o q4_k.gguf

Matrices are in the type that is named. The table, which is also the head, is in Q8_0 for Q8_0 and
else in Q6_K, as llama.cpp quantizes a tied one. llama.cpp needs a tokenizer: it is that of another
file, filled up with unused tokens. All layers have the same numbers. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import extras
from nanovllm.tools import command_line

VOCABULARY, LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 151_936, 28, 1024, 3072, 16, 8, 128
# The places of numbers in fp16 in a block of each type.
TYPES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
STD = 0.02  # of weights
UNUSED = 5  # the type of such a token


def numbers(rows: int, columns: int, type_name: str, rng: np.random.Generator) -> Any:
    """Random blocks [rows, bytes], whose real values are about STD."""
    import gguf
    from gguf.quants import dequantize

    kind = gguf.GGMLQuantizationType[type_name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // size, num_bytes), dtype=np.uint8)

    def set_scale(scale: float) -> None:
        for at in TYPES[type_name]:
            raw[..., at : at + 2] = np.array([scale], dtype=np.float16).view(np.uint8)

    set_scale(1.0)
    found = dequantize(raw[:8].reshape(min(rows, 8), -1), kind)
    set_scale(STD / float(found.std()))
    return raw.reshape(rows, -1)


def add_metadata(writer: Any, tokenizer: Path) -> None:
    import gguf

    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, field in gguf.GGUFReader(tokenizer).fields.items():
        if not name.startswith("tokenizer.ggml."):
            continue
        value, (kind, *element) = field.contents(), field.types
        missing = VOCABULARY - len(value) if isinstance(value, list) else 0
        if name == "tokenizer.ggml.tokens":
            value += [f"<unused{i}>" for i in range(missing)]
        elif name == "tokenizer.ggml.token_type":
            value += [UNUSED] * missing
        writer.add_key_value(name, value, kind, element[-1] if element else None)


def write(target: Path, type_name: str, tokenizer: Path) -> None:
    """Raises ValueError without the package."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"this needs the package gguf: {extras.install('gguf')}") from None
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(target, "qwen3")
    add_metadata(writer, tokenizer)
    of_table = "Q8_0" if type_name == "Q8_0" else "Q6_K"
    table = numbers(VOCABULARY, HIDDEN, of_table, rng)
    writer.add_tensor("token_embd.weight", table, raw_dtype=gguf.GGMLQuantizationType[of_table])
    shapes = {
        "attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    matrices = {name: numbers(*shape, type_name, rng) for name, shape in shapes.items()}
    norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN, "attn_q_norm": HEAD, "attn_k_norm": HEAD}
    kind = gguf.GGMLQuantizationType[type_name]
    for layer in range(LAYERS):
        for name, size in norms.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, dtype=np.float32))
        for name, matrix in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--type", choices=[one for one in TYPES if one != "Q6_K"], required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    write(args.output, args.type, args.tokenizer)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
