"""FX graph to Ascend IR through torchair, without Dynamo: AOTAutograd, torchair's converters, GE.

torchair's `cache_compile` takes only methods of an nn.Module and adds Dynamo's guards, so its steps
are called here directly: AOTAutograd makes the graph functional and `get_compiler` converts it. The
result is Python source with a serialised Ascend graph and a function `kernel`. The store keeps this
source; GE keeps its compiled graph in a separate folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.lower import hcom
from nanovllm.compile.lower.aot import functional
from nanovllm.kernels import collectives

KIND = "torchair"
GE_CACHE = "ge.graph_compiler_cache_dir"  # GE's option: the folder for a compiled graph
UNKNOWN_FOLDER = "<folder>"  # a placeholder: the folder's name depends on the generated code


@dataclass(frozen=True)
class TorchairOptions:
    """How torchair compiles.

    options: values for fields of its CompilerConfig, by path, such as
        "experimental_config.tiling_schedule_optimize".
    ge_cache: GE keeps compiled graphs in folders below this one; None: GE keeps nothing.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    ge_cache: Path | None = None


def compiler_config(settings: TorchairOptions) -> Any:
    """torchair's CompilerConfig. Raises ValueError for an option or a value that it refuses."""
    from torchair.configs.compiler_config import CompilerConfig

    config = CompilerConfig()
    config.mode = "max-autotune"  # GE
    config.experimental_config.frozen_parameter = True
    for path, value in settings.options.items():
        owner: Any = config
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if not parents or not hasattr(owner, name):
            raise ValueError(
                f"npu_graph_options names {path!r}, which torchair's CompilerConfig does not have"
            )
        try:
            setattr(owner, name, value)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"npu_graph_options[{path!r}] is {value!r}: {error}") from error
    return config


class AscendProgram:
    """Generated code: a serialised Ascend graph and the function that runs it.

    On the first call GE compiles the graph, or loads it from the folder that the code names.
    """

    def __init__(self, code: str) -> None:
        self._code = code
        module = ModuleType("nanovllm_ascend_graph")
        exec(compile(code, "<ascend graph>", "exec"), module.__dict__)
        self._module: Any = module
        self._takes_rank: bool = module.takes_rank
        self._rank: tuple[Tensor, ...] | None = None  # what follows the inputs, from the first call

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self._rank is None:
            self._rank = self._start(inputs[0])
        return self._module.kernel(*inputs, *self._rank)

    def _start(self, like: Tensor) -> tuple[Tensor, ...]:
        """Prepare for GE; returns this process's rank if the graph takes it."""
        hcom.join(self._module, GE_CACHE)
        folder = self._module.local_compile_options.get(GE_CACHE)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        return (collectives.own_rank(like),) if self._takes_rank else ()

    def stored(self) -> tuple[str, bytes]:
        """(kind of artifact, its bytes), from which `load` makes an equal program."""
        return KIND, self._code.encode()


def load(content: bytes) -> AscendProgram:
    """The program of `AscendProgram.stored()`. Raises ValueError if this torchair cannot run it."""
    try:
        return AscendProgram(content.decode())
    except Exception as error:  # code of another version may raise any error; lower it again
        raise ValueError(f"torchair cannot take it: {type(error).__name__}: {error}") from error


def lower(
    graph: GraphModule, fakes: Sequence[Tensor], *, settings: TorchairOptions
) -> AscendProgram:
    """Lower a graph of static shapes and ops that torchair converts.

    The result takes the graph's placeholders in order.
    """
    code = generate(graph, fakes, settings)
    if settings.ge_cache is not None:
        name = hashlib.sha256(code.encode()).hexdigest()[:32]
        code = code.replace(UNKNOWN_FOLDER, str(settings.ge_cache / name))
    return AscendProgram(code)


def generate(graph: GraphModule, fakes: Sequence[Tensor], settings: TorchairOptions) -> str:
    """Python source that holds the Ascend graph and runs it. Needs no device, only converters.

    The graph takes the placeholders in order, and this process's rank after them if `takes_rank`.

    Placeholders with `node.meta["frozen"]` are weights, whose memory never moves.
    """
    from torchair import get_compiler
    from torchair._utils import add_npu_patch, get_npu_default_decompositions

    config = compiler_config(settings)
    hcom.register()
    rank = hcom.rank_as_input(graph, fakes)
    decompositions = {**get_npu_default_decompositions(), **DECOMPOSITIONS}
    add_npu_patch(decompositions, config)
    extra = {GE_CACHE: UNKNOWN_FOLDER} if settings.ge_cache is not None else {}

    def convert(merged: GraphModule, inputs: list[Any]) -> str:
        code = get_compiler(config)(merged, inputs).get_code(extra)
        if not isinstance(code, str):
            raise RuntimeError("torchair generated no code for this graph under these options")
        return code

    code: str = functional(graph, [*fakes, *rank], decompositions, convert)
    return f"{code}\ntakes_rank = {bool(rank)}\n"


def cann_version() -> str:
    from torch_npu.npu.utils import get_cann_version

    return str(get_cann_version())


# Decompositions of aten ops that have no converter, or one that makes dynamic shapes -----------


def _xor(a: Tensor, b: Tensor | int) -> Tensor:
    return a + b - 2 * (a & b)  # for non-negative numbers below 2^62


def _and(a: Tensor, mask: int) -> Tensor:
    return a & torch.full((1,), mask, dtype=a.dtype, device=a.device)


def _shift_right(a: Tensor, bits: int) -> Tensor:
    return torch.div(a, 2**bits, rounding_mode="floor")


def _index(a: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Selects rows by number; torchair converts every other form of indexing itself."""
    rows = indices[0]
    if len(indices) == 1 and rows is not None and rows.dim() == 1 and rows.dtype != torch.bool:
        return a.index_select(0, rows)
    return NotImplemented


def _index_copy(a: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    shape = [-1 if axis == dim % a.dim() else 1 for axis in range(a.dim())]
    return a.scatter(dim, index.view(shape).expand_as(source), source)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """torchair converts both forms to GE's Gelu, which is the one with tanh."""
    if approximate == "tanh":
        return NotImplemented
    wide = x.float()
    return (wide * 0.5 * (1 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Above the threshold torch returns x, which this is up to rounding."""
    if beta != 1 or threshold < 20:
        return NotImplemented
    return x.clamp(min=0) + torch.log1p((-x.abs()).exp())


aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.bitwise_and.Scalar: _and,
    aten.bitwise_xor.Tensor: _xor,
    aten.bitwise_xor.Scalar: _xor,
    aten.__rshift__.Scalar: _shift_right,
    aten.index.Tensor: _index,
    aten.index_copy.default: _index_copy,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
}
