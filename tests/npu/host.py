"""Executes eager ops on npu tensors. Under the stub of CANN their memory is the host's.

`Host` is a dispatch mode, because the stub's kernels compute nothing. An op with npu tensors runs
on host tensors of the same memory, and its results are copied to new npu tensors. Views,
allocations and ops without npu tensors go to torch_npu unchanged. While `recording`, the mode also
keeps the ops, so that a captured graph can be replayed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_any, tree_map

from nanovllm.kernels import collectives, ops
from tests.npu import expert_semantics, semantics

Step = Callable[[], None]


def host_view(tensor: Tensor) -> Tensor:
    """A host tensor on the memory of an npu tensor; valid while the npu tensor lives."""
    storage = tensor.untyped_storage()
    out = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes() == 0:
        return out.new_empty(tensor.shape)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    data = torch.frombuffer(memory, dtype=torch.uint8)
    return out.set_(data.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    workspace: object = None,
    out: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    attended = semantics.fused_infer_attention_score(query, key, value, **options)
    if out is not None:
        out[0].copy_(attended)
    return attended, torch.empty(0)


# torch_npu's own ops by name, on host tensors
NPU_OPS: dict[str, Callable[..., Any]] = {
    "npu::npu_rms_norm": semantics.rms_norm,
    "npu::npu_add_rms_norm": semantics.add_rms_norm,
    "npu::npu_rotary_mul": semantics.rotary_mul,
    "npu::npu_swiglu": semantics.swiglu,
    "npu::npu_scatter_nd_update_": semantics.scatter_nd_update,
    "npu::npu_fused_infer_attention_score": _attention,
    "npu::npu_moe_gating_top_k_softmax": expert_semantics.moe_gating_top_k_softmax,
    "npu::npu_moe_init_routing_v2": expert_semantics.moe_init_routing_v2,
    "npu::npu_grouped_matmul": expert_semantics.grouped_matmul,
    "npu::npu_moe_finalize_routing": expert_semantics.moe_finalize_routing,
}
# the schema says view, but these return a view only if there is nothing to do
COPIES_OR_VIEWS = ("aten::to", "aten::contiguous")
# Within a kernel they reach this mode whole, and copy if the result cannot be a view.
MADE_OF_OTHERS = ("aten::flatten", "aten::reshape")
TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
# ops that torch_npu computes: memory, and sizes of results
NATIVE = (
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::set_",
    "npu::get_npu_format",
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_infer_output",
)


def _is_npu(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, FakeTensor)
        and value.device.type == "npu"
    )


class Host(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # groups of steps, the last of which grows; see capture.py
        self.recording: list[list[Step]] | None = None
        self.replacing: int | None = None  # the group that grows instead
        self.seen: set[str] = set()  # npu ops and aten ops that ran eagerly
        self._kernels: set[str] = set()
        self._generators: dict[int, torch.Generator] = {}

    def install(self, monkeypatch: Any) -> None:
        """Run our kernels for npu tensors under this mode; by default kernels run below modes."""
        original = ops.register_kernels

        def register(dispatch_key: str, kernels: dict[str, Callable[..., Any]]) -> None:
            if dispatch_key == "PrivateUse1":
                self._kernels |= {f"nanovllm::{name}" for name in kernels}
                kernels = {name: self._under_mode(kernel) for name, kernel in kernels.items()}
            original(dispatch_key, kernels)

        monkeypatch.setattr(ops, "register_kernels", register)

    def _under_mode(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return kernel(*args, **kwargs)

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # this mode sees ops before tracing modes do
        if any(torch._C._get_dispatch_mode(key) is not None for key in TRACING):
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        name = func._schema.name
        asked = kwargs.get("device")
        on_npu = tree_any(_is_npu, (args, kwargs))
        is_fake = tree_any(lambda value: isinstance(value, FakeTensor), (args, kwargs))
        makes_npu = asked is not None and torch.device(asked).type == "npu"
        may_alias = any(result.alias_info for result in func._schema.returns)
        is_view = may_alias and not func._schema.is_mutable and name not in COPIES_OR_VIEWS
        if name in MADE_OF_OTHERS and on_npu and not is_fake:
            with self:
                return func.decompose(*args, **kwargs)
        if is_fake or not (on_npu or makes_npu) or is_view or name in NATIVE:
            return func(*args, **kwargs)
        if name in self._kernels:
            return func(*args, **kwargs)
        if (op := ops.op_name(func)) in collectives.COLLECTIVES:
            with self:
                return getattr(collectives, op)(*args, **kwargs)
        self.seen.add(name)
        device = torch.device(asked if asked is not None else "npu")
        if device.type == "npu" and device.index is None:
            device = torch.device("npu", 0)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        host_args, host_kwargs = tree_map(self._to_host, (args, kwargs))
        function = NPU_OPS.get(name, func)
        assert function is not func or func.namespace != "npu", (
            f"{name} has no meaning in tests/npu/semantics.py"
        )
        with _disable_current_modes():
            results = function(*host_args, **host_kwargs)
            written: list[tuple[Tensor, int]] = []
            if "out" in kwargs:  # a schema of torch_npu does not say that it returns these
                out = kwargs["out"]
            elif may_alias and (func._schema.is_mutable or results is host_args[0]):
                out = args[0]
            else:
                flat = results if isinstance(results, (tuple, list)) else (results,)
                made = [
                    self._to_device(value, device, written, idx) for idx, value in enumerate(flat)
                ]
                out = type(results)(made) if isinstance(results, (tuple, list)) else made[0]
        self.record(lambda: _again(function, host_args, host_kwargs, written))
        return out

    def record(self, step: Step) -> None:
        """Keep a step for replays if a graph is being captured."""
        if self.recording is not None:
            self.recording[-1 if self.replacing is None else self.replacing].append(step)

    def _to_host(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            made = torch.Generator().manual_seed(value.initial_seed())
            return self._generators.setdefault(id(value), made)
        return host_view(value) if _is_npu(value) else value

    def _to_device(
        self, value: Any, device: torch.device, written: list[tuple[Tensor, int]], idx: int
    ) -> Any:
        if not isinstance(value, Tensor) or device.type != "npu":
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        host_view(made).copy_(value)
        written.append((made, idx))
        return made


def _again(function: Any, args: Any, kwargs: Any, written: list[tuple[Tensor, int]]) -> None:
    with _disable_current_modes():
        results = function(*args, **kwargs)
        flat = results if isinstance(results, (tuple, list)) else (results,)
        for made, idx in written:
            host_view(made).copy_(flat[idx])
