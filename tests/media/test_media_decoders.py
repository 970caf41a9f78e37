"""Processes that decode: what ends them, what they may use, and that one prompt harms no other."""

from __future__ import annotations

import base64
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovllm import env
from nanovllm.media import decoder, decoders, mm_inputs, pictures
from nanovllm.media.decoders import Decoder
from nanovllm.media.fair_pool import FairPool
from nanovllm.media.memory import Memory
from nanovllm.media.options import MediaOptions
from nanovllm.media.prepare import MediaPreparation, Preparer
from nanovllm.programs import DoesNotStart
from tests.media.test_media_clips import video_file
from tests.media.vision_cases import Case, picture

HANGS = "print('{}', flush=True); import time; time.sleep(600)"
DIES = "import os; os.kill(os.getpid(), 9)"  # before it says that it is ready
CRASHES = "import os; print('{}', flush=True); input(); os.abort()"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(picture(60, 40, seed))).decode()


def submit(preparer: Preparer, *seeds: int) -> MediaPreparation:
    return preparer.submit(mm_inputs.from_data({"image": list(map(data_url, seeds))}))


class Programs:
    """The programs of the first decoders; later ones run the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *first: str) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._waiting = list(first)
        self._real = decoders.start
        self._lock = threading.Lock()
        monkeypatch.setattr(decoders, "start", self)

    def __call__(self, shared: int) -> subprocess.Popen[bytes]:
        with self._lock:
            process = self._fake(self._waiting.pop(0)) if self._waiting else self._real(shared)
            self.processes.append(process)
            return process

    def _fake(self, program: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)

    def wait_for(self, num: int) -> None:
        until(lambda: len(self.processes) >= num)


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def part() -> Iterator[Any]:
    with Memory(1 << 30, 1).part(lambda: None) as found:
        yield found


@pytest.fixture
def one() -> Iterator[Decoder]:
    found = Decoder(MediaOptions())
    yield found
    found.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_process_decodes_as_a_thread_does(kind: str, one: Decoder, part: Any) -> None:
    for size in ((1, 1), (99, 19), (989, 64)):
        data = encoded(picture(*size), kind)
        assert np.array_equal(one.picture(data, part), pictures.decode(data, 1 << 24))


def test_a_picture_that_needs_more_memory_asks_for_it(one: Decoder) -> None:
    data = encoded(picture(99, 77))
    memory = Memory(10**6, 1)
    with memory.part(lambda: None) as part:
        assert np.array_equal(one.picture(data, part), pictures.decode(data, 1 << 24))
        assert memory.num_shared == 0, "it fits in the part of the worker"
    memory = Memory(1, 1)
    with memory.part(lambda: None) as part:
        assert np.array_equal(one.picture(data, part), pictures.decode(data, 1 << 24))
        assert memory.num_shared == part.num_bytes == 99 * 77 * 24
    assert memory.num_shared == 0


def test_a_late_decoder_ends_and_its_error_names_the_option(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(monkeypatch, HANGS)
    preparer = qwen3.preparer(decode_timeout_s=0.3, num_media_workers=1)
    with pytest.raises(ValueError, match=r"^image 1: it takes longer than 0\.3 s .*decode_timeout"):
        submit(preparer, 1).result(60)
    assert programs.processes[0].poll() == -signal.SIGKILL
    preparer.close()


def test_the_time_of_a_video_is_bounded(qwen3: Case) -> None:
    preparer = qwen3.preparer(decode_timeout_s=0.001)  # not enough to import PyAV
    url = f"data:video/mp4;base64,{base64.b64encode(video_file('mp4', 19)).decode()}"
    part = {"type": "video_url", "video_url": {"url": url}}
    with pytest.raises(ValueError, match=r"^video 1: it takes longer than 0\.001 s to decode"):
        preparer.submit(mm_inputs.from_messages([{"content": [part]}])[1]).result(60)
    preparer.close()


def test_a_process_goes_on_after_files_that_cannot_be_decoded(one: Decoder, part: Any) -> None:
    film, photo = video_file("mp4", 19), encoded(picture(99, 77), "JPEG")
    one.picture(photo, part)
    process = one._program.process
    with pytest.raises(ValueError, match="corrupt or truncated"):
        one.picture(photo[:-999], part)
    with one.clip(film, part) as clip, pytest.raises(ValueError, match="fewer frames"):
        list(clip.pick([0, 99]))
    with one.clip(film, part) as clip:  # whose frames are not read to the end
        assert next(clip.pick([3, 4])).shape == (48, 64, 3)
    assert one.picture(photo, part).shape == (77, 99, 3) and one._program.process is process


def test_a_crash_ends_one_prompt_and_the_process_is_replaced(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(monkeypatch, CRASHES)
    preparer = qwen3.preparer(num_media_workers=1)
    with pytest.raises(ValueError, match=r"^image 1: it ended the process that decodes it"):
        submit(preparer, 1).result(60)
    assert len(submit(preparer, 1).result(60)) == 1
    assert len(programs.processes) == 2 and programs.processes[1].poll() is None
    preparer.close()
    assert programs.processes[1].poll() is not None


def test_a_process_that_is_killed_while_it_starts_is_replaced(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(monkeypatch, DIES)
    preparer = qwen3.preparer(num_media_workers=1)
    assert len(submit(preparer, 1).result(60)) == 1
    assert len(programs.processes) == 2
    preparer.close()


def test_a_process_that_never_starts_is_no_fault_of_the_picture(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the next prompt starts it."""
    programs = Programs(monkeypatch, DIES, DIES)
    preparer = qwen3.preparer(num_media_workers=1)
    with pytest.raises(DoesNotStart, match=r"^image 1: the process that decodes it does not start"):
        submit(preparer, 1).result(60)
    assert len(programs.processes) == 2
    assert len(submit(preparer, 1).result(60)) == 1
    preparer.close()


def test_a_machine_without_memory_for_a_process_is_no_fault_of_the_picture(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(shared: int) -> subprocess.Popen[bytes]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", "/path/of/python")

    monkeypatch.setattr(decoders, "start", start)
    preparer = qwen3.preparer(num_media_workers=1)
    with pytest.raises(DoesNotStart, match=r"^image 1: .* does not start: Cannot allocate memory$"):
        submit(preparer, 1).result(60)
    preparer.close()


def test_cancelling_kills_the_decoder(qwen3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch, HANGS)
    preparer = qwen3.preparer(num_media_workers=1)
    work = submit(preparer, 1)
    programs.wait_for(1)
    work.cancel()
    with pytest.raises(CancelledError):
        work.result(60)
    assert programs.processes[0].wait(60) == -signal.SIGKILL
    assert len(submit(preparer, 1).result(60)) == 1
    preparer.close()


def test_closing_does_not_wait_for_a_decoder(qwen3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch, HANGS, HANGS)
    preparer = qwen3.preparer(num_media_workers=2)
    work = submit(preparer, 1, 2, 3)
    programs.wait_for(2)
    preparer.close()  # the option's limit is 30 s, and the programs sleep for 600 s
    assert all(one.returncode == -signal.SIGKILL for one in programs.processes)
    with pytest.raises(CancelledError):
        work.result(60)


def test_pictures_of_one_prompt_do_not_hold_up_another_one(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(monkeypatch, HANGS, HANGS)
    preparer = qwen3.preparer(num_media_workers=2)
    slow = submit(preparer, *range(19))
    programs.wait_for(2)
    assert len(submit(preparer, 20, 21).result(60)) == 2
    assert not slow.done() and len(programs.processes) == 3
    preparer.close()


def test_images_in_memory_start_no_process(qwen3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch)
    preparer = qwen3.preparer()
    images = [picture(60, 40), np.array(picture(60, 40))]
    preparer.submit(mm_inputs.from_data({"image": images})).result(60)
    preparer.close()
    assert programs.processes == []


def test_the_decoder_does_not_import_torch() -> None:
    code = "import sys; import nanovllm.media.decoder; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=env.for_children(), timeout=60)


def test_nothing_is_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: Decoder, part: Any
) -> None:
    for name in ("numpy", "json", "PIL", "nanovllm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert one.picture(encoded(picture(9, 9)), part).shape == (9, 9, 3)


def test_a_decoder_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os, time; from nanovllm.media import decoders\n"
        "print(decoders.start(os.memfd_create('a')).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=env.for_children(), text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state(pid))


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_decoder_has_limits_and_a_group_of_its_own(one: Decoder, part: Any) -> None:
    one.picture(encoded(picture(9, 9)), part)
    assert one._program.process is not None
    pid = one._program.process.pid
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    found = {line[:25].strip(): line[25:].split()[0] for line in limits}
    assert found["Max core file size"] == "0"
    most = int(found["Max address space"]) - part.num_bytes - decoder.LIBRARY_BYTES
    assert 0 < most < 4 << 30
    assert os.getpgid(pid) == pid != os.getpgid(0), "Ctrl-C of a terminal does not reach it"


def scans(num: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(picture(64, 48), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    missing = num - pictures.num_scans(data)
    return data[:at] + data[at:-2] * (missing + 1) + data[-2:]


def test_a_jpeg_with_many_scans_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pictures.decode(scans(pictures.MAX_SCANS), 1 << 20).shape == (48, 64, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    for num in (101, 1100):
        with pytest.raises(ValueError, match="the picture has more than 100 scans"):
            pictures.decode(scans(num), 1 << 20)


def test_scans_are_counted_up_to_the_end_of_the_picture_alone() -> None:
    """Phones put a film behind a photo, and a small picture into its header."""
    marks = b"\xff\xda\x00\x02" * 200
    data = encoded(picture(64, 48), "JPEG")
    header = b"\xff\xe1" + (len(marks) + 2).to_bytes(2, "big") + marks
    whole = data[:2] + header + data[2:] + marks
    assert pictures.num_scans(whole) == pictures.num_scans(data) == 1
    assert np.array_equal(pictures.decode(whole, 1 << 20), pictures.decode(data, 1 << 20))


def test_memory_is_bounded_and_large_files_wait_in_turn() -> None:
    memory = Memory(1000, 2)
    assert memory.worker_bytes == 250
    order: list[str] = []

    def work(name: str, num_bytes: int) -> None:
        with memory.part(lambda: None) as part:
            part.grow(num_bytes)
            order.append(name)

    with memory.part(lambda: None) as small, memory.part(lambda: None) as large:
        small.grow(250)  # its own
        large.grow(400)
        assert memory.num_shared == 400
        threads = []
        for name, num_bytes in (("huge", 9999), ("middle", 300)):
            threads.append(threading.Thread(target=work, args=(name, num_bytes)))
            threads[-1].start()
            until(lambda: len(memory._waiting) == len(threads))
        assert order == []
    for one in threads:
        one.join(60)
    assert order == ["huge", "middle"] and memory.num_shared == 0


def test_work_that_waits_for_memory_can_be_cancelled() -> None:
    memory = Memory(100, 1)

    def cancelled() -> None:
        raise CancelledError

    with memory.part(lambda: None) as first, memory.part(cancelled) as second:
        first.grow(90)
        with pytest.raises(CancelledError):
            second.grow(90)
    assert memory.num_shared == 0 and not memory._waiting


def test_groups_take_turns() -> None:
    pool = FairPool(1, "test")
    go = {name: threading.Event() for name in "xy"}
    held = [pool.submit(name, lambda event=event: event.wait(60))  # type: ignore[misc]
            for name, event in go.items()]  # fmt: skip
    until(lambda: all(one.running() for one in held))
    order: list[str] = []
    calls = [pool.submit(name, lambda text=f"{name}{i}": order.append(text))  # type: ignore[misc]
             for name in "abc" for i in range(3)]  # fmt: skip
    assert pool.submit("a", lambda: 1).cancel()
    go["x"].set()  # one thread is free
    for call in calls:
        call.result(60)
    go["y"].set()
    pool.close()
    assert order == [f"{name}{i}" for i in range(3) for name in "abc"]
    with pytest.raises(RuntimeError):
        pool.submit("a", lambda: 1)


def test_a_group_has_at_most_its_number_of_threads() -> None:
    pool = FairPool(2, "test")
    go = threading.Event()
    calls = [pool.submit("a", lambda: go.wait(60)) for _ in range(9)]
    until(lambda: sum(one.running() for one in calls) == 2)
    assert pool.submit("b", lambda: 7).result(60) == 7
    assert sum(one.running() for one in calls) == 2
    go.set()
    assert all(one.result(60) for one in calls)
    pool.close()
