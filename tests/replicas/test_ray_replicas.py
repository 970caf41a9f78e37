"""Replicas on a Ray cluster of two nodes on this machine, and on a Ray that the engine starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, AsyncLLM, EngineConfig, SamplingParams, env
from nanovllm.engine.request import EngineInfo
from nanovllm.outputs import StreamOutput
from nanovllm.replicas import child_config, cluster, ray_replica
from nanovllm.replicas.handshake import check_agreement
from nanovllm.replicas.ray_actor import ReplicaActor
from nanovllm.replicas.replica import ReplicaFailed
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts, save_tokenizer, tokens
from tests.ray_nodes import LOOPBACK, family, listening, loopback, two_nodes_of
from tests.serving.served import run
from tests.serving.test_clients import answers

ROOT = Path(__file__).parents[2]
SIZES = {
    "device": "cpu", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4,
    "max_num_batched_tokens": 64, "max_model_len": 512, "kvcache_block_size": 16,
    "num_kvcache_blocks": 129,
}  # fmt: skip
PROMPTS = random_prompts([1, 19, 70, 33, 7, 48])
NUM_CPUS = 4  # of each node
WAIT_S = 30  # for what takes up to some seconds on a machine that is not busy


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """The cluster; this process is connected to it, as a user's may be."""
    with two_nodes_of(NUM_CPUS) as made:
        import ray

        ray.init(address=made.address, log_to_driver=False)
        try:
            yield made
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    llm = LLM(str(folder), **SIZES)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def two(folder: Path, two_nodes: Any) -> Iterator[LLM]:
    llm = make(folder, data_parallel_size=2)
    yield llm
    llm.close()


def make(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), distributed_executor_backend="ray", **{**SIZES, **options})


def relays() -> set[int]:
    """The processes of all actors of replicas on nodes that this process has started."""
    found = set()
    for pid in children(children({os.getpid()})):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ReplicaActor"):
                found.add(pid)
    return found


def children(parents: set[int]) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) in parents and state != "Z":
                found.add(int(path.parent.name))
    return found


def raylet(node: Any) -> int:
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)


def wait_until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0))


def groups_in_use() -> list[str]:
    import ray

    states = [one["state"] for one in ray.util.placement_group_table().values()]
    return [state for state in states if state != "REMOVED"]


def node_ids() -> list[str]:
    """The node of each replica of the only placement group."""
    import ray

    tables = ray.util.placement_group_table().values()
    (table,) = [one for one in tables if one["state"] == "CREATED"]
    return [table["bundles_to_node_id"][index] for index in sorted(table["bundles"])]


def test_ranks_of_a_replica_are_processes_of_its_node_and_leave_nothing(
    folder: Path, alone: LLM, two_nodes: Any
) -> None:
    free = free_cpus()
    llm = make(folder, tensor_parallel_size=2)
    (actor,) = relays()
    (engine,) = children({actor})
    ranks = children({engine})
    assert len(ranks) >= 1 and len(node_ids()) == 1
    assert tokens(llm, PROMPTS, greedy(6)) == tokens(alone, PROMPTS, greedy(6))
    llm.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (actor, engine, *ranks)))
    wait_until(lambda: not groups_in_use() and free_cpus() == free)
    with pytest.raises(RuntimeError, match="this engine is closed"):
        llm.generate(PROMPTS, greedy(2), use_tqdm=False)


def test_a_replica_that_cannot_start_is_an_error(
    folder: Path, tmp_path: Path, two_nodes: Any
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Exception, match=r"replica 0 on node 127\.0\.0\.1: .*model\.safetensors"):
        make(tmp_path, skip_tokenizer_init=True)
    wait_until(lambda: not relays() and not groups_in_use())


def test_async_llm_reaches_the_replicas_of_a_cluster(
    folder: Path, alone: LLM, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the router in the engine process, which `nanovllm serve` has too."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    options: dict[str, Any] = {**SIZES, "distributed_executor_backend": "ray"}

    async def work() -> list[list[int]]:
        async with AsyncLLM(str(folder), data_parallel_size=2, **options) as llm:
            found = await answers(llm, PROMPTS, greedy(6))
            with pytest.raises(ValueError, match="prompt_logprobs cannot be combined with stop"):
                await llm.open("a", greedy(2, stop=["x"], prompt_logprobs=1))
            return [one[-1].outputs[0].token_ids for one in found]

    assert run(work()) == tokens(alone, PROMPTS, greedy(6))
    wait_until(lambda: not groups_in_use())


def test_an_interrupt_while_replicas_start_leaves_nothing(folder: Path, two_nodes: Any) -> None:
    def interrupt() -> None:
        wait_until(lambda: children(relays()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    num_threads = threading.active_count()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        make(folder, data_parallel_size=2)
    thread.join()
    assert threading.active_count() <= num_threads
    wait_until(lambda: not relays() and not groups_in_use())


@pytest.mark.parametrize(
    "params",
    [greedy(12), greedy(12, temperature=0.8, seed=5, n=2, logprobs=2)],
    ids=["greedy", "seeded"],
)
def test_answers_on_two_nodes_are_those_of_one_engine(
    params: SamplingParams, alone: LLM, two: LLM
) -> None:
    assert len(set(node_ids())) == 2
    found, expected = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert {**one, "num_cached_tokens": 0} == {**other, "num_cached_tokens": 0}
    engine: Any = two.engine
    for replica in engine.replicas:
        counts = {metric.name: metric.value for metric in replica.read_metrics()}
        assert counts["nanovllm:prompt_tokens"] > 0


def test_what_does_not_cross_is_refused(two: LLM) -> None:
    match = "is not supported with data_parallel_size=2"
    with pytest.raises(ValueError, match=f"sleep {match}"):
        two.sleep()


def test_given_embeddings_reach_another_node(alone: LLM, two: LLM) -> None:
    found = []
    for llm in (alone, two):
        engine: Any = llm.engine
        ids = {
            engine.add_request(
                PROMPTS[1], greedy(5), embeddings=[(3, float(i + 1) * torch.ones(2, 64))]
            ): i
            for i in range(2)
        }
        done: dict[int, list[int]] = {}
        while len(done) < 2:
            engine.advance()
            done |= {ids[one.request_id]: one.completion.token_ids
                     for one in engine.take(ids) if one.completion is not None}  # fmt: skip
        found.append(done)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"distributed_executor_backend": "mpi"}, "'mpi': it must be one of mp, ray"),
        ({"distributed_executor_backend": "uni", "tensor_parallel_size": 2}, "'uni': it must be"),
        ({"enable_sleep_mode": True}, "backend='ray' does not go with enable_sleep_mode=True"),
        ({"draft_lengths": (2,)}, r"backend='ray' does not go with draft_lengths=\[2\]"),
        ({"device": "cuda:1"}, "backend='ray' does not go with device='cuda:1'"),
        ({"device": "mps"}, "device is 'mps': Ray assigns the devices of replicas"),
    ],
)
def test_options_that_do_not_go_with_ray(
    options: dict[str, Any], match: str, two_nodes: Any
) -> None:
    with pytest.raises(ValueError, match=match):
        LLM("tiny-qwen3", **{"distributed_executor_backend": "ray", **options})


def test_one_process_is_what_vllm_calls_uni() -> None:
    for given in ("uni", None, "mp"):
        config = EngineConfig.from_options("m", {"distributed_executor_backend": given})
        assert config == EngineConfig("m")


def test_a_cluster_that_is_too_small_is_an_error_at_once(folder: Path, two_nodes: Any) -> None:
    started, groups = time.monotonic(), len(groups_in_use())
    with pytest.raises(ValueError, match=r"3 replicas need 3 CPU\(s\) each, .* have 4, 4"):
        make(folder, data_parallel_size=3, tensor_parallel_size=3)
    with pytest.raises(ValueError, match=r"1 replica needs 1 GPU\(s\), .* have 0, 0"):
        make(folder, device="cuda")
    assert time.monotonic() - started < WAIT_S
    assert len(groups_in_use()) == groups


def test_a_cluster_that_others_use_is_an_error_after_a_while(
    folder: Path, two: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_replica, "PLACE_S", 0.5)
    groups = len(groups_in_use())
    with pytest.raises(RuntimeError, match=r"no room for 1 × 4 CPU\(s\) .* 0 CPU\(s\) of all"):
        make(folder)
    wait_until(lambda: len(groups_in_use()) == groups)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"backend='ray' needs Ray, .*\[ray\]"):
        LLM("tiny-qwen3", distributed_executor_backend="ray")


def test_messages_arrive_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Fake:
        def __init__(self, *args: Any) -> None: ...

        def send(self, name: str, payload: bytes) -> None:
            told.append(name)

    monkeypatch.setattr("nanovllm.replicas.ray_actor.ProcessReplica", Fake)
    relay = ReplicaActor(0, b"{}")
    for number in (2, 0, 3, 1, 4):
        relay.send(number, str(number), b"")
    assert told == ["0", "1", "2", "3", "4"]


def test_the_address_of_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert env.ray_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.5:6379\n")
    assert env.ray_address() == "10.0.0.5:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert env.ray_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.6:10001")
    with pytest.raises(ValueError, match=r"'ray://10.*client is not supported, use HOST:PORT"):
        cluster.connect(env.ray_address(), "x")


def test_engines_share_a_connection_until_the_last_one_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    settings = [True]  # of whether Ray connects by itself

    class Fake:
        @staticmethod
        def is_initialized() -> bool:
            return calls.count("connect") > calls.count("shutdown")

        @staticmethod
        def shutdown() -> None:
            calls.append("shutdown")

    def connect(address: str | None, user: str) -> type[Fake]:
        calls.append("connect")
        return Fake

    def connect_by_itself(allowed: bool) -> bool:
        settings.append(allowed)
        return settings[-2]

    monkeypatch.setitem(sys.modules, "ray", Fake)
    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(cluster, "_connect_by_itself", connect_by_itself)
    shared = cluster.Shared()
    for _ in range(2):
        shared.open("x", None)
        shared.open("x", None)
        shared.close()
        assert Fake.is_initialized() and not settings[-1]
        shared.close()
        assert not Fake.is_initialized() and settings[-1]
    calls.append("connect")  # by the user
    shared.open("x", None)
    shared.close()
    assert Fake.is_initialized()


def test_replicas_must_see_one_checkpoint() -> None:
    fact = EngineInfo("a", 64, 4, 512, 64, 16, 9, [], {})
    check_agreement([fact, fact], ["replica 0", "replica 1"])
    with pytest.raises(ValueError, match="replica 1 has a different checkpoint from replica 0"):
        check_agreement([fact, replace(fact, checkpoint="b")], ["replica 0", "replica 1"])
    with pytest.raises(ValueError, match=r"requests of \[64, 48\] tokens"):
        check_agreement([fact, replace(fact, max_model_len=48)], ["replica 0", "replica 1"])


def test_folders_of_this_process_have_full_paths_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    config = EngineConfig(folder.name, tokenizer="owner/name", compile_cache="store")
    found = child_config.with_full_paths(config)
    assert found.model == str(folder) and found.tokenizer == "owner/name"
    assert found.compile_cache == str(folder.parent / "store")


def test_the_loss_of_a_node_and_of_an_actor_end_only_what_they_have_begun(
    alone: LLM, two: LLM, two_nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends a node for good, then stops the actor on the other one, which starts again. The
    node's engine is paused before, so that it cannot finish while its node ends."""
    prompts = random_prompts([30] * 8, seed=6)
    expected = tokens(alone, prompts, greedy(450))
    lost = node_ids().index(two_nodes.second.node_id)
    (paused,) = children(children({raylet(two_nodes.second)}) & relays())
    pieces = two.stream(prompts, greedy(450))
    begun: list[StreamOutput] = []
    while len({piece.index for piece in begun}) < len(prompts):
        begun.append(next(pieces))
    os.kill(paused, signal.SIGSTOP)
    two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    with suppress(ProcessLookupError):
        os.kill(paused, signal.SIGCONT)
    started = time.monotonic()
    ids: list[list[int]] = [[] for _ in prompts]
    reasons: list[Any] = [None] * len(prompts)
    for piece in (*begun, *pieces):
        assert reasons[piece.index] is None, "nothing follows the last piece"
        ids[piece.index] += piece.token_ids
        reasons[piece.index] = piece.finish_reason
        if piece.finish_reason == "error":
            ending = rf"replica {lost} on node 127\.0\.0\.1 (is lost|stopped responding)"
            assert re.match(ending, piece.error)
            assert time.monotonic() - started < WAIT_S
    assert reasons.count("error") == reasons.count("length") == 4
    for ours, wanted, reason in zip(ids, expected, reasons, strict=True):
        assert ours == (wanted if reason == "length" else wanted[: len(ours)])
    assert tokens(two, prompts, greedy(5)) == [one[:5] for one in expected]
    (actor,) = relays()
    (engine,) = children({actor})
    os.kill(actor, signal.SIGSTOP)
    # both are started again; one of them has no place, and the requests wait for the other
    assert tokens(two, prompts, greedy(5)) == [one[:5] for one in expected]
    assert "has not responded for 8 s" in caplog.text
    wait_until(lambda: actor not in relays() and not Path(f"/proc/{engine}").exists())
    two.close()
    wait_until(lambda: not relays() and not groups_in_use())


def test_a_user_who_ends_ray_ends_the_replicas(folder: Path, two_nodes: Any) -> None:
    """The last test of this cluster: it ends the connection."""
    import ray
    from ray._private import auto_init_hook

    llm = make(folder)
    ray.shutdown()
    with pytest.raises(ray.exceptions.RaySystemError, match="has not been started"):
        ray.put(1)  # as a call of the engine that overlaps the end: it connects to nothing
    with pytest.raises(ReplicaFailed, match=r"no replica is left: replica 0 on node .* is lost"):
        for _ in range(2):
            llm.generate(PROMPTS, greedy(2), use_tqdm=False)
    wait_until(lambda: not relays())
    llm.close()
    assert not ray.is_initialized()
    assert auto_init_hook.enable_auto_connect


SCRIPT = """
import os, sys
from nanovllm import LLM, SamplingParams
llm = LLM({folder!r}, distributed_executor_backend="ray", **{sizes!r})
print(llm.generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids)
sys.stdout.flush()
input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ray_of_its_own_listens_on_loopback_and_ends_with_the_script(
    folder: Path, alone: LLM
) -> None:
    environment = {
        name: text for name, text in os.environ.items() if name not in (*LOOPBACK, "RAY_ADDRESS")
    }
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(folder=str(folder), sizes=SIZES)],
        cwd=ROOT, env={**environment, "RAY_ADDRESS": "local"}, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert script.stdout is not None
        answer = script.stdout.readline()
        found = listening(family(script.pid))
        _, stderr = script.communicate("\n", timeout=60)
        assert json.loads(answer) == tokens(alone, [[5, 6]], greedy(4))[0], stderr
        assert found and set(found) <= loopback()
        assert script.returncode == 0 and "Traceback" not in stderr
        wait_until(lambda: not family(script.pid))
    finally:
        for pid in family(script.pid):
            os.kill(pid, signal.SIGKILL)
