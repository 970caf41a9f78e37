"""A scale that is NaN or infinite, and a NaN in fp8, are refused with the name of the matrix.

Types of GGUF files: `test_gguf_files.test_scales_that_are_no_numbers_are_refused`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.models import loader
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.formats.fp8 import has_nan
from nanovllm.models.loader import Target
from tests.conftest import save_tiny
from tests.models import test_packed_checkpoints as packed
from tests.models import test_quantized_checkpoints as quantized
from tests.models.moe_cases import Case
from tests.models.test_formats import model_of

LAYER = "model.layers.0."
DENSE = f"{LAYER}mlp.up_proj."
NUMBERS = {  # of a dtype, those that are refused
    torch.float8_e4m3fn: (0x7F, 0xFF),  # bytes
    torch.uint8: (0xFF,),  # an exponent
    torch.float16: (torch.nan, torch.inf, -torch.inf),
    torch.bfloat16: (torch.nan, torch.inf, -torch.inf),
    torch.float32: (torch.nan, torch.inf, -torch.inf),
}
SCALES = {
    "fp8 blocks": ("weight", "weight_scale_inv"),
    "fp8 tensors": ("weight", "weight_scale"),
    "fp8 channels": ("weight", "weight_scale"),
    "gptq": ("scales",),
    "gptq ordered": ("scales",),
    "gptq symmetric": ("scales",),
    "awq": ("scales",),
    "w4 groups": ("weight_scale",),
    "w4 groups, zeros": ("weight_scale",),
    "w4 ordered": ("weight_scale",),
    "int8 channels": ("weight_scale",),
    "int8 tensors, zeros": ("weight_scale",),
    "nvfp4": ("weight_scale", "weight_global_scale"),
    "mxfp4": ("weight_scale",),
    "bnb nf4": ("weight.nested_absmax",),
    "bnb fp4": ("weight.absmax",),
    "bnb int8": ("SCB",),
}
CASES = [(name, end) for name, ends in SCALES.items() for end in ends]


def with_last(found: Tensor, number: float) -> Tensor:
    """The tensor with a number, or the byte of one in fp8, in the place of its last one."""
    changed = found.clone()
    is_byte = found.dtype in (torch.float8_e4m3fn, torch.uint8)
    (changed.view(torch.uint8) if is_byte else changed).view(-1)[-1] = number
    return changed


def check_refused(folder: Path, name: str, message: str) -> None:
    """Each of the numbers that the tensor's dtype has is refused."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for number in NUMBERS[weights[name].dtype]:
        save_file({**weights, name: with_last(weights[name], number)}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            loader.load(model_of(folder), folder, Target(torch.device("cpu")), int)


@pytest.mark.parametrize(("name", "end"), CASES)
def test_numbers_that_are_none_are_refused(name: str, end: str, tmp_path: Path) -> None:
    if name in quantized.BY_NAME:
        folder = quantized.pack(quantized.BY_NAME[name], save_tiny(tmp_path, num_hidden_layers=1))
    else:
        folder = packed.saved(packed.BY_NAME[name], tmp_path, num_hidden_layers=1)
    what = "a number" if end == "weight" else r"(a scale|weight_global_scale)"
    check_refused(folder, DENSE + end, rf"layers\.0\.mlp\.up_proj\.weight: {what} is NaN")


@pytest.mark.parametrize("end", ["weight", "weight_scale_inv"])
def test_an_expert_s_are_refused(end: str, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 48}
    saved = Case("mixtral", 4, 2, changes).save(tmp_path)
    folder = quantized.pack(quantized.BY_NAME["fp8 blocks"], saved)
    path = folder / "model.safetensors"
    (stored,) = [
        one for one in load_file(path) if f"experts.2.w1.{end}" == one.partition("moe.")[2]
    ]
    check_refused(folder, stored, r"experts\.2\.w1\.weight: a (number|scale) is NaN")


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    folder = packed.of_gpt_oss(tmp_path)
    (stored,) = [
        one for one in load_file(folder / "model.safetensors") if one.endswith("up_proj_scales")
    ]
    check_refused(folder, stored, r"experts\.gate_up_proj: a scale is NaN")


def test_all_other_codes_of_fp8_are_numbers() -> None:
    """Beside isnan, for each byte."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert [has_nan(values[i : i + 1]) for i in range(256)] == values.float().isnan().tolist()
    assert not has_nan(values[:0])
