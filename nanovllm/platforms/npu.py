"""Ascend NPU through torch_npu: a whole step is one graph, which torchair lowers to Ascend IR for GE, or captures."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm.compile.lower import eager, torchair
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.merge_equal import merge_equal
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels import ops
from nanovllm.kernels.npu import kernels as npu_kernels
from nanovllm.platforms.accelerator import Accelerator
from nanovllm.platforms.base import Rehearsal, Replay

_torch: Any = torch  # torch.npu is there once torch_npu is imported

# What torch_npu links against; a machine without CANN has none of them.
CANN_LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
)

# Every captured graph holds streams of the device, of which there are some two thousand. What a device bears has not been
# tried; torchair captures one graph for at most this many sizes by itself.
MAX_CAPTURED_SIZES = 64
MAX_ROWS = 65536  # the batch axis of fused_infer_attention_score


def load_torch_npu() -> None:
    """Import torch_npu; ValueError saying what is missing: the package, or CANN's libraries by name."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ValueError(
            "device 'npu' needs torch_npu, which is not installed: pip install torch_npu, in the version of torch "
            f"({torch.__version__.split('+')[0]}), and the CANN toolkit that goes with it (docs/npu.md)"
        )
    try:
        importlib.import_module("torch_npu")
        importlib.import_module("torch_npu.dynamo.torchair")  # makes `import torchair` work
        importlib.import_module("torchair")
    except (ImportError, OSError, RuntimeError) as error:
        missing = missing_libraries()
        if not missing:
            raise ValueError(f"device 'npu': torch_npu cannot be imported: {error}") from error
        raise ValueError(
            f"device 'npu' needs CANN, and these of its libraries are not found: {', '.join(missing)}. Install the CANN "
            "toolkit and the kernels for this chip, and run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` before "
            "Python (docs/npu.md)"
        ) from error


def device_count() -> int:
    return _torch.npu.device_count()


def missing_libraries() -> list[str]:
    """Those of CANN's libraries that the dynamic loader does not find."""
    missing = []
    for name in CANN_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            if f"{name}: cannot open" in str(error):
                missing.append(name)
    return missing


class NpuPlatform(Accelerator):
    name = "npu"
    default_cache_blocks: int | None = None
    quantizations: tuple[str, ...] = ()
    default_block_size = 128  # what paged attention is recommended to run with
    default_batched_tokens = 8192
    default_num_seqs = 256
    measures_scratch = True
    max_stall_ms = math.inf  # no prefill step has been timed on a device
    whole_steps = True
    # fused_infer_attention_score computes in these
    supported_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    supports_fp8_cache = False

    def __init__(
        self,
        index: int = 0,
        *,
        graph_mode: str = "ascend_ir",
        graph_options: Mapping[str, object] | None = None,
        graph_batch_sizes: Sequence[int] | None = None,
    ) -> None:
        """`load_torch_npu` has run. ValueError for options and buckets that the mode does not take."""
        check_buckets(graph_mode, graph_batch_sizes or ())
        self.device = torch.device("npu", index)
        self.captures = graph_mode == "aclgraph"
        if self.captures and graph_options:
            raise ValueError(
                f"npu_graph_options is {dict(graph_options)!r}: these are options of npu_graph_mode='ascend_ir', and the mode "
                "is 'aclgraph'"
            )
        self.settings = torchair.Settings(dict(graph_options or {}))
        torchair.compiler_config(self.settings)
        # A captured step's lengths are replaced in place, which must not overtake the step before.
        self.run_ahead = 0 if self.captures else 1
        self.wants_lengths = self.captures
        self._seq_lens: list[int] = []
        self._pool: Any = None

    @property
    def runtime(self) -> Any:
        return _torch.npu

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        if libraries is not None:
            self.settings = replace(self.settings, ge_cache=libraries.parent / "ge")
        _torch.npu.set_device(self.device)
        ops.register_kernels("PrivateUse1", npu_kernels.EAGER)

    def fingerprint(self) -> dict[str, str]:
        return {
            "device": str(_torch.npu.get_device_name(self.device)),
            "cann": torchair.cann_version(),
            "torch_npu": importlib.import_module("torch_npu").__version__,
            "graph options": str(sorted(self.settings.options.items())),
        }

    def compile_workers(self, bytes_each: int, bytes_own: int) -> int:
        return 0  # GE compiles in threads of its own

    def rehearsal(self) -> Rehearsal | None:
        return None

    def kernels_compiled(self) -> list[str]:
        return []

    def lowering(self) -> tuple[Lowering | None, str]:
        return eager.lower if self.captures else partial(torchair.lower, settings=self.settings), ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        table = npu_kernels.IN_CAPTURE if self.captures else npu_kernels.IN_GRAPH
        passes: list[tuple[str, Pass]] = [("fuse_add_norm", fuse_add_norm)] if fuse else []
        if not fuse:
            table = {
                name: function
                for name, function in table.items()
                if name in npu_kernels.NEVER_PLAIN
            }
        passes.append(("replace_ops", partial(replace_ops, table=table)))
        if self.captures:
            # what torchair takes is merged later, when it is functional and more of it can be (compile/lower/torchair.py)
            passes.append(("merge_equal", merge_equal))
        return tuple(passes)

    def announce(self, seq_lens: list[int]) -> None:
        self._seq_lens = seq_lens

    def capture(self, step: Callable[[], None]) -> Replay:
        if not self.captures:
            return step
        _torch.npu.synchronize(self.device)
        if self._pool is None:
            self._pool = _torch.npu.graph_pool_handle()
        graph = _torch.npu.NPUGraph()
        with _torch.npu.graph(
            graph, pool=self._pool, auto_dispatch_capture=True, capture_error_mode="thread_local"
        ):
            step()

        def replay() -> None:
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": self._seq_lens}])
            graph.replay()

        return replay

    def synchronize(self) -> None:
        # an engine that nobody closed is dropped as Python ends, when torch_npu is no longer whole
        if not sys.is_finalizing():
            _torch.npu.synchronize(self.device)

    def release(self) -> None:
        self._pool = None
        if not sys.is_finalizing():
            _torch.npu.empty_cache()


def check_buckets(graph_mode: str, sizes: Sequence[int]) -> None:
    """ValueError for decode buckets that cannot be graphs."""
    if sizes and max(sizes) > MAX_ROWS:
        raise ValueError(
            f"graph_batch_sizes holds {max(sizes)}: attention on an NPU takes at most {MAX_ROWS} rows in one step"
        )
    if graph_mode == "aclgraph" and len(set(sizes)) > MAX_CAPTURED_SIZES:
        raise ValueError(
            f"graph_batch_sizes holds {len(set(sizes))} sizes: npu_graph_mode='aclgraph' captures at most "
            f"{MAX_CAPTURED_SIZES} graphs"
        )
