"""FX graph to Triton kernels (GPU) or C++ (CPU) through Inductor, without Dynamo."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanovllm.kernels import recorded

if TYPE_CHECKING:
    from torch.fx import GraphModule

KIND = "inductor"


class _State:
    compiler: Path | None = None


def use_compiler(program: Path | None) -> None:
    """Compile C++ with this program. None: torch's choice, which is CXX or g++."""
    _State.compiler = program


def _import_inductor() -> Any:
    from torch import _inductor

    if _State.compiler is not None:
        from torch._inductor import config

        config.cpp.cxx = (None, str(_State.compiler))
    return _inductor


class InductorProgram:
    """Code that Inductor generated.

    Its stored form is torch's, which holds pickles: load it only from a folder that others cannot
    write to.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        recorded.refuse("a program of Inductor")
        return self._compiled(*inputs)

    def stored(self) -> tuple[str, bytes]:
        """(kind of artifact, its bytes), from which `load` makes an equal program."""
        with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
            path = Path(folder) / "artifact"
            self._compiled.save(path=str(path), format="binary")
            return KIND, path.read_bytes()


def load(content: bytes) -> InductorProgram:
    """The program of `InductorProgram.stored()`. Raises ValueError if this torch cannot read it."""
    _import_inductor()
    from torch._inductor.standalone_compile import CompiledArtifact

    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(content)
        try:
            return InductorProgram(CompiledArtifact.load(path=str(path), format="binary"))
        except Exception as error:  # torch may raise any error here; the caller compiles again
            raise ValueError(f"Inductor cannot read it: {type(error).__name__}: {error}") from error


def lower(graph: GraphModule, fakes: Sequence[Tensor]) -> InductorProgram:
    """Compile a graph of static shapes. The result takes its placeholders, without guards."""
    inductor = _import_inductor()
    # standalone_compile reads the fake mode, which records the static dimensions, from this key of
    # the outputs. Dynamo sets it, make_fx does not; without it every dimension would be dynamic.
    outputs: Any = graph.graph.output_node().args[0]
    for node in outputs:
        node.meta["example_value"] = node.meta["val"]
    # The number of threads is not in an artifact's key, so it must stay dynamic.
    options = {"config_patches": {"cpp.dynamic_threads": True}}
    compiled = inductor.standalone_compile(
        graph, list(fakes), dynamic_shapes="from_graph", options=options
    )
    return InductorProgram(compiled)


def lower_if_worth_it(
    graph: GraphModule, fakes: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """A call list if Inductor could not make the graph faster, else a program of Inductor."""
    from nanovllm.compile.lower import calls

    if calls.is_enough(graph):
        with contextlib.suppress(calls.NotListable):
            return calls.lower(graph, fakes)
    return lower(graph, fakes)
