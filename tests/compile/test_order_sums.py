"""The passes of deterministic engines: which ops are left, and what they compute."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nanovllm.compile.passes.order_sums import check_order
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops, order
from tests.models.test_last_layer_graph import copies, gpu, last_layer, layer_config, names


def test_a_layer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    platform = gpu(monkeypatch)
    region, inputs = last_layer(layer_config(biased=False, qk_norm=True))
    graph, fakes, _ = trace(region, inputs)
    passes = platform.ordered_passes()
    assert passes is not None
    for _, one in passes:
        graph = one(graph, fakes)
    assert names(graph) == [
        "rms_norm", "ordered_linear", "qk_norm_rope_store", "ordered_attention",
        *["index_select"] * 2, "ordered_linear", "rms_norm", *["ordered_linear"] * 2,
    ]  # fmt: skip
    (found_RD,) = graph(*copies(inputs))
    torch.testing.assert_close(found_RD, region(*inputs.values()), atol=1e-4, rtol=1e-4)


def test_gpus_of_other_kinds_have_no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert gpu(monkeypatch).ordered_passes() is None


def test_sums_without_an_order_are_named() -> None:
    def region(x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, x_TD[0], 1e-6).exp() + x_TD.mean(-1, keepdim=True)

    graph, fakes, _ = trace(region, {"x_TD": torch.ones(3, 4)})
    check = partial(check_order, graph, fakes, ours=order.BY_ROW)
    with pytest.raises(ValueError, match=r"of aten\.mean\.dim is not fixed"):
        check(pointwise=True)
    # on a CPU vectors have another formula than the rest of a tensor
    with pytest.raises(ValueError, match=r"of aten\.exp\.default, aten\.mean\.dim is not fixed"):
        check(pointwise=False)
