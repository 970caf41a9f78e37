"""FX graph to Ascend IR through torchair, without Dynamo: AOTAutograd, torchair's converters, GE.

torchair's own `cache_compile` wraps this same path in Dynamo and its guards and takes only methods of an nn.Module. Its
parts are used directly here: AOTAutograd makes the graph functional, `get_compiler` converts it, and the generated code,
a serialised Ascend graph and a function `kernel`, is what the cache keeps. GE keeps its compiled graph beside it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

logger = logging.getLogger(__name__)

CODE_FILE = "kernel.py"


@dataclass(frozen=True)
class Settings:
    """How torchair compiles. `options` are paths into its CompilerConfig, such as
    "experimental_config.tiling_schedule_optimize"; inputs whose names begin with one of `frozen` are weights, whose memory
    stays where it is. `cache` None keeps nothing."""

    options: Mapping[str, object] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    cache: Path | None = None


def compiler_config(settings: Settings) -> Any:
    """torchair's CompilerConfig; ValueError naming an option that it does not have, or a value that it does not take."""
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
            raise ValueError(f"npu_graph_options names {path!r}, which torchair's CompilerConfig does not have")
        try:
            setattr(owner, name, value)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"npu_graph_options[{path!r}] is {value!r}: {error}") from error
    return config


def lower(graph: GraphModule, fakes: Sequence[Tensor], *, settings: Settings) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph of static shapes whose ops torchair can convert; takes the graph's placeholders in order.

    The conversion is skipped where the cache has the code of the same graph under the same settings and versions.
    """
    if settings.cache is None:
        return load(generate(graph, fakes, settings), None)
    folder = settings.cache / cache_key(graph, settings)
    path = folder / CODE_FILE
    if not path.is_file():
        write_whole(path, generate(graph, fakes, settings))
    return load(path.read_text(), folder)


def load(code: str, folder: Path | None) -> Callable[..., Sequence[Tensor]]:
    """The function in generated code; GE reads and writes its compiled graph in `folder`, on the first call."""
    module = ModuleType("nanovllm_ascend_graph")
    exec(compile(code, str(folder or "<ascend graph>"), "exec"), module.__dict__)
    if folder is not None and hasattr(module, "_update_ge_cache_dir"):
        module._update_ge_cache_dir(str(folder))
    return module.kernel


def generate(graph: GraphModule, fakes: Sequence[Tensor], settings: Settings) -> str:
    """Python source that holds the Ascend graph and runs it. Needs the ops' converters, no device."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.compile_utils import fx_graph_cse
    from torchair import get_compiler
    from torchair._utils import add_npu_patch, get_npu_default_decompositions

    config = compiler_config(settings)
    decompositions = {**get_npu_default_decompositions(), **DECOMPOSITIONS}
    add_npu_patch(decompositions, config)
    frozen = [node.name.startswith(settings.frozen) for node in graph.graph.find_nodes(op="placeholder")]
    generated: list[str] = []

    def convert(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        for tensor, is_frozen in zip(example_inputs, frozen):
            if is_frozen:
                tensor._torchair_is_parameter = True
        # indices and rotary rows are the same in every layer
        merged = GraphModule(gm, fx_graph_cse(gm.graph))
        # GE keeps its compiled graph in a folder only if the generated code mentions one; `load` says which
        extra = {"ge.graph_compiler_cache_dir": "."} if settings.cache is not None else {}
        code = get_compiler(config)(merged, list(example_inputs)).get_code(extra)
        if not isinstance(code, str):
            raise RuntimeError("torchair generated no code for this graph under these options")
        generated.append(code)
        return gm

    with torch.no_grad():
        aot_module_simplified(
            graph,
            list(fakes),
            fw_compiler=convert,
            bw_compiler=None,
            inference_compiler=convert,
            decompositions=decompositions,
            keep_inference_input_mutations=True,
        )
    (code,) = generated
    return code


def cache_key(graph: GraphModule, settings: Settings) -> str:
    """Of the graph with all shapes, dtypes and strides, the settings, the versions and this file."""
    import torch_npu

    lines = [f"{sorted(settings.options.items())} {settings.frozen}"]
    lines += [torch.__version__, torch_npu.__version__, str(cann_version()), str(torch_npu.npu.get_device_name())]
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        meta = (value.dtype, tuple(value.shape), value.stride(), value.device.type) if isinstance(value, Tensor) else ""
        lines.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {meta}")
    lines.append(Path(__file__).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def cann_version() -> str:
    from torch_npu.npu.utils import get_cann_version

    return str(get_cann_version())


def write_whole(path: Path, text: str) -> None:
    """All of the file or none of it, for its owner alone: the code in it is executed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


# aten ops without a converter, or whose converter leads to an op with dynamic shapes, in terms of others ----------------


def _xor(a: Tensor, b: Tensor | int) -> Tensor:
    return a + b - 2 * (a & b)  # of non-negative numbers below 2^62


def _and(a: Tensor, mask: int) -> Tensor:
    return a & torch.full((1,), mask, dtype=a.dtype, device=a.device)


def _shift_right(a: Tensor, bits: int) -> Tensor:
    return torch.div(a, 2**bits, rounding_mode="floor")


def _index(a: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Rows by number; every other form keeps its converter."""
    if len(indices) == 1 and indices[0] is not None and indices[0].dim() == 1 and indices[0].dtype != torch.bool:
        return a.index_select(0, indices[0])
    return NotImplemented


def _index_copy(a: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    shape = [-1 if axis == dim % a.dim() else 1 for axis in range(a.dim())]
    return a.scatter(dim, index.view(shape).expand_as(source), source)


aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.bitwise_and.Scalar: _and,
    aten.bitwise_xor.Tensor: _xor,
    aten.bitwise_xor.Scalar: _xor,
    aten.__rshift__.Scalar: _shift_right,
    aten.index.Tensor: _index,
    aten.index_copy.default: _index_copy,
}
