"""The threads of CPU kernels (threads.h): every item once, on any threads, in forks; idle threads
sleep."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanovllm import env
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu import library as cpu_library
from nanovllm.kernels.cpu import linear as cpu_linear

LOOPS = build.ArgumentStruct(
    "Loops", pointers="", integers="num_loops max_items num_threads num_callers sleep_every seed"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("threads")
    source = Path(__file__).with_name("threads_under_test.cpp")
    for header in Path(build.__file__).parent.glob("*.h"):
        shutil.copy(header, folder)
    library = build.load(Path(shutil.copy(source, folder)), [LOOPS])
    library.nanovllm_loop.restype = ctypes.c_void_p
    cpu_library.lend_threads(library, library)
    library.nanovllm_pauses_loop.argtypes = (ctypes.c_int64,) * 5
    library.nanovllm_pauses_time_alone.argtypes = (ctypes.c_int64,)
    library.nanovllm_pauses_time_alone.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def wrong_items(compiled: ctypes.CDLL) -> Callable[..., int]:
    library = compiled
    library.nanovllm_wrong_items.argtypes = (ctypes.c_char_p,)
    library.nanovllm_wrong_items.restype = ctypes.c_int64
    return lambda *values: int(library.nanovllm_wrong_items(LOOPS.pack(*values)))


@pytest.mark.parametrize(
    "num_loops, max_items, num_threads, num_callers, sleep_every",
    [(20000, 3, 2, 1, 0), (5000, 99, 5, 3, 0), (60, 19, 4, 2, 7), (30, 989, 3, 1, 400)],
)
def test_every_item_runs_exactly_once(
    wrong_items: Callable[..., int],
    num_loops: int,
    max_items: int,
    num_threads: int,
    num_callers: int,
    sleep_every: int,
) -> None:
    arguments = num_loops, max_items, num_threads, num_callers, sleep_every
    assert all(wrong_items(*arguments, seed) == 0 for seed in range(3))


class Caller:
    """A caller of loops at times in microseconds, whose helpers pause by the rules of threads.h."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.now = library, 1_000_000
        library.nanovllm_pauses_begin()

    def loop(self, own: int, others: int, wait: int = 0) -> None:
        """Items of a microsecond: `own` run by the caller, `others` by a helper, then a wait."""
        self.now += own + wait
        self.library.nanovllm_pauses_loop(own * 1000, own, others, wait * 1000, self.now * 1000)

    @property
    def time_alone(self) -> float:
        """For how long the next loop runs without helpers."""
        return self.library.nanovllm_pauses_time_alone(self.now * 1000) / 1000

    def pause(self) -> int:
        """Microseconds until helpers are tried again."""
        begin = self.now
        while self.time_alone:
            self.now += 100
        return self.now - begin


def test_helpers_pause_after_they_held_up_the_caller(compiled: ctypes.CDLL) -> None:
    caller = Caller(compiled)
    caller.loop(50, 50, wait=900)  # less than a time slice
    assert caller.time_alone == 0
    caller.loop(50, 50, wait=4000)
    assert caller.time_alone == 4000, "a longer loop is worth the wait"
    assert caller.pause() == pytest.approx(16_000, abs=200), "four waits"


def test_pauses_grow_while_helpers_stay_late_and_end_within_a_second(compiled: ctypes.CDLL) -> None:
    caller, pauses = Caller(compiled), []
    for _ in range(9):
        caller.loop(50, 50, wait=4000)
        pauses.append(caller.pause())
    assert pauses[:3] == [pytest.approx(16_000 * 2**n, abs=200) for n in range(3)]
    assert max(pauses) == pytest.approx(1_000_000, abs=200)
    for _ in range(40):  # 50 µs of gain each
        caller.now += 100_000
        caller.loop(50, 50)
    caller.loop(50, 50, wait=4000)
    assert caller.pause() == pytest.approx(16_000, abs=200), "they helped for long"


def test_gains_of_helpers_pay_for_their_waits(compiled: ctypes.CDLL) -> None:
    caller = Caller(compiled)
    for _ in range(100):
        caller.loop(100, 100)
    caller.loop(100, 100, wait=9000)
    assert caller.time_alone == 0
    caller.loop(100, 100, wait=9000)
    assert caller.time_alone == 9000


def test_loops_longer_than_the_wait_keep_their_helpers(compiled: ctypes.CDLL) -> None:
    caller = Caller(compiled)
    for _ in range(20):
        caller.loop(6000, 0, wait=5000)
    assert caller.time_alone == 0


def test_a_forked_process_has_threads_of_its_own() -> None:
    x_TD, weight_OD = torch.randn(3, 512), torch.randn(999, 512)
    expected = cpu_linear.linear(x_TD, weight_OD, None)
    child = os.fork()
    if child == 0:
        is_equal = torch.equal(cpu_linear.linear(x_TD, weight_OD, None), expected)
        os._exit(0 if is_equal else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_without_work_sleep(wrong_items: Callable[..., int]) -> None:
    assert wrong_items(100, 99, 4, 1, 0, 0) == 0
    x_TD, weight_OD = torch.randn(3, 512), torch.randn(999, 512)
    cpu_linear.linear(x_TD, weight_OD, None)
    time.sleep(0.1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.25


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_openmp_is_told_to_sleep_unless_the_user_has_chosen(chosen: dict[str, str]) -> None:
    program = (
        "import os; from nanovllm import env; env.limit_spinning(); "
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    )
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    variables = {name: text for name, text in env.for_children().items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables | chosen, capture_output=True, text=True
    )
    spin_count = chosen.get("GOMP_SPINCOUNT", "10000")
    expected = "None None" if "OMP_WAIT_POLICY" in chosen else f"{spin_count} 1"
    assert done.stdout.strip() == expected
