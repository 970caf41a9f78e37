"""The codec of messages between processes: arrays, tensors, and messages of another form."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from nanovllm import wire


class Message(NamedTuple):
    name: str
    values: np.ndarray | None
    nums: list[int]


load = wire.decoder(Message)


@pytest.mark.parametrize(
    "values", [np.arange(19, dtype=np.int64)[::3], np.zeros((0, 3), np.float32),
               np.array([[True, False]]), np.float32([[1.5, np.nan], [-np.inf, 0.0]])],
)  # fmt: skip
def test_arrays_of_any_strides_arrive_as_they_are(values: np.ndarray) -> None:
    found = load(wire.dump(Message("a", values, [1, np.int64(2)]))).values
    assert found is not None and found.flags.writeable and found.flags.aligned
    assert found.dtype == values.dtype and np.array_equal(
        found, values, equal_nan=values.dtype.kind == "f"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool])
def test_tensors_of_any_dtype_arrive_as_they_are(dtype: torch.dtype) -> None:
    sent = (torch.randn(7, 6) * 3).to(dtype)[:, ::2]
    read = wire.tensor(wire.decoder(wire.Array)(wire.dump(wire.array(sent))))
    assert read.dtype == dtype and torch.equal(read.float(), sent.float())


@pytest.mark.parametrize(
    "message", [["a", None], ["a", None, ["b"]], [1, None, []], ["a", ["int99", [1], b"1"], []]]
)
def test_a_message_of_another_form_is_refused(message: list[object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        load(msgspec.msgpack.encode(message))


def test_the_codec_does_not_import_torch() -> None:
    code = "import sys, nanovllm.wire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
