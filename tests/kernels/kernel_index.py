"""The index of kernels: which kernel computes an op on a device, and when it is chosen.

    python -m tests.kernels.kernel_index        # writes kernels/README.md

The tables come from the registrations, from the platforms' passes and from the constants by which
kernels are chosen. Only the words of CHOSEN and PASSES are written by hand. `test_triton_index.py`
compares them with what the registered functions can launch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from triton.runtime.jit import KernelInterface

from nanovllm.kernels import collectives, ops, order, reference
from nanovllm.kernels.cpu import experts as cpu_experts
from nanovllm.kernels.cpu import gated_delta as cpu_delta
from nanovllm.kernels.cpu import ggml as cpu_ggml
from nanovllm.kernels.cpu import ordered as cpu_ordered
from nanovllm.kernels.cpu import packed as cpu_packed
from nanovllm.kernels.cpu import register as cpu_register
from nanovllm.kernels.cpu import step as cpu_step
from nanovllm.kernels.cuda import packed_groups, packed_stream, packed_wgmma
from nanovllm.kernels.npu import kernels as npu_kernels
from nanovllm.kernels.triton import (
    all_reduce,
    attention_prefill_hopper,
    experts,
    gated_gemm,
    lora_sizes,
    packed_linear,
    packed_register,
    packed_tiles,
    skinny_tiles,
    split_k_gemm,
    ssd,
    topk_softmax,
    varlen_attention,
)
from nanovllm.kernels.triton import register as triton_register
from nanovllm.kernels.triton import step as triton_step
from nanovllm.platforms import cpu, cuda

FOLDER = Path(__file__).parents[2] / "kernels"
PAGE = FOLDER / "README.md"
ROOT = "nanovllm.kernels."
Kernels = Mapping[str, Callable[..., Any]]

TRITON: Kernels = {**triton_register.KERNELS, **triton_step.KERNELS, **packed_register.KERNELS}
CPU: Kernels = {
    **cpu_register.KERNELS,
    **cpu_step.KERNELS,
    **cpu_experts.KERNELS,
    **cpu_delta.KERNELS,
    **cpu_packed.KERNELS,
    **cpu_ggml.KERNELS,
    **cpu_ordered.KERNELS,
}
# Ops that stay in compiled graphs, and so run the registered kernel there.
KEPT = {"cuda": cuda.KERNEL_OPS | order.ORDERED, "cpu": cpu.KERNEL_OPS | {"linear"} | order.ORDERED}

# The pass of `compile/passes/` that puts an op into graphs. Models call the other ops.
PASSES = {
    "add_rms_norm": "fuse_add_norm",
    "qk_norm_rope_store": "fuse_rope_store",
    "fused_linear": "fuse_linear",
    "fused_packed_linear": "fuse_linear",
    "fused_fp8_linear": "fuse_linear",
    "linear_": "add_in_place",
    "add_lora_": "lora_in_place",
    "add_lora_silu": "fuse_lora",
    "lora_linear": "fuse_lora",
    "all_reduce_": "reduce_in_place",
    "all_reduce_norm": "fuse_reduce_norm",
    "norm_router_topk": "fuse_router",
    **dict.fromkeys(order.ORDERED, "order_sums"),
}


def _sizes(by_ranks: Mapping[int, int]) -> str:
    sizes = {num: size for num, size in by_ranks.items() if size}
    shown = (f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB" for size in sizes.values())
    return f"{', '.join(shown)} for {', '.join(map(str, sizes))} ranks"


_FEW = f"one token, or at most {experts.PAIRS_PER_EXPERT:g} (token, expert) pairs per expert"
_ONE_SHOT = f"up to {_sizes(all_reduce.ONE_SHOT_BYTES)} whose GPUs read each other's memory"
_TWO_SHOT = f"above that up to {_sizes(all_reduce.TWO_SHOT_BYTES)}; else NCCL"
_LORA = (
    f"parts of a multiple of {lora_sizes.MIN_OUTPUTS} outputs; tokens without adapters cost nothing"
)
_HOPPER = attention_prefill_hopper
# op → its Triton kernels, each with the condition under which it is launched
CHOSEN: dict[str, dict[str, str]] = {
    "paged_attention": {
        "decode_kernel": "decode: `max_q_len` is 1",
        "prefill_hopper_kernel": (
            f"prefill on sm_90: `max_q_len` from {_HOPPER.MIN_TOKENS} on, heads of "
            f"{_HOPPER.HEAD.value}, groups of 1, 2, 4 … {_HOPPER.HALF.value} heads, bf16 or fp16, "
            "no window, no fp8 cache, blocks of a multiple of 16 tokens (`suits`)"
        ),
        "prefill_kernel": "every other prefill",
    },
    "ordered_attention": {"ordered_attention_kernel": "deterministic engines on sm_90"},
    "ordered_linear": {
        "ordered_gemm_kernel": "deterministic engines on sm_90",
        "gated_gemm_kernel": "SiLU·up of one chain, where it has a tile",
        "silu_mul_kernel": "after a product of cuBLAS, from 33 rows on where its bits are the same",
    },
    "latent_inputs": {"latent_inputs_kernel": "always; cuBLAS absorbs the queries"},
    "head_linear": {},
    "latent_attention": {
        "latent_decode_kernel": "decode: `max_q_len` is 1",
        "latent_merge_kernel": "decode, unless there is one worker",
        "latent_prefill_kernel": "steps of several tokens a row",
    },
    "latent_span_attention": {
        "latent_prefill_kernel": "rows with older tokens, and steps of few tokens a row",
        "prefill_kernel": "rows whose tokens are all new",
    },
    **{
        name: {"varlen_attention_kernel": f"always; heads of up to {varlen_attention.MAX_HEAD}"}
        for name in ("segment_attention", "varlen_attention")
    },
    "zero_padding_": {"zero_padding_kernel": "always: after each prefill by flash-attn"},
    **{
        name: {"lora_shrink_kernel": _LORA, "lora_expand_kernel": "after it"}
        for name in ("add_lora", "add_lora_", "add_lora_silu")
    },
    "adapter_tiles": {
        "adapter_tiles_kernel": "up to `adapter_tiles.MAX_TOKENS` tokens, which is 0 until timed"
    },
    "lora_linear": {
        "lora_row_kernel": "one row of bf16 or fp16, plain weights",
        "lora_gemv_kernel": "after it",
    },
    "fused_linear": {
        "gemv_kernel": "one row, if `skinny_tiles.max_rows` allows; the only one on sm_75",
        "skinny_gemm_kernel": (
            f"2 to {skinny_tiles.MAX_ROWS} rows, up to `skinny_tiles.max_rows` of the shape"
        ),
        "gated_gemm_kernel": (
            f"SiLU·up without norm and residual, up to {max(gated_gemm.TILES)} rows, weights of "
            f"more than {split_k_gemm.SMALL_WEIGHT >> 20} Mi elements, if a tile fills the device "
            "(`gated_tile`)"
        ),
        "split_k_gemm_kernel": (
            f"no norm, up to `split_k_gemm.max_rows` of the shape, at most {split_k_gemm.MAX_ROWS} "
            "rows; the depth is split if there are few outputs"
        ),
    },
    "linear_": {},
    "rms_norm": {"rms_norm_kernel": "always"},
    "add_rms_norm": {"rms_norm_kernel": "always"},
    "layer_norm": {"layer_norm_kernel": "always"},
    "silu_mul": {"silu_mul_kernel": "always"},
    "packed_lookup": {"packed_lookup_kernel": "always"},
    "rope": {"rope_kernel": "always"},
    "store_kv": {"store_kv_kernel": "always"},
    "qk_norm_rope_store": {"qk_norm_rope_store_kernel": "always"},
    "all_reduce": {"one_shot_kernel": _ONE_SHOT, "two_shot_kernel": _TWO_SHOT},
    "all_reduce_": {"one_shot_kernel": _ONE_SHOT, "two_shot_kernel": _TWO_SHOT},
    "all_reduce_norm": {
        "reduce_norm_kernel": f"up to {all_reduce.NORM_ROWS} rows that one shot would add",
        "one_shot_kernel": "else, and then the norm; sizes as above",
        "two_shot_kernel": "else, and then the norm; sizes as above",
        "rms_norm_kernel": "after a sum in a launch of its own",
    },
    "gather_columns": {
        "gather_columns_kernel": (
            f"up to {all_reduce.GATHER_BYTES >> 20} MiB of a rank, on GPUs that read each other's "
            "memory; else NCCL"
        )
    },
    "sample_columns": {
        "best_of_span_kernel": "always",
        "best_of_ranks_kernel": "on GPUs that read each other's memory; else NCCL gathers",
    },
    "causal_conv": {"causal_conv_kernel": "always", "conv_state_kernel": "always"},
    "gated_delta": {
        "prepare_chunks_kernel": "prompts in 16 bits, on matrix units (else plain torch)",
        "scan_chunks_kernel": "the same",
        "delta_tokens_kernel": "if the states after all tokens are kept: verified proposals",
        "zero_padding_kernel": "after each of them",
    },
    "gated_delta_step": {"gated_delta_step_kernel": "always: decode steps"},
    "ssd": {
        "ssd_scores_kernel": (
            f"prompts in 16 bits, on matrix units, states of up to {ssd.MAX_STATE} (else plain "
            "torch)"
        ),
        "ssd_chunks_kernel": "the same",
        "ssd_tokens_kernel": "if the states after all tokens are kept: verified proposals",
        "zero_padding_kernel": "after each of them",
    },
    "ssd_step": {"ssd_step_kernel": "always: decode steps"},
    "topk_softmax": {"topk_softmax_kernel": "always"},
    "group_topk": {"group_topk_kernel": "always"},
    "norm_router_topk": {
        "norm_router_topk_kernel": (
            f"one token of at most {topk_softmax.MAX_DEPTH} numbers (the pass fuses no others)"
        )
    },
    "experts": {
        "moe_gemv_gate_up_kernel": _FEW,
        "moe_gemv_down_kernel": _FEW,
        "sort_pairs_kernel": "more pairs",
        "grouped_gemm_kernel": "more pairs, twice",
        "combine_kernel": "more pairs",
    },
    "expert_linear": {"sort_pairs_kernel": "always", "grouped_gemm_kernel": "always"},
    "ordered_experts": {
        "ordered_pairs_kernel": f"deterministic engines on sm_90, twice: {_FEW}",
        "sort_pairs_kernel": "more pairs",
        "grouped_gemm_kernel": "more pairs, twice",
        "combine_kernel": "always",
    },
    "fetch_experts": {"fetch_plan_kernel": "always", "copy_kernel": "always"},
    "stream_experts": {"stream_plan_kernel": "always", "copy_kernel": "always"},
    "sample": {"best_of_span_kernel": "always", "best_of_row_kernel": "always"},
    "apply_top_k_top_p": {"apply_top_k_top_p_kernel": "always"},
    "apply_token_bitmask": {"apply_token_bitmask_kernel": "always"},
    "decode_inputs": {"decode_inputs_kernel": "always"},
    "span_inputs": {"span_inputs_kernel": "always"},
    "sampling_inputs": {"sampling_inputs_kernel": "always"},
    "advance": {"advance_kernel": "always"},
    "sample_of": {"best_of_span_kernel": "always", "best_of_row_kernel": "always"},
    "accept": {"accept_kernel": "always: a program for each row"},
    "next_tokens": {"next_tokens_kernel": "always: a program for each row"},
    "draft_inputs": {"draft_inputs_kernel": "always"},
    "rms_norm_each": {"rms_norm_each_kernel": "always: a program for each part of a token"},
    "ngram_propose": {"ngram_propose_kernel": "always: a program for each row"},
}
for _name in ("clamped_experts", "gelu_experts", "offloaded_experts"):
    CHOSEN[_name] = CHOSEN["experts"]
_CUDA_PACKED = (
    "bf16 on NVIDIA GPUs from sm_80 on, with codes that are integers, fp8 or e2m1 "
    "(`packed_linear.takes`)"
)
_PACKED_ROWS = {
    "packed_wgmma.cu": (
        f"bf16 on sm_90 with codes that are integers, {packed_wgmma.MIN_ROWS} to "
        f"{packed_wgmma.MAX_ROWS} rows: where it is the fastest (`packed_wgmma.TILES`)"
    ),
    "packed_stream.cu": (
        f"bf16 on sm_90 and sm_100: up to {packed_stream.MOST_ROWS} rows, or "
        f"{packed_stream.MAX_ROWS} of large weights, that fit the shared memory "
        "(`packed_stream.takes`)"
    ),
    "packed_linear.cu": f"else up to {packed_tiles.MAX_ROWS} rows: {_CUDA_PACKED}",
    "packed_gemv_kernel": (
        "else one row; without matrix units up to "
        f"{packed_linear.MAX_ROWS_ONE_BY_ONE} rows one by one"
    ),
    "packed_gemm_kernel": f"else 2 to {packed_tiles.MAX_ROWS} rows",
    "quantize_kernel": (
        f"sm_90, bf16 and weights in fp8: more rows than {packed_linear.MAX_FP8_ROWS}; cuBLAS "
        "multiplies"
    ),
    "dequantize_kernel": "more rows: the weight's real values, a part at a time, for cuBLAS",
    "rms_norm_kernel": "the norm before more rows than one",
    "silu_mul_kernel": "SiLU·up after cuBLAS",
}
_PACKED_FEW = f"one token, or at most {packed_tiles.PAIRS_PER_EXPERT:g} pairs per expert"
_PACKED_SORTED = f"sorted pairs, if there are at most {packed_groups.MOST_PAIRS} per expert"
_PACKED_GROUPS = {
    "packed_linear.cu": (
        f"{_PACKED_FEW}, without expert parallelism, and {_PACKED_SORTED}: {_CUDA_PACKED}"
    ),
    "packed_gemv_kernel": f"else {_PACKED_FEW}",
    "sort_pairs_kernel": "more pairs",
    "packed_wgmma.cu": "else sorted pairs: bf16 on sm_90, with codes that are integers or e2m1",
    "gather_kernel": "the rows of tokens before it, in the order of their sorted pairs",
    "packed_grouped_kernel": "else more pairs",
}
for _name in ("packed_linear", "fp8_linear", "fused_packed_linear", "fused_fp8_linear"):
    CHOSEN[_name] = _PACKED_ROWS
for _name in ("packed_expert_linear", "fp8_expert_linear"):
    CHOSEN[_name] = _PACKED_GROUPS
for _name in ("packed_experts", "fp8_experts", "packed_clamped_experts"):
    CHOSEN[_name] = {
        "packed_stream.cu": (
            "one token on sm_90 and sm_100, as for products, without biases and expert parallelism"
        ),
        **_PACKED_GROUPS,
        "packed_linear.cu": f"else {_PACKED_GROUPS['packed_linear.cu']}",
        "combine_kernel": "more pairs",
    }


HEAD = """
`python -m tests.kernels.kernel_index` writes this page from the registrations, and a test compares
the two.

A file of `schemas/` defines an op: its schema, and its reference in plain torch (`reference/`). Ops
are imported from `ops.py`. A platform registers kernels for torch's dispatch key of its device.
torch calls the registered kernel, or the reference if there is none. In compiled graphs the pass
`replace_ops` keeps the ops that the platform names. Any other becomes plain torch, which the
lowering fuses with its neighbours.
"""
TABLE_HEAD = """
A kernel with (eager) runs outside compiled graphs only. An empty cell is plain torch; `linear` on a
GPU is thus cuBLAS. MPS registers no kernel: all its cells are empty. On a CPU `linear` stays in
graphs where `cpu.linear.prefers_own_linear` holds, or if it has a residual. On an NPU a cell names
the graphs: of GE, or captured by npugraph_ex. The last column is the pass that puts the op into
graphs. The last four ops stand for the code of other packages, on every device.
"""
TRITON_HEAD = """
For sm_75 and newer, and for ROCm. The functions of the table above choose between these kernels.
What they do not take (another dtype or layout) goes to the reference. Tiles depend on shared memory
and, in `gated_gemm.py`, on the number of multiprocessors. Launches are programmatically dependent
from sm_90 on.
"""


def all_ops() -> list[str]:
    """The names of all ops, by subject and in the order of their definitions."""
    rooms = sorted(path.stem for path in (FOLDER / "schemas").glob("*.py"))
    modules = (importlib.import_module(f"{ROOT}schemas.{room}") for room in rooms)
    found = [value for module in modules for value in vars(module).values()]
    found += ops.ATTENTION.values()
    return list(dict.fromkeys(name for one in found if (name := ops.op_name(one)) is not None))


# Modules that launch the kernel of another one's source.
SOURCES = {"packed_groups": "packed_linear", "wgmma_groups": "packed_wgmma"}


def launched(kernel: Callable[..., Any]) -> dict[str, str]:
    """{kernel: its module} of the kernels that a registered function can launch: those of Triton,
    and files in CUDA C++."""
    found: dict[str, str] = {}
    waiting, seen = [kernel], {kernel}
    while waiting:
        for value in _used(waiting.pop()):
            if isinstance(value, KernelInterface):
                function: Any = value.fn
                if function.__name__.endswith("_kernel"):
                    found[function.__name__] = function.__module__
            elif _is_of_cuda(value):
                own = value.__module__.rpartition(".")[2]
                found.setdefault(f"{SOURCES.get(own, own)}.cu", value.__module__)
            elif isinstance(value, types.FunctionType) and value not in seen:
                seen.add(value)
                waiting.append(value)
    return found


def _is_of_cuda(value: Any) -> bool:
    """True for a function that launches a kernel in CUDA C++."""
    return (
        isinstance(value, types.FunctionType)
        and value.__module__.startswith(f"{ROOT}cuda.")
        and "launch(" in inspect.getsource(value)
    )


def _used(function: Any) -> Iterator[Any]:
    """What a function of ours names: functions and kernels of `kernels/triton/`."""
    function = inspect.unwrap(function)
    if not function.__module__.startswith(f"{ROOT}triton"):
        return
    names = function.__globals__
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Name):
            value = names.get(node.id)
            yield from value.values() if isinstance(value, dict) else (value,)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, types.ModuleType) and module.__name__.startswith(ROOT):
                yield vars(module).get(node.attr)


def all_launched() -> set[str]:
    """Every kernel that a function of `kernels/triton/` launches."""
    found = {name for kernel in TRITON.values() for name in launched(kernel)}
    return {name for name in found if name.endswith("_kernel")}


def defined() -> set[str]:
    """Every kernel that a file of `kernels/triton/` defines."""
    found = set()
    for path in (FOLDER / "triton").glob("*.py"):
        module = importlib.import_module(f"{ROOT}triton.{path.stem}")
        kernels = (one for one in vars(module).values() if isinstance(one, KernelInterface))
        found |= {one.fn.__name__ for one in kernels if one.fn.__name__.endswith("_kernel")}
    return found


def _shown(function: Any) -> str:
    return f"`{function.__module__.rpartition('.')[2]}.{function.__name__}`"


def _meaning(name: str) -> str:
    key = name.removeprefix("paged_attention_")
    if name in ops.ASKED_FOR:
        function = ops.OTHERS[key]
        function = getattr(function, "func", function)
    else:
        places = (collectives, reference.offload)
        function = next(
            (vars(place)[name] for place in places if name in vars(place)), None
        ) or reference.meaning(name)
    return f"`{function.__module__.removeprefix(ROOT).replace('.', '/')}.py`"


def _cell(name: str, kernels: Kernels, kept: frozenset[str] | set[str]) -> str:
    if name not in kernels:
        return ""
    return _shown(kernels[name]) + ("" if name in kept else " (eager)")


def _npu_cell(name: str) -> str:
    if name in ops.ASKED_FOR:
        return ""
    tables = {
        "eager": npu_kernels.EAGER,
        "GE": npu_kernels.IN_GRAPH,
        "captured": npu_kernels.IN_CAPTURE,
    }
    found: dict[str, list[str]] = {}
    for mode, table in tables.items():
        function: Any = table.get(name)
        if isinstance(function, types.FunctionType):
            found.setdefault(_shown(function), []).append(mode)
    if list(found.values()) == [list(tables)]:
        return next(iter(found))
    return ", ".join(f"{shown} ({', '.join(modes)})" for shown, modes in found.items())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _op_rows() -> Iterator[str]:
    for name in all_ops():
        yield _row(
            f"`{name}`",
            _meaning(name),
            _cell(name, TRITON, KEPT["cuda"]),
            _cell(name, CPU, KEPT["cpu"]),
            _npu_cell(name),
            f"`{PASSES[name]}`" if name in PASSES else "",
        )


def _kernel_rows() -> Iterator[str]:
    for name in (one for one in all_ops() if one in TRITON):
        modules = launched(TRITON[name])
        if not CHOSEN[name]:
            yield _row(f"`{name}`", "cuBLAS", "", "always")
        for kernel, when in CHOSEN[name].items():
            file = modules[kernel].removeprefix(f"{ROOT}triton.")
            yield _row(f"`{name}`", f"`{kernel}`", f"`{file}.py`", when)


def _summary(path: Path) -> str:
    """The first sentence that a file says of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = (line for line in text.splitlines() if line.startswith("//"))
        text = " ".join(line.lstrip("/ ") for line in lines)
    first = " ".join(text.split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".") + "."


def _file_rows() -> Iterator[str]:
    paths = (path for path in FOLDER.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        yield _row(f"`{path.relative_to(FOLDER).as_posix()}`", _summary(path))


def page() -> str:
    """The content of kernels/README.md."""
    return "\n".join(
        [
            "# Kernels",
            HEAD,
            "## Ops",
            TABLE_HEAD,
            _row("op", "reference", "CUDA, ROCm", "CPU", "NPU", "pass"),
            "|---|---|---|---|---|---|",
            *_op_rows(),
            "",
            "## Triton kernels",
            TRITON_HEAD,
            _row("op", "kernel", "file in `triton/`", "chosen when"),
            "|---|---|---|---|",
            *_kernel_rows(),
            "",
            "## Files",
            "",
            _row("file", "content"),
            "|---|---|",
            *_file_rows(),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
