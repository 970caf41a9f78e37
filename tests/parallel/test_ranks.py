"""Ranks do what they are told, answer, and leave nothing behind."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.parallel.errors import RankFailed
from nanovllm.parallel.group import Group
from nanovllm.parallel.ranks import WorkerGroup
from nanovllm.parallel.serve import connect
from tests.parallel.started import MODULE, joined, listening, started

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("size", [2, 4])
def test_sums_gathers_and_minima_are_the_same_on_all_ranks(size: int, tmp_path: Path) -> None:
    with started(size, tmp_path) as ranks:
        group = joined(ranks)
        for num in (1, 19, 64, 989):
            for dtype in DTYPES:

                def own(num: int = num, dtype: str = dtype) -> list[object]:
                    x = torch.arange(num).to(getattr(torch, dtype))
                    gathered, least = group.all_gather(x), group.min_int(100)
                    return [group.all_reduce(x).tolist(), gathered.tolist(), least]

                mine, answers = ranks.call_all("sums", json.dumps([num, dtype]).encode(), own)
                parts = [
                    (torch.arange(num) + 10 * rank).to(getattr(torch, dtype))
                    for rank in range(size)
                ]
                assert mine[1] == [part.tolist() for part in parts]
                assert mine[2] == 100 - (size - 1)
                assert all(json.loads(answer) == mine for answer in answers)
                total = torch.stack(parts).double().sum(0)
                assert torch.allclose(torch.tensor(mine[0]).double(), total, rtol=2**-6)
        group.close()


def test_a_gathered_tensor_has_a_row_for_each_rank_and_keeps_its_shape(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        group = joined(ranks)
        x = torch.arange(19.0)[::2]  # not contiguous
        gathered, _ = ranks.call_all("gather_like", b"10", lambda: group.all_gather(x))
        assert gathered.shape == (2, 10)
        assert torch.equal(gathered[0], x) and torch.equal(gathered[1], torch.ones(10))


def test_ranks_listen_on_loopback_alone(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        before = listening(os.getpid())
        joined(ranks)
        mine, others = listening(os.getpid()) - before, listening(ranks.pids[0])
        assert others and mine | others <= {"0100007F"}  # 127.0.0.1


def test_ranks_know_their_setup_and_their_place(tmp_path: Path) -> None:
    setup = {"options": {"model": "ä", "max_num_seqs": 3, "list": [1, None, True]}}
    with started(4, tmp_path, **setup) as ranks:
        described = [json.loads(answer) for answer in ranks.call("describe")]
        expected = [[1 + i, 4, pid, setup] for i, pid in enumerate(ranks.pids)]
        assert described == expected


def test_the_folder_is_private_and_goes_with_the_ranks(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        joined(ranks)
        assert stat.S_IMODE(ranks.folder.stat().st_mode) == 0o700
        assert ranks.folder.parent == tmp_path


def test_a_setup_that_is_no_json_is_the_error_of_the_start(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        WorkerGroup.start({"folder": tmp_path}, 2, MODULE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_told_messages_arrive_in_order_and_before_questions(tmp_path: Path) -> None:
    with started(2, tmp_path) as ranks:
        told = [str(i) * (1 + 997 * (i % 7)) for i in range(500)]
        for text in told:
            ranks.send("note", text.encode())
        (answer,) = ranks.call("notes")
        assert json.loads(answer) == told


def test_large_payloads_go_both_ways(tmp_path: Path) -> None:
    payload = os.urandom(20_000_003)
    with started(3, tmp_path) as ranks:
        assert ranks.call("echo", payload) == [payload, payload]


def test_two_engines_in_one_process_have_ranks_and_groups_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with started(2, tmp_path / "a") as one, started(2, tmp_path / "b") as other:
        groups = joined(one), joined(other)
        assert not torch.distributed.is_initialized()
        for ranks, group in ((one, groups[0]), (other, groups[1]), (one, groups[0])):
            least, _ = ranks.call_all("wait_for_ranks", b"0", lambda g=group: g.min_int(7))
            assert least == 0
        one.close()
        assert other.call("echo", b"still here") == [b"still here"]


@pytest.mark.parametrize("kind, error", [("ValueError", ValueError), ("RuntimeError", RankFailed)])
def test_an_error_that_all_ranks_raise_leaves_them_usable(
    kind: str, error: type[Exception], tmp_path: Path
) -> None:
    with started(3, tmp_path) as ranks:
        payload = json.dumps([[1, 2], kind, "max_num_seqs is 0"]).encode()
        with pytest.raises(error, match="max_num_seqs is 0"):
            ranks.call("refuse", payload)
        ranks.check()
        assert ranks.call("echo", b"x") == [b"x", b"x"]


def test_an_error_that_rank_0_raises_too_leaves_the_ranks_usable(tmp_path: Path) -> None:
    def own() -> None:
        raise ValueError("too long")

    with started(3, tmp_path) as ranks:
        payload = json.dumps([[1, 2], "ValueError", "too long"]).encode()
        with pytest.raises(ValueError, match=r"^too long$"):
            ranks.call_all("refuse", payload, own)
        assert ranks.call("echo", b"x") == [b"x", b"x"]


def test_output_of_ranks_appears_with_their_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(3, tmp_path) as ranks:
        ranks.call("say", b"Zeile\nanother, unfinished")
    error = capfd.readouterr().err
    for rank in (1, 2):
        assert f"rank {rank}: Zeile\n" in error
        assert f"rank {rank}: another, unfinished\n" in error


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    ranks = WorkerGroup.start({}, 2, MODULE, tmp_path)
    ranks.close()
    ranks.close()
    with pytest.raises(RankFailed, match="closed"):
        ranks.send("note", b"x")


def test_a_device_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several ranks do not work on meta"):
        Group(0, 2, torch.device("meta"), tmp_path)


def test_connecting_imports_no_torch() -> None:
    code = f"import sys, {connect.__module__}; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
