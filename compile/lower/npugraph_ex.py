"""FX graph to a captured graph through npugraph_ex, torch_npu's compiler for captured graphs.

It takes a functional graph, puts writes back in place, and captures the graph on the first call.
Lengths of requests are numbers on the host there. They are inputs of the graph, and at each replay
npugraph_ex replaces them in the captured attention ops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from nanovllm.compile.lower.aot import functional

# Options of npugraph_ex that the engine sets. A step's inputs have the same memory each time, so
# they are not copied; weights never move; all graphs share a memory pool and keep their outputs.
FIXED: dict[str, object] = {
    "mode": "npugraph_ex",
    "clone_input": False,
    "frozen_parameter": True,
    "reuse_graph_pool_in_same_fx": False,
    "capture_error_mode": "thread_local",  # other threads may allocate during a capture
}
POOL, UNCAPTURED = "use_graph_pool", "force_eager"
LENGTHS = "actual_seq_lengths_kv"  # the argument of Ascend's attention op that is replaced


@dataclass(frozen=True)
class NpugraphOptions:
    """How npugraph_ex compiles.

    options: values for fields of its CompilerConfig, by name, such as "static_kernel_compile".
    """

    options: Mapping[str, object] = field(default_factory=dict)


def check(settings: NpugraphOptions) -> None:
    """Raises ValueError for an option or a value that npugraph_ex or the engine refuses."""
    try:
        from npugraph_ex import CompilerConfig
    except ImportError as error:
        raise ValueError(
            f"npu_graph_mode is 'npugraph_ex', which this torch_npu does not have: {error}"
        ) from error

    config = CompilerConfig()
    for name, value in settings.options.items():
        if name in {*FIXED, POOL, UNCAPTURED}:
            raise ValueError(f"npu_graph_options names {name!r}, which the engine sets")
        if name.startswith("_") or name not in vars(config):
            raise ValueError(
                f"npu_graph_options names {name!r}, which npugraph_ex's CompilerConfig does not "
                "have"
            )
        try:
            setattr(config, name, value)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"npu_graph_options[{name!r}] is {value!r}: {error}") from error


def lower(
    graph: GraphModule,
    fakes: Sequence[Tensor],
    *,
    settings: NpugraphOptions,
    pool: Callable[[], object],
    lengths: Callable[[int], Sequence[int]],
) -> Callable[..., Sequence[Tensor]]:
    """Lower a graph of static shapes. The result takes the graph's placeholders in order.

    A graph whose attention takes lengths from the host is captured on its first call, into the
    memory pool `pool()`; at each call `lengths(R)` returns the lengths of its R rows. Any other
    graph runs op by op, after npugraph_ex's passes.
    """
    symbols = lengths_as_inputs(graph, fakes)
    options: dict[str, object] = {**FIXED, **settings.options}
    options |= {POOL: pool()} if symbols else {UNCAPTURED: True}
    module = ModuleType("nanovllm_captured_graph")
    code = generate(graph, [*fakes, *symbols], options)
    exec(compile(code, "<captured graph>", "exec"), module.__dict__)
    run, num = module.kernel, len(symbols)
    return (lambda *inputs: run(*inputs, *lengths(num))) if num else run


def lengths_as_inputs(graph: GraphModule, fakes: Sequence[Any]) -> list[SymInt]:
    """Replace the lengths in a graph's attention ops by new placeholders after all others.

    Returns an example of each. All attention ops of a step have the same rows.
    """
    takers = [node for node in graph.graph.nodes if node.kwargs.get(LENGTHS)]
    if not takers:
        return []
    counts = {len(node.kwargs[LENGTHS]) for node in takers}
    assert len(counts) == 1, f"attention ops have different numbers of rows: {counts}"
    *_, last = graph.graph.find_nodes(op="placeholder")
    symbols: list[SymInt] = []
    rows: list[Node] = []
    for row in range(counts.pop()):
        name = f"seq_len_{row}"
        symbols.append(_symbol(fakes[0].fake_mode.shape_env, name, 2 + row))
        with graph.graph.inserting_after(rows[-1] if rows else last):
            rows.append(graph.graph.placeholder(name))
    for node in takers:
        node.update_kwarg(LENGTHS, rows)
    graph.recompile()
    return symbols


def _symbol(shape_env: Any, name: str, hint: int) -> SymInt:
    """A symbolic number, which passes do not treat as a constant."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = shape_env.create_unspecified_symbol(hint, source, DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)


def generate(graph: GraphModule, examples: Sequence[Any], options: dict[str, object]) -> str:
    """Python source with a function `kernel` that captures and replays the graph."""
    npu: Any = torch  # importing torch_npu adds torch.npu

    def convert(merged: GraphModule, inputs: list[Any]) -> str:
        code = npu.npu.npugraph_ex.compile_fx(merged, inputs, options).get_code({})
        if not isinstance(code, str):
            raise RuntimeError("npugraph_ex generated no code for this graph under these options")
        return code

    with warnings.catch_warnings():
        # it warns twice per graph that frozen weights must not move
        warnings.filterwarnings("ignore", message="When enable frozen_parameter")
        # Decompositions and patches of npugraph_ex concern collectives and gradients. They are left
        # out: torchair's cannot be registered after them, and another engine may need torchair.
        return functional(graph, examples, {}, convert)
