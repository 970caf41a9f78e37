"""Programs are built once per key, give their region's results, and report late builds."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.lower import eager, inductor
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import CompiledAfterWarmUp, Compiler, Program
from nanovllm.config import EngineConfig
from nanovllm.kernels import ops
from nanovllm.models.model import VARYING
from nanovllm.startup.build import make_compiler
from nanovllm.startup.resolve import resolve_without_weights

ROOT = Path(__file__).parents[2]


class Sum(NamedTuple):
    value: Tensor
    parts: tuple[Tensor, Tensor]


def add(x: Tensor, y: Tensor) -> Sum:
    return Sum(x + y, (x * 1, y * 1))


def inputs(size: int = 3) -> dict[str, object]:
    return {"x": torch.arange(float(size)), "y": torch.ones(size)}


def test_a_program_gives_what_its_region_gives_nested_alike() -> None:
    compiler = Compiler(eager.lower)
    program = compiler.program("add", (3,), add, inputs())
    assert isinstance(program, Program) and program.name == "add_3"
    result = program(torch.tensor([5.0, 6.0, 7.0]), torch.ones(3))
    assert isinstance(result, Sum) and isinstance(result.parts, tuple)
    assert result.value.tolist() == [6.0, 7.0, 8.0]
    assert result.parts[0].tolist() == [5.0, 6.0, 7.0]


def test_programs_are_built_once_per_name_and_key() -> None:
    compiler = Compiler(eager.lower)
    first = compiler.program("add", (3,), add, inputs())
    assert compiler.program("add", (3,), add, inputs()) is first
    assert compiler.num_compiled == 1
    for name, key in (("add", (3, "window5")), ("add", (4,)), ("sum", (3,))):
        assert compiler.program(name, key, add, inputs()) is not first
    assert compiler.num_compiled == 4


def test_without_a_lowering_the_region_itself_runs() -> None:
    compiler = Compiler(None, strict=True)
    compiler.seal()
    assert compiler.program("add", (3,), add, inputs()) is add
    assert compiler.num_compiled == 0


def test_passes_run_in_order_on_the_graph() -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        def graph_pass(graph: GraphModule, fakes: Any) -> GraphModule:
            order.append(name)
            assert len(fakes) == 2
            return graph

        return graph_pass

    Compiler(eager.lower, passes=(("a", named("a")), ("b", named("b")))).program(
        "add", (3,), add, inputs()
    )
    assert order == ["a", "b"]


def test_placeholders_of_frozen_inputs_are_marked_when_the_graph_is_lowered() -> None:
    """A pass may trace the graph anew, which drops every mark that was there before."""
    marks: list[tuple[str, bool]] = []

    def lower(graph: GraphModule, fakes: Any) -> Any:
        placeholders = graph.graph.find_nodes(op="placeholder")
        marks.extend((node.name, node.meta["frozen"]) for node in placeholders)
        return eager.lower(graph, fakes)

    compiler = Compiler(lower, passes=(("inline", replace_ops),), frozen=("w", "table"))
    x = torch.ones(2, 6)
    inputs = {"x": x, "w": Sum(x, (x, x)), "weights": x, "none": None, "table": x}
    compiler.program("add", (2,), lambda x, w, weights, none, table: ops.silu_mul(x), inputs)
    names = ["x", "w_value", "w_parts_0", "w_parts_1", "weights", "table"]
    assert [name for name, _ in marks] == names
    assert [name for name, frozen in marks if frozen] == [*names[1:4], "table"]


def test_a_compile_after_warm_up_is_an_error_when_strict() -> None:
    compiler = Compiler(eager.lower, strict=True)
    known = compiler.program("add", (3,), add, inputs())
    compiler.seal()
    assert compiler.program("add", (3,), add, inputs()) is known
    assert known(torch.ones(3), torch.ones(3)).value.eq(2).all()
    with pytest.raises(CompiledAfterWarmUp, match="program add_4 is compiled after warm-up"):
        compiler.program("add", (4,), add, inputs(4))
    assert compiler.num_compiled == 1


def test_a_compile_after_warm_up_is_a_warning_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    compiler = Compiler(eager.lower)
    compiler.seal()
    # the package's logger does not propagate once an entry point has configured it
    with caplog.at_level(logging.WARNING), _propagating("nanovllm"):
        program = compiler.program("add", (4,), add, inputs(4))
    assert "program add_4 is compiled after warm-up" in caplog.text
    assert program(torch.ones(4), torch.ones(4)).value.eq(2).all()


class _propagating:
    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._before, self._logger.propagate = self._logger.propagate, True

    def __exit__(self, *_: object) -> None:
        self._logger.propagate = self._before


# Dumps --------------------------------------------------------------------------------------------


def test_dumps_show_the_graph_after_each_pass(tmp_path: Path) -> None:
    compiler = Compiler(
        eager.lower,
        passes=(("same", lambda graph, fakes: graph), ("inline", replace_ops)),
        dump_dir=tmp_path,
    )
    compiler.program("silu", (2, "a"), ops.silu_mul, {"gate_up_TG": torch.ones(2, 6)})
    names = ["silu_2_a.0_traced.py", "silu_2_a.1_same.py", "silu_2_a.2_inline.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    traced, _, inlined = ((tmp_path / name).read_text() for name in names)
    assert "nanovllm.silu_mul" in traced and "aten.silu" not in traced
    assert "nanovllm.silu_mul" not in inlined and "aten.silu" in inlined
    assert 'gate_up_TG: "f32[2, 6]"' in inlined


def test_the_environment_names_the_folder_of_dumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "graphs"
    monkeypatch.setenv("NANOVLLM_DUMP_GRAPHS", str(folder))
    config = EngineConfig(model="tiny-qwen3", device="cpu")
    choice = resolve_without_weights(config)
    made = replace(make_compiler(choice), store=None)
    replace(made, lowering=eager.lower).program(
        "silu", (2,), ops.silu_mul, {"gate_up_TG": torch.ones(2, 6)}
    )
    written = sorted(path.name for path in folder.iterdir())
    assert written == [
        "silu_2.0_traced.py",
        *(f"silu_2.{i}_{name}.py" for i, (name, _) in enumerate(made.passes, 1)),
    ]
    monkeypatch.delenv("NANOVLLM_DUMP_GRAPHS")
    assert make_compiler(choice).dump_dir is None


# Inductor -----------------------------------------------------------------------------------------


def store_and_read(
    k_CBKH: Tensor, v_CBKH: Tensor, cos_sin_MH: Tensor, k_TKH: Tensor, slot_T: Tensor
) -> tuple[Tensor]:
    """Writes, reads back and rotates: uses caches and tables of varying size in every way."""
    rotated_TKH = ops.rope(k_TKH, cos_sin_MH, slot_T % 4)
    ops.store_kv(rotated_TKH, k_TKH, k_CBKH, v_CBKH, slot_T)
    return (k_CBKH.view(-1, 2, 8)[slot_T] + v_CBKH.view(-1, 2, 8)[slot_T.flip(0)],)


def cache_inputs(num_blocks: int, num_positions: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_blocks)
    cache = torch.randn(2, num_blocks, 16, 2, 8, generator=generator)
    return {
        "k_CBKH": cache[0].clone(),
        "v_CBKH": cache[1].clone(),
        "cos_sin_MH": torch.randn(num_positions, 8, generator=generator),
        "k_TKH": torch.randn(3, 2, 8, generator=generator),
        "slot_T": torch.tensor([16, 2, 31]),
    }


def test_one_program_serves_any_number_of_blocks_and_positions() -> None:
    compiler = Compiler(
        inductor.lower, passes=(("replace_ops", replace_ops),), varying=VARYING, strict=True
    )
    program = compiler.program("store", (3,), store_and_read, cache_inputs(2, 4))
    compiler.seal()
    for num_blocks, num_positions in ((2, 4), (19, 99), (989, 5), (3, 989)):
        ours, expected = (
            cache_inputs(num_blocks, num_positions),
            cache_inputs(num_blocks, num_positions),
        )
        assert compiler.program("store", (3,), store_and_read, ours) is program
        torch.testing.assert_close(program(*ours.values()), store_and_read(*expected.values()))
        torch.testing.assert_close(ours, expected)
    assert compiler.num_compiled == 1


def test_static_sizes_are_compiled_as_numbers() -> None:
    """A static size that differs from the traced one is an error. Nothing recompiles silently."""
    compiler = Compiler(inductor.lower)
    program = compiler.program("add", (3,), add, inputs())
    assert program(torch.ones(3), torch.ones(3)).value.eq(2).all()
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.ones(5), torch.ones(5))


def test_importing_the_engine_leaves_inductor_s_folder_to_be_chosen() -> None:
    """On import, Dynamo would choose a folder in /tmp with a name that others can guess."""
    variables = {
        name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"
    }
    script = (
        "import os, nanovllm.llm, nanovllm.compile.lower.inductor\n"
        "print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"
