"""Times sums, gathers and sampling over the GPUs of one host, in captured graphs.

The times are compared with the link's limit.

python scripts/bench/collectives.py --ranks 2

First every form is checked for correct results with the same bits on all ranks. Then every line of
JSON is one form and size: microseconds of a call on the slowest rank, and the least time in which
the link could move the bytes that a rank receives in any form: 2 (N - 1) / N of a tensor for a sum.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanovllm.kernels import collectives, reference
from nanovllm.kernels import peers as layout
from nanovllm.kernels.triton import all_reduce as kernels
from nanovllm.kernels.triton.norm_act import add_rms_norm
from nanovllm.kernels.triton.sample import sample
from nanovllm.kernels.triton.sample_columns import sample_columns
from nanovllm.parallel.group import Group
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.tools import command_line

CALLS, REPLAYS = 50, 20
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
GATHER_ROWS = (1, 4, 16, 32, 64)
DTYPE, EPS = torch.bfloat16, 1e-6

Form = tuple[str, Callable[[], object]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of summed tensors")
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--link", type=float, default=450.0, help="GB/s that a GPU can receive")
    parser.add_argument("--rank", type=int, help="set for the processes that this starts")
    parser.add_argument("--folder", type=Path, help="likewise: the ranks' rendezvous")
    return parser.parse_args()


def start(args: argparse.Namespace) -> int:
    """Run a process for each rank; the exit code of the first that fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(rank) for rank in range(args.ranks)]
    if len(devices) < args.ranks:
        raise ValueError(f"--ranks is {args.ranks}, but {len(devices)} GPU(s) are visible")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--rank", str(rank), "--folder", folder],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": devices[rank]},
            )
            for rank in range(args.ranks)
        ]
        try:
            while all(process.poll() is None for process in processes):
                time.sleep(0.1)
            for process in processes:  # one has ended; the others end soon unless it failed
                process.wait(20)
        except subprocess.TimeoutExpired:
            print("a rank has failed or hangs", file=sys.stderr)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return max(abs(process.returncode) for process in processes)


class Bench:
    """One rank's measurements."""

    def __init__(self, args: argparse.Namespace) -> None:
        platform = CudaPlatform()
        platform.prepare()
        self.args, self.rank, self.device = args, args.rank, platform.device
        self.group = Group(
            args.rank,
            args.ranks,
            platform.device,
            args.folder,
            connect_peers=platform.connect_peers,
        )
        if self.group.peers is None:
            raise RuntimeError("these GPUs share no memory")
        self.peers = self.group.peers

    def run(self) -> None:
        with collectives.using(self.group), torch.no_grad():
            for num_rows in self.args.rows:
                self._sums(num_rows)
            for num_rows in GATHER_ROWS:
                self._gathers(num_rows)
        self.group.close()

    def _sums(self, num_rows: int) -> None:
        shape = (num_rows, self.args.hidden)
        torch.manual_seed(self.rank)
        x = torch.randn(shape, device=self.device).to(DTYPE)
        torch.manual_seed(99)
        residual = torch.randn(shape, device=self.device).to(DTYPE)
        weight = torch.rand(self.args.hidden, device=self.device).to(DTYPE)
        self._check_sums(x, residual, weight)
        share = 2 * (self.args.ranks - 1) / self.args.ranks
        for name, call in self._forms(x.zero_(), residual, weight):
            self._report(name, num_rows, x.nbytes, share, call)

    def _tiles(self, x: Tensor) -> Iterator[tuple[str, kernels.Tile]]:
        one = kernels.one_shot_tile(x.nbytes, x.element_size())
        two = kernels.two_shot_tile(x.nbytes, x.element_size(), self.args.ranks)
        if one is not None:
            yield "one-shot", one
        if two is not None:
            yield "two-shot", two

    def _forms(self, x: Tensor, residual: Tensor, weight: Tensor) -> Iterator[Form]:
        yield "nccl", lambda: self.group.all_reduce(x)
        for name, tile in self._tiles(x):
            yield name, partial(kernels.reduce_by, tile, x, None, x, self.peers)
        yield "chosen", lambda: kernels.all_reduce_(x)

        def nccl_and_norm() -> None:
            self.group.all_reduce(x)
            add_rms_norm(x, residual, weight, EPS)

        yield "nccl, then norm", nccl_and_norm
        yield "norm alone", lambda: add_rms_norm(x, residual, weight, EPS)
        if self._fits_norm(x):
            yield "fused", lambda: kernels.norm_by(x, residual, weight, EPS, self.peers)

    def _fits_norm(self, x: Tensor) -> bool:
        row_bytes = (1 << (x.shape[1] - 1).bit_length()) * x.element_size()
        return x.shape[0] <= layout.MAX_PROGRAMS and row_bytes <= layout.SLAB_BYTES

    def _check_sums(self, x: Tensor, residual: Tensor, weight: Tensor) -> None:
        if x.nbytes > layout.MAX_PROGRAMS * layout.SLAB_BYTES:
            return
        ranks = self.group.all_gather(x).float()
        total = ranks[0]
        for other in ranks[1:]:
            total = total + other
        wanted = total.to(DTYPE)
        for name, tile in self._tiles(x):
            for _ in range(5):  # both halves of the slabs, several times
                out = kernels.reduce_by(tile, x, residual, torch.empty_like(x), self.peers)
                self._expect(name, out, wanted + residual)
        if self._fits_norm(x):
            normed, added = kernels.norm_by(x, residual, weight, EPS, self.peers)
            self._expect("fused, sum", added, wanted + residual)
            right, _ = reference.norm_act.add_rms_norm(wanted, residual, weight, EPS)
            torch.testing.assert_close(normed, right, rtol=0.02, atol=0.02)
            self._expect("fused, norm", normed, normed)

    def _expect(self, name: str, actual: Tensor, wanted: Tensor) -> None:
        if not torch.equal(actual, wanted):
            raise AssertionError(f"{name} of {tuple(actual.shape)} is wrong on rank {self.rank}")
        if not bool((self.group.all_gather(actual) == actual).all()):
            raise AssertionError(f"{name} of {tuple(actual.shape)} differs between ranks")

    def _gathers(self, num_rows: int) -> None:
        vocab, ranks = self.args.vocab, self.args.ranks
        x = torch.randn(num_rows, -(-vocab // ranks), device=self.device).to(DTYPE)
        wanted = collectives.gather_columns(x, vocab)
        self._expect("gather", kernels.gather_columns(x, vocab), wanted)
        share = float(ranks - 1)
        for name, function in (
            ("gather, nccl", collectives.gather_columns),
            ("gather, chosen", kernels.gather_columns),
        ):
            self._report(name, num_rows, x.nbytes, share, partial(function, x, vocab))
        self._samples(x)

    def _samples(self, x: Tensor) -> None:
        """Greedy rows and drawn ones in turn, from whole logits and from each rank's columns."""
        num_rows, vocab = len(x), self.args.vocab
        row_R = torch.arange(num_rows, device=self.device)
        given = (row_R % 2).float(), row_R + 7, row_R
        whole = sample(kernels.gather_columns(x, vocab), *given)
        for _ in range(5):  # both halves of the words, several times
            self._expect("sample", sample_columns(x, *given, vocab), whole)
        forms: tuple[Form, ...] = (
            ("sample, gathered", lambda: sample(kernels.gather_columns(x, vocab), *given)),
            ("sample, columns", lambda: sample_columns(x, *given, vocab)),
        )
        for name, call in forms:
            self._report(name, num_rows, 8 * num_rows, float(self.args.ranks - 1), call)

    def _report(
        self, name: str, num_rows: int, num_bytes: int, share: float, call: Callable[[], object]
    ) -> None:
        taken_us = self._time(call)
        if self.rank == 0:
            limit_us = share * num_bytes / self.args.link / 1e3
            line = {"form": name, "ranks": self.args.ranks, "rows": num_rows}
            line |= {
                "mb": num_bytes / 1e6,
                "us": round(taken_us, 2),
                "limit_us": round(limit_us, 2),
            }
            print(json.dumps(line), flush=True)

    def _time(self, call: Callable[[], object]) -> float:
        """Microseconds of a call on the slowest rank. All ranks make the same number of calls."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            call()
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(CALLS):
                call()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        times = []
        for _ in range(REPLAYS):
            self.group.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        taken_ns = int(statistics.median(times) * 1e6 / CALLS)
        return -self.group.min_int(-taken_ns) / 1e3


def main() -> int:
    args = arguments()
    if args.rank is None:
        return start(args)
    Bench(args).run()
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
