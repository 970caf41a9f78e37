"""The types of tensors in GGUF files: their numbers, names and blocks."""

from __future__ import annotations

from typing import NamedTuple


class GgufType(NamedTuple):
    """A row is a sequence of blocks of `columns` numbers, which take `num_bytes` each. `dtype` is
    the name of a floating point type in safetensors files; None for codes with scales."""

    name: str
    columns: int
    num_bytes: int
    dtype: str | None = None


TYPES: dict[int, GgufType] = {
    0: GgufType("F32", 1, 4, "F32"),
    1: GgufType("F16", 1, 2, "F16"),
    30: GgufType("BF16", 1, 2, "BF16"),
    8: GgufType("Q8_0", 32, 34),
    2: GgufType("Q4_0", 32, 18),
    3: GgufType("Q4_1", 32, 20),
    6: GgufType("Q5_0", 32, 22),
    7: GgufType("Q5_1", 32, 24),
    10: GgufType("Q2_K", 256, 84),
    11: GgufType("Q3_K", 256, 110),
    12: GgufType("Q4_K", 256, 144),
    13: GgufType("Q5_K", 256, 176),
    14: GgufType("Q6_K", 256, 210),
    20: GgufType("IQ4_NL", 32, 18),
    23: GgufType("IQ4_XS", 256, 136),
    39: GgufType("MXFP4", 32, 17),
}
NUMBERS = {one.name: number for number, one in TYPES.items()}
# Names of types that are not read, for messages.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
