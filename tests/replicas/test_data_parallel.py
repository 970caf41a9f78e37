"""Several engines behind one `LLM`, each a process: answers, placing, failures, the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.batch.rows import Line
from nanovllm.batch.worker import EngineWorker, WorkerSettings, load_engine
from nanovllm.engine.request import MediaPrompt
from nanovllm.parallel.channel import Channel, ChannelClosed, channel_pair
from nanovllm.replicas import messages
from nanovllm.replicas.loop import Loop
from nanovllm.replicas.machine import ProcessStarter
from nanovllm.replicas.messages import Add
from nanovllm.replicas.process_replica import ProcessReplica
from nanovllm.runner.encoders import MMItem
from nanovllm.schedule.request import MMSpan
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts, save_tokenizer, tokens

SIZES = {
    "device": "cpu",
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 129,
}
PROMPTS = random_prompts([1, 19, 70, 33, 7, 48])


def make(folder: Path, size: int, **options: Any) -> LLM:
    return LLM(str(folder), data_parallel_size=size, **{**SIZES, **options})


def pids(llm: LLM) -> list[int]:
    engine: Any = llm.engine
    return [replica.pid for replica in engine.replicas]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(parent: int | None = None) -> set[int]:
    """The processes that this one, or another, has started and that still run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, started_by = path.read_text().rsplit(")", 1)[1].split()[:2]
            if int(started_by) == (parent or os.getpid()) and state != "Z":
                found.add(int(path.parent.name))
    return found


def count(llm: LLM, name: str) -> float:
    return next(one.value for one in llm.get_metrics() if one.name == f"nanovllm:{name}")


def counts(llm: LLM, name: str) -> list[float]:
    """The same for each replica."""
    engine: Any = llm.engine
    found = [replica.read_metrics() for replica in engine.replicas]
    return [next(m.value for m in metrics if m.name == f"nanovllm:{name}") for metrics in found]


def note(engine: Any, found: dict[int, list[int]], ends: dict[int, Any]) -> None:
    """Take what has come: the tokens of each request, and its end."""
    engine.advance()
    for one in engine.take():
        assert one.request_id not in ends, "nothing follows the end"
        found[one.request_id] += one.token_ids
        if one.completion is not None:
            ends[one.request_id] = one.completion


def wait_until_gone(gone: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, gone)):
        assert time.monotonic() < deadline, f"of {gone} some run"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    llm = make(folder, 2)
    yield llm
    llm.close()


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 5, "n": 2},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "edits": {"logit_bias": {7: 4.0}, "bad_words": ["the"], "allowed_token_ids": range(5, 90)},
    "stops": {"stop": ["<filler"], "include_stop_str_in_output": True, "ignore_eos": False},
    "truncated": {"truncate_prompt_tokens": 5},
    "no text": {"detokenize": False, "min_tokens": 3, "stop_token_ids": [7, 9]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_one_engine(name: str, alone: LLM, two: LLM) -> None:
    params = greedy(12, **VARIANTS[name])
    found, expected = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert {**one, "num_cached_tokens": 0} == {**other, "num_cached_tokens": 0}


def test_drawn_seeds_do_not_depend_on_the_replica(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    found = []
    for size in (1, 2):
        llm = make(folder, size, seed=3)
        found.append(tokens(llm, PROMPTS, params))
        llm.close()
    assert found[0] == found[1]


def test_log_probabilities_are_those_of_one_engine(alone: LLM, two: LLM) -> None:
    params = greedy(4, logprobs=3, prompt_logprobs=2)
    found, expected = (llm.generate(PROMPTS[:3], params, use_tqdm=False) for llm in (two, alone))
    for ours, theirs in zip(found, expected, strict=True):
        positions = [*ours.prompt_logprobs[1:], *ours.outputs[0].logprobs]
        others = [*theirs.prompt_logprobs[1:], *theirs.outputs[0].logprobs]
        assert ours.prompt_logprobs[0] is None
        for one, other in zip(positions, others, strict=True):
            assert list(one) == list(other)
            for token in one:
                assert abs(one[token].logprob - other[token].logprob) < 1e-4
                assert one[token].rank == other[token].rank
                assert one[token].decoded_token == other[token].decoded_token


def test_requests_are_spread_by_load(two: LLM) -> None:
    before = counts(two, "prompt_tokens")
    prompts = random_prompts([40] * 8, seed=1)
    tokens(two, prompts, greedy(6))
    added = [now - then for now, then in zip(counts(two, "prompt_tokens"), before)]
    assert added == [160, 160]


def test_prompts_with_a_common_beginning_go_to_the_same_replica(two: LLM) -> None:
    beginnings = random_prompts([64] * 6, seed=2)
    tokens(two, beginnings, greedy(2))
    hits = count(two, "prefix_cache_hit_tokens")
    for tail in ([5, 6, 7], [8, 9]):  # in another order than before
        found = two.generate([one + tail for one in beginnings[::-1]], greedy(2), use_tqdm=False)
        assert [output.num_cached_tokens for output in found] == [64] * 6
    assert count(two, "prefix_cache_hit_tokens") - hits == 2 * 6 * 64


def test_reset_prefix_cache_reaches_every_replica(two: LLM) -> None:
    prompts = random_prompts([64] * 4, seed=3)
    tokens(two, prompts, greedy(2))
    two.reset_prefix_cache()
    found = two.generate(prompts, greedy(2), use_tqdm=False)
    assert [output.num_cached_tokens for output in found] == [0] * 4


def test_salted_prompts_share_no_blocks(two: LLM) -> None:
    (prompt,) = random_prompts([64], seed=4)
    for salt, cached in (("a", 0), ("b", 0), ("a", 48)):
        given = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = two.generate(given, greedy(2), use_tqdm=False)
        assert output.num_cached_tokens == cached


def test_stream_gives_the_pieces_of_all_answers(alone: LLM, two: LLM) -> None:
    expected = [output.text for output in alone.generate(PROMPTS, greedy(), use_tqdm=False)]
    texts, num_pieces = [""] * len(PROMPTS), 0
    for piece in two.stream(PROMPTS, greedy()):
        texts[piece.index] += piece.text
        num_pieces += 1
    assert texts == expected
    assert num_pieces > 2 * len(PROMPTS)


def test_a_stream_that_is_left_aborts_its_requests(two: LLM) -> None:
    params = greedy(400)
    steps = count(two, "num_steps")
    for _ in two.stream(PROMPTS, params):
        break
    tokens(two, PROMPTS[:2], greedy(2))
    assert count(two, "num_requests_running") == 0
    assert count(two, "num_steps") - steps < 200
    assert not two.engine._pending  # type: ignore[attr-defined]


def test_an_aborted_request_ends_with_what_it_has(two: LLM) -> None:
    engine = two.engine
    request_id = engine.add_request(PROMPTS[1], greedy(400))
    while not engine.has_outputs([request_id]):
        engine.advance()
    before = [token for one in engine.take([request_id]) for token in one.token_ids]
    engine.abort(request_id)
    (last,) = engine.take([request_id])
    assert last.completion is not None and last.completion.finish_reason == "abort"
    assert last.completion.token_ids == before


def test_engine_stepped_by_hand(alone: LLM, two: LLM) -> None:
    found = []
    for llm in (alone, two):
        engine, texts = llm.llm_engine, {}
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(5))
        while engine.has_unfinished_requests():
            for output in engine.step():
                texts[output.request_id] = output.outputs[0].text
        found.append(texts)
    assert found[0] == found[1] and len(found[0]) == len(PROMPTS)


def test_threads_share_the_replicas(alone: LLM, two: LLM) -> None:
    expected = tokens(alone, PROMPTS, greedy())
    found: dict[int, list[list[int]]] = {}

    def call(number: int) -> None:
        found[number] = tokens(two, PROMPTS, greedy())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), expected)


def test_chat_and_beam_search(alone: LLM, two: LLM) -> None:
    from nanovllm import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=4)
    found, expected = (llm.beam_search(PROMPTS[:2], params) for llm in (two, alone))
    assert [[s.tokens for s in one.sequences] for one in found] == [
        [s.tokens for s in one.sequences] for one in expected
    ]


def test_bad_requests_are_refused_and_queue_nothing(two: LLM) -> None:
    before = count(two, "prompt_tokens")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([[5], []], {}, "the prompt is empty"),
        ([[5], [512]], {}, "token id 512 is outside the vocabulary"),
        ([[5], [5] * 512], {}, "the prompt has 512 tokens"),
        ([[5]], {"logit_bias": {600: 1.0}}, "logit_bias holds token id 600"),
    ]
    for prompts, changes, match in cases:
        with pytest.raises(ValueError, match=match):
            two.generate(prompts, greedy(2, **changes), use_tqdm=False)
    with pytest.raises(ValueError, match=r"embeddings have shape \[1, 63\]"):
        two.engine.add_request([5, 6], greedy(2), embeddings=[(0, torch.ones(1, 63))])
    image = MMSpan(0, 1, b"digest"), MMItem(torch.ones(4, 8), (1, 2, 2))
    with pytest.raises(ValueError, match=r"the prompt has images, but .* accepts text only"):
        two.engine.add_request(MediaPrompt([5, 6], None, [image]), greedy(2))
    with pytest.raises(ValueError, match="sleep is not supported with data_parallel_size=2"):
        two.sleep()
    with pytest.raises(ValueError, match="cannot be replaced with data_parallel_size=2"):
        two.set_tokenizer(two.get_tokenizer())
    assert count(two, "num_requests_running") + count(two, "num_requests_waiting") == 0
    assert count(two, "prompt_tokens") - before == 3  # valid ones before them, which were dropped


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_replica_ends_what_it_has_begun_and_the_rest_is_tried_again(
    kind: signal.Signals, folder: Path, alone: LLM
) -> None:
    # on a busy machine a replica may have ended what it has begun before it is stopped
    assert any(has_lost_requests(kind, folder, alone) for _ in range(5))


def has_lost_requests(kind: signal.Signals, folder: Path, alone: LLM) -> bool:
    """Each replica has begun four requests. Then one stops, so that later ones get no token from
    it. Whether it has lost some of both kinds."""
    llm = make(folder, 2)
    try:
        gone, engine = pids(llm), cast(Any, llm.engine)
        prompts = random_prompts([30] * 12, seed=6)
        expected = tokens(alone, prompts, greedy(400))
        ids = [engine.add_request(one, greedy(400)) for one in prompts[:8]]
        found: dict[int, list[int]] = {one: [] for one in ids}
        ends: dict[int, Any] = {}
        while not all(found.values()):
            note(engine, found, ends)
        os.kill(gone[0], signal.SIGSTOP)
        later = [engine.add_request(one, greedy(400)) for one in prompts[8:]]
        found |= {one: [] for one in later}
        lost = {one for one, has in engine._pending.items() if has.replica is engine.replicas[0]}
        os.kill(gone[0], kind)
        while len(ends) < 12:
            note(engine, found, ends)
        failed = {one for one in ids if ends[one].error is not None}
        assert failed <= lost
        for one, wanted in zip([*ids, *later], expected, strict=True):
            if one in failed:
                assert ends[one].finish_reason == "error" and "replica 0" in ends[one].error
                assert ends[one].token_ids == found[one] == wanted[: len(found[one])]
            else:
                assert ends[one].error is None and ends[one].token_ids == found[one] == wanted
        deadline = time.monotonic() + 60
        while not engine.replicas[0].is_ready:  # the other one answers meanwhile
            assert tokens(llm, prompts, greedy(5)) == [one[:5] for one in expected]
            assert time.monotonic() < deadline
        assert tokens(llm, prompts, greedy(5)) == [one[:5] for one in expected]
        assert pids(llm)[0] != gone[0] and min(counts(llm, "prompt_tokens")) > 0
    finally:
        llm.close()
    wait_until_gone(gone)
    return bool(failed and lost & set(later))


def test_rows_of_killed_replicas_are_answered_again(folder: Path, alone: LLM) -> None:
    prompts = random_prompts([30] * 12, seed=7)
    expected = tokens(alone, prompts, greedy(100))
    config = EngineConfig(str(folder), data_parallel_size=2, **SIZES)
    shared = load_engine(config)
    try:
        params = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
        worker = EngineWorker(shared, WorkerSettings(params))
        for row, prompt in enumerate(prompts):
            text = json.dumps({"prompt": prompt}).encode()
            worker.submit(Line(row, text, len(text)))
        engine: Any = shared.engine
        for replica in engine.replicas:
            os.kill(replica.pid, signal.SIGKILL)
        found: dict[int, list[int]] = {}
        while len(found) < len(prompts):
            found |= {one.row: json.loads(one.line)["token_ids"] for one in worker.wait()}
        assert [found[row] for row in range(len(prompts))] == expected
    finally:
        shared.engine.close()


def test_two_at_once_and_nothing_is_left(
    folder: Path,
    two: LLM,
    alone: LLM,
    bare_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = tokens(alone, PROMPTS, greedy(5))
    other = make(folder, 2, compile_cache=str(bare_store))
    gone, threads = pids(other), threading.active_count()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("nanovllm-")]
    assert tokens(other, PROMPTS, greedy(5)) == expected
    assert tokens(two, PROMPTS, greedy(5)) == expected
    other.close()
    assert not any(map(is_alive, gone))
    assert threading.active_count() == threads - 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("nanovllm-")]
    with pytest.raises(RuntimeError, match="this engine is closed"):
        other.generate(PROMPTS, greedy(5), use_tqdm=False)
    assert tokens(two, PROMPTS, greedy(5)) == expected


def test_replicas_of_several_ranks(folder: Path, alone: LLM) -> None:
    llm = make(folder, 2, tensor_parallel_size=2)
    try:
        assert tokens(llm, PROMPTS, greedy(6)) == tokens(alone, PROMPTS, greedy(6))
        assert min(counts(llm, "prompt_tokens")) > 0
        ranks = [pid for parent in pids(llm) for pid in children(parent)]
        assert len(ranks) >= 2
        (lost,) = children(pids(llm)[0])
        os.kill(lost, signal.SIGKILL)
        ends = [piece for piece in llm.stream(PROMPTS, greedy(6)) if piece.finish_reason]
        errors = [piece.error or "" for piece in ends if piece.finish_reason == "error"]
        assert len(errors) < len(ends) == len(PROMPTS)
        assert all("replica 0" in error for error in errors)
    finally:
        llm.close()
    wait_until_gone(ranks)


def test_interrupt_ends_the_answers_and_leaves_the_replicas(two: LLM, alone: LLM) -> None:
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            two.generate(PROMPTS * 4, greedy(400), use_tqdm=False)
    assert tokens(two, PROMPTS, greedy(5)) == tokens(alone, PROMPTS, greedy(5))
    assert count(two, "num_requests_running") == 0


def test_the_first_replica_compiles_and_the_others_load(
    folder: Path, alone: LLM, bare_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"enforce_eager": False, "graph_batch_sizes": [4], "compile_cache": str(bare_store)}
    expected = tokens(alone, PROMPTS, greedy(5))
    for is_cold in (True, False):
        capfd.readouterr()
        llm = make(folder, 2, **options)
        try:
            assert tokens(llm, PROMPTS, greedy(5)) == expected
        finally:
            llm.close()
        found = re.findall(r"replica (\d): .* programs \((\d+) compiled\)", capfd.readouterr().err)
        compiled = {int(index): int(num) for index, num in found}
        assert (compiled[0] > 0) == is_cold and compiled[1] == 0


def test_a_script_that_ends_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from nanovllm import LLM; from nanovllm.sampling import SamplingParams\n"
        f"llm = LLM({str(folder)!r}, data_parallel_size=2, **{SIZES!r})\n"
        "print(*(replica.pid for replica in llm.engine.replicas))\n"
        "llm.generate([[5, 6]], SamplingParams(max_tokens=2), use_tqdm=False)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    gone = [int(pid) for pid in done.stdout.split()]
    assert len(gone) == 2 and not any(map(is_alive, gone))
    assert not list(tmp_path.glob("nanovllm-*"))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["first", "second", "waiting"])
def test_interrupt_while_replicas_start_leaves_nothing(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as one has started, which nothing refers to yet, or while both load."""
    threads = set(threading.enumerate())
    start = ProcessStarter.start
    started: list[int] = []
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))

    def interrupted(self: ProcessStarter, *args: Any, **options: Any) -> ProcessReplica:
        replica = start(self, *args, **options)
        started.append(replica.pid)
        if when == ("first", "second")[len(started) - 1]:
            os.kill(os.getpid(), signal.SIGINT)
        elif len(started) == 2:
            for pid in started:
                os.kill(pid, signal.SIGSTOP)  # they load until the interrupt, however late it is
            timer.start()
        return replica

    monkeypatch.setattr(ProcessStarter, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, 2)
    if when == "waiting":
        timer.join()
    assert len(started) == (1 if when == "first" else 2) and not any(map(is_alive, started))
    assert not [one for one in threading.enumerate() if one not in threads and one.name == "ranks"]


def test_a_replica_that_cannot_start_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Exception, match=r"replica [01]: .*model\.safetensors"):
        make(tmp_path, 2, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size is 0: it must be a whole number"),
        ({"enable_sleep_mode": True}, "data_parallel_size=2 does not go with enable_sleep_mode"),
        ({"draft_lengths": (2,)}, r"data_parallel_size=2 does not go with draft_lengths=\[2\]"),
        ({"device": "cuda:1"}, "data_parallel_size=2 does not go with device='cuda:1'"),
    ],
)
def test_options_that_do_not_go_with_replicas(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM("tiny-qwen3", **{"data_parallel_size": 2, **options})


def test_a_request_that_an_engine_refuses_ends_alone(alone: LLM) -> None:
    engine: Any = alone.engine
    ours, theirs = channel_pair()
    loop = threading.Thread(target=run, args=(engine, Channel(theirs)))
    loop.start()
    assert ours.receive()[0] == messages.READY
    for request_id, prompt in enumerate(([5, 6], [5], [7])):
        bias = {"logit_bias": {600: 1.0}} if request_id == 1 else {}
        fields = messages.packed_params(SamplingParams(max_tokens=2, **bias), detokenizes=False)
        add = Add([request_id], [0], prompt, fields, False, 0, None)
        ours.send(messages.ADD, messages.dump(add))
    done: dict[int, Any] = {}
    while len(done) < 3:
        rows = messages.load_outputs(ours.receive()[1]).rows
        done.update({row.request_id: row.done for row in rows})
    ours.close()
    loop.join()
    assert (done[1].finish_reason, done[1].error_field) == ("error", "logit_bias")
    assert done[1].error.startswith("logit_bias holds token id 600")
    assert done[0].finish_reason == done[2].finish_reason == "length"


def run(engine: Any, channel: Channel) -> None:
    with suppress(ChannelClosed):
        Loop(engine, [], channel).run(engine.info)


def test_the_program_of_a_replica_sets_its_environment_before_torch_reads_it() -> None:
    code = "import sys, nanovllm.replicas.engine_program; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_alone_refuses_replicas(folder: Path) -> None:
    from nanovllm.engine.engine import Engine

    with pytest.raises(ValueError, match="data_parallel_size=2 is for LLM"):
        Engine.from_options(str(folder), data_parallel_size=2, **SIZES)
