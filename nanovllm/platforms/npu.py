"""Ascend NPU through torch_npu. A whole step is one graph, which GE compiles from Ascend IR (by
torchair), or which is captured, by the engine or by npugraph_ex.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm.compile.lower import eager, npugraph_ex, torchair
from nanovllm.compile.passes.fuse_add_norm import fuse_add_norm
from nanovllm.compile.passes.merge_equal import merge_equal
from nanovllm.compile.passes.replace_ops import replace_ops
from nanovllm.compile.program import Lowering, Pass
from nanovllm.kernels import ops
from nanovllm.kernels.npu import kernels as npu_kernels
from nanovllm.platforms.accelerator import Accelerator, visible_devices
from nanovllm.platforms.base import Replay, Traits

_torch: Any = torch  # importing torch_npu adds torch.npu

# Libraries of CANN that torch_npu links against.
CANN_LIBRARIES = (
    "libascendcl.so", "libhccl.so", "libge_runner.so", "libgraph.so", "libacl_op_compiler.so",
    "libacl_tdt_channel.so", "libfmk_parser.so", "libascend_protobuf.so",
)  # fmt: skip

# Modes in which the attention of a decode step takes lengths from the host.
CAPTURED_MODES = ("aclgraph", "npugraph_ex")
# torchair's limit. Every captured graph holds some of about 2000 streams; the limit of a real
# device has not been measured.
MAX_CAPTURED_SIZES = 64
MAX_ROWS = 65536  # the batch axis of fused_infer_attention_score
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


TRAITS = Traits(
    name="npu",
    # those of fused_infer_attention_score
    supported_dtypes=(torch.bfloat16, torch.float16),
    block_size=128,  # recommended for paged attention
    batched_tokens=8192,
    num_seqs=256,
    max_stall_ms=math.inf,  # no prefill step has been timed on a device
    # Few and far apart: GE compiles a graph of the whole step for every bucket.
    decode_rows=(16, 32, 48, 64, 96, 128, 160, 192, 224, 256),
    prefill_growth=4,
    graphs_have_sinks=False,
    whole_steps=True,
)


def problem(index: int) -> str | None:
    try:
        load_torch_npu()
    except ImportError as error:
        return str(error)
    num_devices = _torch.npu.device_count()
    return None if index < num_devices else f"torch_npu finds {num_devices} NPU(s)"


def create(index: int, options: Mapping[str, Any]) -> NpuPlatform:
    return NpuPlatform(
        index,
        graph_mode=options.get("npu_graph_mode") or "ascend_ir",
        graph_options=options.get("npu_graph_options"),
        graph_batch_sizes=options.get("graph_batch_sizes"),
    )


def load_torch_npu() -> None:
    """Import torch_npu. Raises ImportError, with the missing package or CANN libraries."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ImportError(
            "torch_npu is not installed: pip install torch_npu, in the version of torch "
            f"({torch.__version__.split('+')[0]}), and the matching CANN toolkit "
            "(docs/npu.md)"
        )
    try:
        with _keeping_signal_handlers():
            importlib.import_module("torch_npu")
            importlib.import_module("torch_npu.dynamo.torchair")  # makes `import torchair` work
            importlib.import_module("torchair")
    except (ImportError, OSError, RuntimeError) as error:
        missing = missing_libraries()
        if not missing:
            raise ImportError(f"torch_npu cannot be imported: {error}") from error
        raise ImportError(
            f"these libraries of CANN are not found: {', '.join(missing)}. Install the CANN "
            "toolkit and the kernels for this chip, and run "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` before Python (docs/npu.md)"
        ) from error


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Keeps the handlers of Ctrl-C and termination that Python or the program has set.

    torchair and npugraph_ex replace them when they are imported: Ctrl-C would then end the process
    instead of raising KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # nothing can replace them here
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if callable(handler):
                signal.signal(number, handler)


def missing_libraries() -> list[str]:
    """Names of the CANN libraries that the dynamic loader does not find."""
    missing = []
    for name in CANN_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            if f"{name}: cannot open" in str(error):
                missing.append(name)
    return missing


class NpuPlatform(Accelerator):
    def __init__(
        self,
        index: int = 0,
        *,
        graph_mode: str = "ascend_ir",
        graph_options: Mapping[str, object] | None = None,
        graph_batch_sizes: Sequence[int] | None = None,
    ) -> None:
        """Call `load_torch_npu` first. Raises ValueError for options the mode does not take."""
        check_buckets(graph_mode, graph_batch_sizes or ())
        options = dict(graph_options or {})
        if graph_mode == "aclgraph" and options:
            raise ValueError(
                f"npu_graph_options is {options!r}: these are options of npu_graph_mode="
                "'ascend_ir' and 'npugraph_ex', and the mode is 'aclgraph'"
            )
        self.graph_mode, self.captures = graph_mode, graph_mode in CAPTURED_MODES
        self.settings = torchair.TorchairOptions({} if self.captures else options)
        self.ex_settings = npugraph_ex.NpugraphOptions(options)
        if graph_mode == "ascend_ir":
            torchair.compiler_config(self.settings)
        elif graph_mode == "npugraph_ex":
            with _keeping_signal_handlers():
                npugraph_ex.check(self.ex_settings)
        # A captured step's lengths are replaced in place, so the previous step must have ended.
        run_ahead = 0 if self.captures else 1
        traits = replace(
            TRAITS,
            run_ahead=run_ahead,
            wants_lengths=self.captures,
            max_ranks=_torch.npu.device_count(),
        )
        super().__init__(torch.device("npu", index), traits)
        self.runtime = _torch.npu
        self._seq_lens: list[int] = []
        self._pool: Any = None

    def prepare(
        self, libraries: Path | None = None, cxx: str | None = None, may_compile: bool = True
    ) -> None:
        if libraries is not None:
            self.settings = replace(self.settings, ge_cache=libraries.parent / "ge")
        _torch.npu.set_device(self.device)
        ops.register_kernels("PrivateUse1", npu_kernels.EAGER)

    def rank_environment(self, rank: int, own: Mapping[str, str]) -> dict[str, str]:
        return self.part_environment(rank, 0, 1, own)

    def part_environment(
        self, part: int, num_parts: int, num_devices: int, own: Mapping[str, str]
    ) -> dict[str, str]:
        return {VISIBLE: visible_devices(part * num_devices, num_devices, own.get(VISIBLE))}

    def fingerprint(self) -> dict[str, str]:
        return {
            "device": str(_torch.npu.get_device_name(self.device)),
            "cann": torchair.cann_version(),
            "torch_npu": importlib.import_module("torch_npu").__version__,
            "graph mode": self.graph_mode,
            "graph options": str(sorted(self.ex_settings.options.items())),
        }

    def lowering(self) -> tuple[Lowering | None, str]:
        if self.graph_mode == "aclgraph":
            return eager.lower, ""
        if self.graph_mode == "ascend_ir":
            return partial(torchair.lower, settings=self.settings), ""
        lower = partial(
            npugraph_ex.lower,
            settings=self.ex_settings,
            pool=self._graph_pool,
            lengths=self._announced,
        )
        return lower, ""

    def passes(self, fuse: bool) -> tuple[tuple[str, Pass], ...]:
        table = npu_kernels.IN_CAPTURE if self.captures else npu_kernels.IN_GRAPH
        passes: list[tuple[str, Pass]] = [("fuse_add_norm", fuse_add_norm)] if fuse else []
        if not fuse:
            table = {name: table[name] for name in table if name in npu_kernels.NEVER_PLAIN}
        passes.append(("replace_ops", partial(replace_ops, table=table)))
        if self.graph_mode == "aclgraph":
            # in other modes compile/lower/aot.py merges: a functional graph has more equal ops
            passes.append(("merge_equal", merge_equal))
        return tuple(passes)

    def announce(self, seq_lens: list[int]) -> None:
        self._seq_lens = seq_lens

    def _announced(self, num_rows: int) -> list[int]:
        """The lengths for a step of npugraph_ex; without `announce` all rows are padding."""
        seq_lens, self._seq_lens = self._seq_lens or [1] * num_rows, []
        assert len(seq_lens) == num_rows, (seq_lens, num_rows)
        return seq_lens

    def _graph_pool(self) -> Any:
        if self._pool is None:
            self._pool = _torch.npu.graph_pool_handle()
        return self._pool

    def capture(self, step: Callable[[], None]) -> Replay:
        if self.graph_mode != "aclgraph":  # programs of npugraph_ex capture themselves
            return step
        _torch.npu.synchronize(self.device)
        graph = _torch.npu.NPUGraph()
        options = {"auto_dispatch_capture": True, "capture_error_mode": "thread_local"}
        with _torch.npu.graph(graph, pool=self._graph_pool(), **options):
            step()

        def replay() -> None:
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": self._seq_lens}])
            graph.replay()

        return replay

    def release(self) -> None:
        self._pool = None
        super().release()


def check_buckets(graph_mode: str, sizes: Sequence[int]) -> None:
    """Raise ValueError for decode buckets that cannot be graphs."""
    if sizes and max(sizes) > MAX_ROWS:
        raise ValueError(
            f"graph_batch_sizes holds {max(sizes)}: attention on an NPU takes at most {MAX_ROWS} "
            "rows in one step"
        )
    if graph_mode in CAPTURED_MODES and len(set(sizes)) > MAX_CAPTURED_SIZES:
        raise ValueError(
            f"graph_batch_sizes holds {len(set(sizes))} sizes: npu_graph_mode={graph_mode!r} "
            f"captures at most {MAX_CAPTURED_SIZES} graphs"
        )
