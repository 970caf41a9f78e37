"""The dtypes that an Ascend IR op accepts, from the `REG_OP` declarations in torchair."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

NAMES = {
    "DT_FLOAT": torch.float32, "DT_FLOAT32": torch.float32, "DT_FLOAT16": torch.float16,
    "DT_BF16": torch.bfloat16, "DT_BFLOAT16": torch.bfloat16, "DT_DOUBLE": torch.float64,
    "DT_INT8": torch.int8, "DT_INT16": torch.int16, "DT_INT32": torch.int32,
    "DT_INT64": torch.int64, "DT_UINT8": torch.uint8, "DT_UINT64": torch.uint64,
    "DT_BOOL": torch.bool,
}  # fmt: skip
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
# groups of types in declarations; other groups (BasicType, NumberType) contain all dtypes used here
GROUPS = {"IndexNumberType": {torch.int32, torch.int64}, "IntegerDataType": INTEGERS}
INPUT = re.compile(
    r"\.(?:OPTIONAL_|DYNAMIC_)?INPUT\((\w+),\s*"
    r'(?:"(\w+)"|TensorType::(\w+)\(\)|TensorType\(\{([^}]*)\}\))\)'
)


@cache
def _declarations() -> str:
    import torchair

    folder = Path(torchair.__file__).parent
    files = ("_ge_concrete_graph/auto_generated_ge_raw_ops.py", "ge/_ge_graph.py")
    return "".join((folder / name).read_text(encoding="utf-8") for name in files)


@cache
def declared_inputs(op_type: str) -> dict[str, tuple[str | None, frozenset[torch.dtype] | None]]:
    """Input name → (letter of a shared type, allowed dtypes or None for all).

    Raises KeyError for an op without a declaration.
    """
    found = re.search(rf'REG_OP\({op_type}\)(.*?)"""', _declarations(), re.DOTALL)
    if found is None:
        raise KeyError(f"no REG_OP declaration of {op_type}")
    inputs = {}
    for name, letter, group, listed in INPUT.findall(found.group(1).replace("\\n", " ")):
        allowed = GROUPS.get(group)
        if listed and "Type()" not in listed:
            allowed = {NAMES[dtype] for dtype in re.findall(r"DT_\w+", listed) if dtype in NAMES}
        inputs[name] = (letter or None, frozenset(allowed) if allowed else None)
    return inputs


def violations(op_type: str, dtypes: dict[str, torch.dtype]) -> list[str]:
    """The actual input dtypes of an op that its declaration does not allow."""
    declared = declared_inputs(op_type)
    found = []
    shared: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        key = name if name in declared else name.rstrip("0123456789")  # dynamic inputs are numbered
        if key not in declared:
            found.append(f"{op_type} has no input {name}")
            continue
        letter, allowed = declared[key]
        if allowed is not None and dtype not in allowed:
            found.append(f"{op_type}.{name} is {dtype}: {sorted(map(str, allowed))}")
        if letter == "T" and shared.setdefault(letter, dtype) != dtype:
            found.append(
                f"{op_type}.{name} is {dtype}, another input of the same type {shared[letter]}"
            )
    return found
