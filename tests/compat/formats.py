"""What tests show of each format of quantized weights: rows of docs/compatibility.md.

A cell names a test and the case of it that has the format. Columns of devices follow from the
kernels that are registered, and from what platforms say.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from nanovllm.models.compressed_config import FORMATS as COMPRESSED
from nanovllm.models.quant_methods import CHECKPOINTS, OLD_AUTO_ROUND
from nanovllm.models.schemes import OPTIONS
from nanovllm.platforms import cpu, cuda, npu
from nanovllm.platforms.base import Traits
from tests.kernels import kernel_index

CLAIMS = ("eager", "graph", "ranks", "experts")
PACKED, FP8, GGML, INT8 = "packed_linear", "fp8_linear", "ggml_linear", "linear_int8"
Shown = str | None  # "file: test: case"; None: no test

CHECKPOINT, MORE = "models/test_quantized_checkpoints", "models/test_packed_checkpoints"
GGUF = "models/test_gguf"
DENSE, MIXTURE = "test_dense_models_alone_and_on_two_ranks", "test_experts_alone_and_on_two_ranks"
OPTION = "models/test_rounded: test_models_have_the_logits_of_the_rounded_numbers: "
RANKS = "models/test_rounded: test_each_of_two_ranks_rounds_its_own_part: "
AGREE = "models/test_int8: test_graphs_and_eager_steps_agree_and_are_near_the_plain_weights: qwen3"
REFUSED = "no, "  # refused by name


class Row(NamedTuple):
    """`product` is the op of its linear layers; `key` is its name among the engine's formats."""

    product: str
    key: str
    eager: Shown = None
    graph: Shown = None
    ranks: Shown = None
    experts: Shown = None


def both(file: str, case: str, product: str, key: str, graph: str = "", experts: str = "") -> Row:
    """Of the files whose tests compare formats alone and on two ranks."""
    dense = f"{file}: {DENSE}: {case}"
    mixture = f"{file}: {MIXTURE}: {experts}" if experts else None
    return Row(
        product, key, dense, f"{file}: test_graphs: {graph}" if graph else None, dense, mixture
    )


def checkpoint(case: str, product: str, key: str, graph: str = "") -> Row:
    return both(CHECKPOINT, case, product, key, graph, case)


FORMATS: dict[str, Row] = {
    "`fp8` in blocks": checkpoint("fp8 blocks", FP8, "fp8", "fp8 blocks"),
    "`fp8` by tensor": checkpoint("fp8 tensors", FP8, "fp8", "fp8 tensors"),
    "`modelopt` FP8": checkpoint("fp8 of modelopt", FP8, "modelopt"),
    "`modelopt` NVFP4": both(
        MORE, "nvfp4 of modelopt", PACKED, "modelopt", "nvfp4 of modelopt", "nvfp4 of modelopt"
    ),
    "`gptq`": checkpoint("gptq", PACKED, "gptq", "gptq"),
    "`gptq`, `desc_act`": checkpoint("gptq ordered", PACKED, "gptq", "gptq ordered"),
    "`awq`": checkpoint("awq", PACKED, "awq", "awq"),
    "`auto-round`": checkpoint("auto-round", PACKED, "auto-round", "auto-round"),
    "`pack-quantized`": both(
        MORE, "w4 groups, zeros", PACKED, "pack-quantized", "w4 groups, zeros", "w4 groups, zeros"
    ),
    "`int-quantized`": both(
        MORE, "int8 channels", PACKED, "int-quantized", "int8 channels", "int8 channels"
    ),
    "`naive-quantized`": both(
        MORE, "int8 tensors, zeros", PACKED, "naive-quantized", "int8 tensors, zeros",
        "int8 tensors, zeros",
    ),
    "`float-quantized`": checkpoint("fp8 channels", FP8, "float-quantized", "fp8 channels"),
    "`nvfp4-pack-quantized`": both(
        MORE, "nvfp4", PACKED, "nvfp4-pack-quantized", "nvfp4", "nvfp4"
    ),
    "`mxfp4-pack-quantized`": both(
        MORE, "mxfp4", PACKED, "mxfp4-pack-quantized", "mxfp4", "mxfp4"
    ),
    "`mxfp4` (gpt-oss, experts alone)": Row(
        PACKED, "mxfp4",
        "models/test_gpt_oss: test_experts_in_mxfp4_have_the_logits_of_their_numbers: ",
        "models/test_gpt_oss: test_experts_in_mxfp4_have_the_logits_of_their_numbers: ",
        "models/test_gpt_oss: test_ranks_with_experts_in_mxfp4: ",
        "models/test_gpt_oss: test_experts_in_mxfp4_have_the_logits_of_their_numbers: ",
    ),
    "`bitsandbytes` nf4": both(MORE, "bnb nf4", PACKED, "bitsandbytes", "bnb nf4", "bnb nf4"),
    "`bitsandbytes` fp4": both(MORE, "bnb fp4", PACKED, "bitsandbytes", "bnb fp4", "bnb fp4"),
    "`bitsandbytes` int8": both(MORE, "bnb int8", PACKED, "bitsandbytes", "bnb int8", "bnb int8"),
    "GGUF, 4 and 8 bits": Row(
        PACKED, "gguf", f"{GGUF}: test_types_in_turns: ", f"{GGUF}: test_graphs: ",
        f"{GGUF}: test_two_ranks_read_their_parts: ", f"{GGUF}: test_experts: Q4_K",
    ),
    "GGUF, 2, 3, 5 and 6 bits": Row(
        GGML, "gguf", f"{GGUF}: test_types_in_turns: ", f"{GGUF}: test_graphs: ",
        f"{GGUF}: test_two_ranks_read_their_parts: ", f"{GGUF}: test_experts: Q6_K",
    ),
    "option `fp8`": Row(FP8, "fp8", OPTION + "fp8", OPTION + "fp8", RANKS + "fp8", OPTION + "fp8"),
    "option `int4`": Row(
        PACKED, "int4", OPTION + "int4", OPTION + "int4", RANKS + "int4", OPTION + "int4"
    ),
    "option `int8`": Row(
        INT8, "int8", AGREE, AGREE, RANKS + "int8",
        "no, models/test_moe_loader: test_int8_is_refused_for_experts: ",
    ),
}  # fmt: skip


def known() -> set[str]:
    """The formats of checkpoints, and those of the option `quantization`."""
    return {*CHECKPOINTS, *COMPRESSED, *OPTIONS} - {"compressed-tensors", OLD_AUTO_ROUND}


def _cases(function: Any) -> set[str]:
    """The arguments of a test's cases, as text."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]

    def flat(values: Iterable[Any]) -> Iterable[str]:
        for one in values:
            yield str(one)
            if isinstance(one, (tuple, list)):
                yield from flat(one)

    return {text for mark in marks for text in flat(mark.args[1])}


def shown(claim: Shown) -> str:
    """A link to the file of a test, which must have the case."""
    if claim is None:
        return "not tested"
    if claim.startswith(REFUSED):
        return shown(claim.removeprefix(REFUSED)).replace("yes", "refused")
    file, name, case = (part.strip() for part in claim.split(":"))
    module = importlib.import_module("tests." + file.replace("/", "."))
    function = getattr(module, name)
    found = case in _cases(function) or f'"{case}"' in inspect.getsource(function)
    assert not case or found, f"{file}.{name} has no case {case!r}"
    return f"[yes](../tests/{file}.py)"


def _device(row: Row, traits: Traits, kernels: kernel_index.Kernels, *, is_option: bool) -> str:
    if is_option and row.key not in traits.quantizations:
        return "refused"
    if not is_option and not traits.takes_quantized:
        return "dequantized at the load"
    # blocks become codes where they have no products
    in_codes = row.product == "ggml_linear" and not traits.takes_blocks
    product = "packed_linear" if in_codes else row.product
    return "kernel" if product in kernels else "plain torch"


DEVICES: dict[str, tuple[Traits, kernel_index.Kernels]] = {
    "CPU": (cpu.TRAITS, kernel_index.CPU),
    "CUDA": (cuda.TRAITS, kernel_index.TRITON),
    "NPU": (npu.TRAITS, {}),
}


def table() -> str:
    """The rows, and what a format of the engine's that has none would need."""
    missing = known() - {row.key for row in FORMATS.values()}
    assert not missing, f"{sorted(missing)} have no row in tests/compat/formats.py"
    heads = ("format", *CLAIMS, *DEVICES)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in FORMATS.items():
        claims = [shown(getattr(row, claim)) for claim in CLAIMS]
        is_option = name.startswith("option")
        devices = [_device(row, *one, is_option=is_option) for one in DEVICES.values()]
        lines.append(f"| {' | '.join((name, *claims, *devices))} |")
    return "\n".join(lines)
