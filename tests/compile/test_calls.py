"""A call list computes what its graph computes, can be stored, and holds operator calls only."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.compile.lower import calls, inductor
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from nanovllm.kernels.schemas import registry


def region(x_TD: Tensor, weight_OD: Tensor, norm_D: Tensor) -> tuple[Tensor, Tensor]:
    normed_TD, residual_TD = ops.add_rms_norm(x_TD, x_TD, norm_D, 1e-6)
    y_TO = torch.nn.functional.linear(normed_TD, weight_OD)
    return y_TO.view(-1, 2, y_TO.shape[1] // 2).split([1, 1], dim=1)[1], residual_TD.to(
        torch.float64
    )


def inputs(rows: int) -> dict[str, Tensor]:
    return {"x_TD": torch.randn(rows, 8), "weight_OD": torch.randn(6, 8), "norm_D": torch.randn(8)}


@pytest.mark.parametrize("rows", [1, 2, 19, 99])
def test_a_call_list_computes_what_its_region_computes_also_after_loading(rows: int) -> None:
    example = inputs(rows)
    lowered = calls.lower(*trace(region, dict(example))[:2])
    kind, content = lowered.stored()
    assert kind == "calls" and calls.load(content).stored() == (kind, content)
    expected = region(*example.values())
    for run in (lowered, calls.load(content)):
        for ours, theirs in zip(run(*example.values()), expected):
            assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)


def test_inputs_are_written_in_place() -> None:
    def add_one(state_S: Tensor) -> tuple[Tensor]:
        state_S.add_(1)
        return (state_S * 2,)

    state_S = torch.zeros(3)
    run = calls.lower(*trace(add_one, {"state_S": state_S})[:2])
    assert run(state_S)[0].tolist() == [2.0] * 3 and state_S.tolist() == [1.0] * 3


def test_a_value_is_dropped_after_its_last_use() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def two_steps(x: Tensor) -> tuple[Tensor]:
        return (((x + 1) * 2 + 3).sum(),)

    made = calls.lower(*trace(two_steps, {"x": torch.zeros(5)})[:2])
    alive: list[int] = []
    names = made.run.__globals__
    for name in [name for name in names if name.startswith("f")]:

        def spy(*args: Tensor, real: object = names[name]) -> Tensor:
            out: Tensor = real(*args)  # type: ignore[operator]
            seen.append(weakref.ref(out))
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
            return out

        names[name] = spy
    assert made.run(torch.zeros(5))[0] == 25
    assert alive == [
        1,
        2,
        2,
        2,
    ]  # the value that is read and the value that is written, never three


def test_only_operators_on_plain_arguments_can_be_listed() -> None:
    def unknown(x: Tensor) -> tuple[Tensor]:
        return (torch.ops.prims.sin(x),)

    graph, fakes, _ = trace(unknown, {"x": torch.ones(3)})
    with pytest.raises(calls.NotListable, match="not an operator of aten or nanovllm"):
        calls.lower(graph, fakes)


@pytest.mark.parametrize(
    "change",
    [
        {"calls": [["os.system.default", ["true"], {}]]},
        {"calls": [["aten.mm", [{"v": 0}, {"v": 0}], {}]]},
        {"calls": [["aten.add.Tensor", [{"v": 0}, {"v": 0}], {"alpha=1, x": 1}]]},
        {"calls": [["aten.to.dtype", [{"v": 0}, {"t": "torch.load"}], {}]]},
        {"calls": [["getitem", [{"v": "0, __import__('os')"}, 0], {}]]},
        {"calls": [["aten.neg.default", [{"v": 7}], {}]]},
        {"outputs": ["0)+print("]},
        {"calls": None},
    ],
)
def test_a_list_of_anything_else_is_refused(change: dict[str, object]) -> None:
    content = {
        "num_inputs": 1,
        "calls": [["aten.neg.default", [{"v": 0}], {}]],
        "outputs": [1],
        **change,
    }
    with pytest.raises(ValueError):
        calls.load(json.dumps(content).encode())


def test_a_compiler_is_asked_only_where_there_is_something_to_fuse() -> None:
    def library_only(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (ops.silu_mul(torch.nn.functional.linear(x, w)),)

    def arithmetic(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (torch.exp(x * 2 + 1).sin() + w.sum(),)

    example = {"x": torch.ones(3, 4), "w": torch.ones(6, 4)}
    assert calls.is_enough(trace(library_only, dict(example))[0])
    graph, fakes, _ = trace(arithmetic, dict(example))
    assert not calls.is_enough(graph)
    lowered = inductor.lower_if_worth_it(graph, fakes)
    assert isinstance(lowered, inductor.InductorProgram)
    kind, content = lowered.stored()
    assert kind == "inductor"
    torch.testing.assert_close(
        inductor.load(content)(*example.values()), list(arithmetic(*example.values()))
    )
    with pytest.raises(ValueError, match="Inductor cannot read it"):
        inductor.load(content[:100])
    assert isinstance(
        inductor.lower_if_worth_it(*trace(library_only, dict(example))[:2]), calls.CallList
    )


def test_numbers_lists_dtypes_and_devices_survive() -> None:
    def many(x: Tensor) -> tuple[Tensor, ...]:
        whole = torch.full((2, 3), float("-inf"), dtype=torch.float16, device=x.device)
        return whole, torch.arange(4, dtype=torch.int32, device=x.device), x.clamp(max=float("inf"))

    run = calls.load(calls.lower(*trace(many, {"x": torch.ones(3)})[:2]).stored()[1])
    for ours, theirs in zip(run(torch.ones(3)), many(torch.ones(3))):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)


def test_inputs_of_another_size_are_an_error() -> None:
    fixed = partial(torch.nn.functional.linear)
    run = calls.lower(
        *trace(
            lambda x, w: (fixed(x, w).view(3, 2, 3),),
            {"x": torch.ones(3, 4), "w": torch.ones(6, 4)},
        )[:2]
    )
    with pytest.raises(RuntimeError):
        run(torch.ones(5, 4), torch.ones(6, 4))


def test_kernels_are_called_without_dispatch_unless_a_mode_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU: a registered kernel instead of the op; a mode sees every op."""
    example, called = inputs(3), []
    made = calls.lower(*trace(region, dict(example))[:2])

    def kernel(*args: object) -> tuple[Tensor, Tensor]:
        called.append(args)
        return torch.zeros(3, 8), torch.ones(3, 8)

    monkeypatch.setitem(registry._registered, ("CPU", "add_rms_norm"), kernel)

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        made(*example.values())
    assert not called and "nanovllm.add_rms_norm.default" in seen
    assert torch.equal(made(*example.values())[1], torch.ones(3, 8, dtype=torch.float64))
    assert len(called) == 1
