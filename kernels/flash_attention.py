"""Paged attention by the optional flash-attn packages, which are imported late.

Interfaces (https://github.com/Dao-AILab/flash-attention). An engine takes the first of its GPU's
`_generations` that is installed and supports the model:

- 3: module `flash_attn_interface` (built from the folder hopper/) or `fa3_fwd_interface` (package
  fa3-fwd, a wheel), for Hopper. Pages may have any size, unless the build leaves that out.
- 2: package `flash_attn` 2.5 and later with `block_table`, for Ampere and newer and for ROCm. Page
  sizes are multiples of 256 tokens.
- 4: module `flash_attn.cute` (package flash-attn-4), for Hopper, where it comes last because its
  decode is slow, and for Blackwell: see `flash_attention_v4`.
- 1: package `flash_attn` 1.x, for Turing: see `flash_attention_v1`.

Interfaces 2, 3 and 4 align the causal mask to the last query and the last key, as
`reference.attention.paged_attention` does. They give a window as (keys to the left, keys to the
right) of the query's own key. docs/gpus.md lists the versions that have run.

Shapes as in `reference`; G = N / K query heads per key-value head.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import flash_attention_v1, flash_attention_v4

INSTALL = {
    1: "pip install 'flash-attn<2' --no-build-isolation",
    2: "pip install flash-attn --no-build-isolation",
    3: "pip install fa3-fwd",
    4: "pip install --pre flash-attn-4",
}
MAX_HEAD_DIM = {1: 128, 2: 256, 3: 256}  # and multiples of 8
DTYPES = (torch.float16, torch.bfloat16)
PAGE_TOKENS = {1: 1, 2: 256, 3: 1, 4: 1}  # a cache block must be a multiple
# Interface 3 built without pages still reads pages that hold whole key tiles. Tokens of such a tile
# by head size, and the most rows (queries · G) of a query tile (hopper/tile_size.h).
KEY_TILE = {64: 128, 96: 144, 128: 128, 192: 112, 256: 80}
QUERY_TILE = 192


class Flash(NamedTuple):
    """An installed interface that the device runs.

    generation: the interface, 1 to 4. lacks: the parts that its build leaves out, by the names of
    the build's flags: FP16, LOCAL (windows), PAGEDKV (pages of any size).
    """

    generation: int
    package: str
    version: str
    module: Any
    lacks: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.package} {self.version}"


class Missing(NamedTuple):
    """Why an interface is not found, and the command that installs one ("" if none would run)."""

    why: str
    install: str


class _PackageSource(NamedTuple):
    """Where an interface comes from, and a function and an argument of it that we use."""

    module: str
    package: str
    function: str
    argument: str
    config: str = ""  # a module that has its build flags


SOURCES = {
    1: (
        _PackageSource(
            "flash_attn.flash_attn_interface",
            "flash-attn",
            "flash_attn_unpadded_func",
            "cu_seqlens_q",
        ),
    ),
    2: (_PackageSource("flash_attn", "flash-attn", "flash_attn_with_kvcache", "block_table"),),
    3: (
        _PackageSource(
            "flash_attn_interface",
            "flash-attn-3",
            "flash_attn_with_kvcache",
            "page_table",
            "flash_attn_config",
        ),
        _PackageSource(
            "fa3_fwd_interface",
            "fa3-fwd",
            "flash_attn_with_kvcache",
            "page_table",
            "fa3_fwd_config",
        ),
    ),
    4: (_PackageSource("flash_attn.cute", "flash-attn-4", "flash_attn_varlen_func", "page_table"),),
}


def find(
    capability: tuple[int, int], *, is_nvidia: bool = True
) -> tuple[tuple[Flash, ...], tuple[Missing, ...]]:
    """The interfaces for a GPU of this compute capability: installed ones, and missing ones."""
    wanted = _generations(capability, is_nvidia)
    if not wanted:
        major, minor = capability
        why = f"flash-attn needs compute capability 7.5 and this GPU has {major}.{minor}"
        return (), (Missing(why, ""),)
    found = [installed(generation) for generation in wanted]
    return (
        tuple(one for one in found if isinstance(one, Flash)),
        tuple(one for one in found if isinstance(one, Missing)),
    )


def _generations(capability: tuple[int, int], is_nvidia: bool) -> tuple[int, ...]:
    """The generations that a GPU can run, the preferred one first."""
    if not is_nvidia:
        return (2,)
    if capability < (8, 0):
        return (1,) if capability >= (7, 5) else ()
    by_major = {9: (3, 2, 4), 10: (4, 2), 11: (4, 2)}
    return by_major.get(capability[0], (2,))


def installed(generation: int) -> Flash | Missing:
    """An interface, whatever the GPU is."""
    reasons = []
    for source in SOURCES[generation]:
        found = _import(generation, source)
        if isinstance(found, Flash):
            return found
        reasons.append(found)
    return Missing("; ".join(reasons), INSTALL[generation])


def _import(generation: int, source: _PackageSource) -> Flash | str:
    """The interface, or the reason why not, as a string.

    The module may be absent, broken, or lack the function or the argument that we use.
    """
    package = source.package
    try:
        module = importlib.import_module(source.module)
    except (ImportError, OSError) as error:  # OSError: torch cannot load its library
        parents = [source.module[: at.start()] for at in re.finditer(r"\.|$", source.module)]
        missing = isinstance(error, ModuleNotFoundError) and error.name in parents
        return (
            f"{package} is not installed" if missing else f"{package} cannot be imported ({error})"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if getattr(module, "__path__", None) and getattr(module, "__file__", None) is None:
            return f"{package} is not installed"  # the folder of another package's submodule
        version = str(getattr(module, "__version__", "of unknown version"))
    function = getattr(module, source.function, None)
    if function is None or source.argument not in inspect.signature(function).parameters:
        return f"{package} {version} has no {source.function}(…, {source.argument})"
    lacks = _left_out(source.config) if source.config else frozenset()
    if "VARLEN" in lacks:
        return f"{package} {version} was built without VARLEN"
    return Flash(generation, package, version, module, lacks)


def _left_out(config: str) -> frozenset[str]:
    """The parts that a build of interface 3 leaves out, by the module that its setup.py writes."""
    try:
        flags = importlib.import_module(config).CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return frozenset()
    left_out = (
        re.fullmatch(r"FLASH_?ATTENTION_DISABLE_(\w+)", name)
        for name, is_set in flags.items()
        if is_set
    )
    return frozenset(match[1] for match in left_out if match)


def page_tokens(flash: Flash, head_dim: int) -> int:
    """The number of tokens that a cache block must be a multiple of."""
    if flash.generation == 3 and "PAGEDKV" in flash.lacks:
        return KEY_TILE[min(size for size in KEY_TILE if size >= head_dim)]
    return PAGE_TOKENS[flash.generation]


def fast_page_tokens(flash: Flash, head_dim: int) -> int:
    """The number of tokens of which the default cache block is a multiple."""
    if flash.generation == 4:
        return flash_attention_v4.fast_page(head_dim)
    return page_tokens(flash, head_dim)


def unsupported(
    flash: Flash,
    *,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    windows: Iterable[int],
    has_sinks: bool = False,
) -> str:
    """Why the interface cannot run a model, with value and limit; "" if it can.

    block_size: tokens of a cache block, 0 if it is chosen by `page_tokens`.
    """
    name, dtype_name = f"flash-attn {flash.generation}", str(dtype).removeprefix("torch.")
    if has_sinks and flash.generation != 4:
        return f"the model's attention has sinks, and {name} has none"
    if dtype not in DTYPES:
        return f"dtype is {dtype_name}, and {name} computes in float16 and bfloat16 only"
    if dtype is torch.float16 and "FP16" in flash.lacks:
        return f"dtype is float16, and {flash.name} was built without it"
    if sizes := _head_sizes_unless(flash.generation, head_dim):
        return f"head size is {head_dim}, and {name} takes {sizes}"
    page = page_tokens(flash, head_dim)
    if block_size % page:
        return f"kvcache_block_size is {block_size}, and {name} takes multiples of {page}" + (
            f" (heads of {head_dim}, {flash.name})" if flash.lacks else ""
        )
    window = max(windows, default=0)
    if window > 0 and flash.generation == 1:
        return f"a layer has a window of {window} tokens, and {name} has no windows"
    if window > 0 and "LOCAL" in flash.lacks:
        return f"a layer has a window of {window} tokens, and {flash.name} was built without them"
    return ""


def _head_sizes_unless(generation: int, head_dim: int) -> str:
    """The head sizes of an interface; "" if it takes this one."""
    if generation == 4:
        most, wide = flash_attention_v4.MOST_HEAD, flash_attention_v4.WIDE_HEAD
        takes = flash_attention_v4.takes_head(head_dim)
        return "" if takes else f"multiples of 8 up to {most}, and {wide}"
    limit = MAX_HEAD_DIM[generation]
    return f"multiples of 8 up to {limit}" if head_dim > limit or head_dim % 8 else ""


def is_static(generation: int) -> bool:
    """True if its steps can be captured: shapes are fixed and nothing is read on the host."""
    return generation > 1


@functools.cache
def _loaded(generation: int) -> Flash:
    found = installed(generation)
    if isinstance(found, Missing):
        raise RuntimeError(f"flash-attn cannot run: {found.why}; {found.install}")
    return found


def paged_attention(
    generation: int,
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: None = None,
    v_scale_K: None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`reference.attention.paged_attention` for fp16 and bf16. Check `unsupported` first.

    Unlike the reference, slots of a row's own blocks past its end must be finite, and with
    interface 4 rows of several queries must have keys.
    """
    flash = _loaded(generation)
    q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
    caches = (k_cache_CBKH, v_cache_CBKH)
    if generation == 1:
        return flash_attention_v1.paged_attention(
            flash.module, q_TNH, *caches, block_table_RP, seq_len_R, q_start_S, max_q_len, scale
        )
    # our windows count the query's own key, flash-attn's do not
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (window - 1, 0) if window > 0 else (-1, -1),
    }
    rows = (block_table_RP, seq_len_R, q_start_S, max_q_len)
    if generation == 4:
        options["learnable_sink"] = sinks_N
        out_TNH = flash_attention_v4.paged_attention(flash.module, q_TNH, caches, *rows, options)
    else:
        attend = _attend_3 if generation == 3 else _attend_2
        out_TNH = attend(flash, q_TNH, caches, rows, options)
    if max_q_len > 1:
        # flash-attn does not write tokens that belong to no row
        torch.ops.nanovllm.zero_padding_(out_TNH, q_start_S)
    return out_TNH


Rows = tuple[Tensor, Tensor, Tensor, int]  # block table, lengths, starts, most queries of a row


def _attend_2(
    flash: Flash, q_TNH: Tensor, caches: tuple[Tensor, Tensor], rows: Rows, options: dict[str, Any]
) -> Tensor:
    block_table_RP, seq_len_R, q_start_S, max_q_len = rows
    options["block_table"] = block_table_RP
    module: ModuleType = flash.module
    if max_q_len == 1:
        out: Tensor = module.flash_attn_with_kvcache(
            q_TNH.unsqueeze(1), *caches, cache_seqlens=seq_len_R, **options
        )
        return out.squeeze(1)
    k_start_S = torch.nn.functional.pad(seq_len_R.cumsum(0, dtype=torch.int32), (1, 0))
    max_len = block_table_RP.shape[1] * caches[0].shape[1]
    out = module.flash_attn_varlen_func(
        q_TNH, *caches, q_start_S, k_start_S, max_q_len, max_len, **options
    )
    return out


def _attend_3(
    flash: Flash, q_TNH: Tensor, caches: tuple[Tensor, Tensor], rows: Rows, options: dict[str, Any]
) -> Tensor:
    block_table_RP, seq_len_R, q_start_S, max_q_len = rows
    options |= {"page_table": block_table_RP, "cache_seqlens": seq_len_R}
    attend = flash.module.flash_attn_with_kvcache
    if "PAGEDKV" in flash.lacks:
        # A build without other pages reads pages that hold whole key tiles, if rows may have more
        # queries than a query tile. `max_seqlen_q` is a bound: it may be larger than any row's.
        group = q_TNH.shape[1] // caches[0].shape[2]
        if max_q_len == 1:
            q_start_S = _counted(q_TNH.shape[0] + 1, q_TNH.device)
        max_q_len = max(max_q_len, QUERY_TILE // group + 1)
    elif max_q_len == 1:
        out: Tensor = attend(q_TNH.unsqueeze(1), *caches, **options)
        return out.squeeze(1)
    out = attend(q_TNH, *caches, cu_seqlens_q=q_start_S, max_seqlen_q=max_q_len, **options)
    return out


@functools.cache
def _counted(num: int, device: torch.device) -> Tensor:
    """0, 1, … num − 1 in int32. Captured steps keep its address, so it is made once."""
    return torch.arange(num, dtype=torch.int32, device=device)
