"""FX graph to machine code through Inductor, without Dynamo: Triton kernels on a GPU, C++ on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.fx import GraphModule

KIND = "inductor"


class InductorProgram:
    """What Inductor made. Its stored form is torch's own, which holds pickles: read it only from where others can't write."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self._compiled(*inputs)

    def stored(self) -> tuple[str, bytes]:
        """(kind of artifact, its bytes), from which `load` makes the same program."""
        with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
            path = Path(folder) / "artifact"
            self._compiled.save(path=str(path), format="binary")
            return KIND, path.read_bytes()


def load(content: bytes) -> InductorProgram:
    """The program of `InductorProgram.stored()`. Raises ValueError where this torch cannot read it."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(content)
        try:
            return InductorProgram(CompiledArtifact.load(path=str(path), format="binary"))
        except (
            Exception
        ) as error:  # whatever torch's reader raises, the program can still be compiled
            raise ValueError(f"Inductor cannot read it: {type(error).__name__}: {error}") from error


def lower(graph: GraphModule, fakes: Sequence[Tensor]) -> InductorProgram:
    """Compile a graph of static shapes; the result takes the graph's placeholders in order and has no guards."""
    from torch._inductor import standalone_compile

    # standalone_compile takes the graph's fake mode, and with it which dimensions are static, from this key of its
    # outputs, which Dynamo sets and make_fx does not; without it every dimension would be compiled as dynamic.
    outputs: Any = graph.graph.output_node().args[0]
    for node in outputs:
        node.meta["example_value"] = node.meta["val"]
    # the number of threads stays open: it is no part of an artifact's key
    options = {"config_patches": {"cpp.dynamic_threads": True}}
    return InductorProgram(
        standalone_compile(graph, list(fakes), dynamic_shapes="from_graph", options=options)
    )


def lower_if_worth_it(
    graph: GraphModule, fakes: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """A plan of the graph's calls where there is nothing to generate, else what Inductor makes of it."""
    from nanovllm.compile.lower import plan

    if plan.is_enough(graph):
        try:
            return plan.lower(graph, fakes)
        except plan.NotAPlan:
            pass
    return lower(graph, fakes)
