"""Messages of a step: a client that does not read makes nobody wait, and gets all of it later."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.parallel import channel
from nanovllm.parallel.channel import Channel, ChannelClosed, channel_pair
from nanovllm.replicas import client_conn, messages
from nanovllm.replicas.client_conn import ClientConn
from nanovllm.replicas.loop import AnswerOwner, Loop
from nanovllm.replicas.messages import Outputs, RowTokens
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta

Pair = tuple[ClientConn, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made = ClientConn(ours), Channel(theirs)
    yield made
    made[0].close()
    made[1].close()


def received(pair: Pair) -> dict[int, RowTokens]:
    """All that a client gets, joined per answer; the port sends what waits meanwhile."""
    found: dict[int, RowTokens] = {}
    while pair[0].is_waiting or not found:
        pair[0].send_more()
        for name, payload in pair[1].pending(wait=False):
            assert name == messages.OUTPUTS
            outputs = messages.load_outputs(payload)
            rows = [RowTokens(one, [token]) for one, token in zip(outputs.ids, outputs.tokens)]
            for row in rows + outputs.rows:
                if row.request_id in found:
                    found[row.request_id].extend(row)
                else:
                    found[row.request_id] = row
    return found


def test_a_client_that_does_not_read_gets_everything_in_few_messages(pair: Pair) -> None:
    num_steps, num_answers = 999, 19
    for step in range(num_steps):
        for request_id in range(num_answers):
            if request_id == 7 and step % 3 == 0:
                pair[0].add_row(RowTokens(7, [step, step], [[(step, -1.0, 1)], [(step, -2.0, 1)]]))
            elif request_id != 7:
                pair[0].add_token(request_id, step)
        pair[0].flush()
    done = messages.Done("length", None, 3, None, None)
    pair[0].add_row(RowTokens(2, [], None, done))
    pair[0].flush()
    assert pair[0].is_waiting
    found = received(pair)
    assert found.pop(7).token_ids == [step for step in range(0, num_steps, 3) for _ in range(2)]
    assert {tuple(row.token_ids) for row in found.values()} == {tuple(range(num_steps))}
    assert len(found) == num_answers - 1
    assert found[2].done == done and found[3].done is None


def test_what_waits_for_a_client_is_bounded_and_only_the_largest_answers_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_conn, "MAX_HELD_NUMBERS", 5000)
    ended: list[int] = []
    while not ended:
        for request_id in {1, 2, 3} - {*ended}:
            pair[0].add_token(request_id, 7)
        top = [(one, -1.0, one) for one in range(9)]
        pair[0].add_row(RowTokens(4, [7], [top]))
        pair[0].flush()
        ended += pair[0].take_too_large()
    assert ended == [4] and pair[0].take_too_large() == []
    for request_id in (1, 2, 3):
        pair[0].add_token(request_id, 8)
    pair[0].flush()
    found = received(pair)
    error = found[4].done and found[4].done.error
    assert error is not None and "has not read" in error and found[4].done is not None
    assert found[4].done.finish_reason == "error"
    assert all(found[one].token_ids[-1] == 8 and found[one].done is None for one in (1, 2, 3))


def test_an_answer_that_is_not_read_is_aborted_and_its_client_is_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_conn, "MAX_HELD_NUMBERS", 5000)
    aborted: list[int] = []
    control, others = channel_pair()
    engine: Any = SimpleNamespace(abort_all=aborted.extend)
    loop = Loop(engine, [pair[0]], control)
    top = {one: Logprob(-1.0, 1, one, None) for one in (1, 2)}
    pair[0].answers = {1: 11, 2: 12}
    loop._owners = {11: AnswerOwner(pair[0], 1, True), 12: AnswerOwner(pair[0], 2, True)}
    while not aborted:
        loop._pass_on([OutputDelta(11, [7], ""), OutputDelta(12, [7], "", [top])])
    assert aborted == [12] and pair[0].answers == {1: 11} and [*loop._owners] == [11]
    loop._pass_on([OutputDelta(11, [8], "")])
    found = received(pair)
    assert found[1].token_ids[-1] == 8 and found[2].done and found[2].done.finish_reason == "error"
    loop._selector.close()
    control.close()
    others.close()


def test_a_row_that_is_too_large_ends_its_answer_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PAYLOAD_BYTES", 1000)
    pair[0].add_token(1, 7)
    for request_id, num in ((2, 3), (3, 999), (4, 30)):
        pair[0].add_row(
            RowTokens(request_id, [8], [[(token, -1.0, token) for token in range(num)]])
        )
    pair[0].flush()
    found = received(pair)
    assert [found[one].token_ids for one in (1, 2, 3, 4)] == [[7], [8], [], [8]]
    error = found[3].done and found[3].done.error
    assert error is not None and "a step has too many log-probabilities: a payload" in error


def test_a_client_that_leaves_is_noticed(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(ChannelClosed):
        pair[0].read()
    with pytest.raises(ChannelClosed):
        for _ in range(99):
            pair[0].send(messages.METRICS, b"0" * 999)


def test_a_message_in_pieces_is_read_when_it_is_whole(pair: Pair) -> None:
    packed = channel.pack("add", b"x" * 3000)
    sock: Any = pair[1].sock
    sock.sendall(packed[:1000])
    assert pair[0].read() == []
    assert pair[0].read() == [], "nothing is there, and nobody waits"
    sock.sendall(packed[1000:] + packed[:7])
    assert pair[0].read() == [("add", b"x" * 3000)]


def test_increments_come_back_as_rows() -> None:
    def top(value: float) -> dict[int, Logprob]:
        return {4: Logprob(value, 1, 4, None), 2: Logprob(-9.0, 9, 2, None)}

    growing = OutputDelta(5, [1, 2], "", [top(-0.1), top(-0.2)])
    row = messages.row(8, growing, incremental=True)
    assert (row.request_id, row.token_ids, row.done) == (8, [1, 2], None)
    assert row.logprobs == [[(4, -0.1, 1), (2, -9.0, 9)], [(4, -0.2, 1), (2, -9.0, 9)]]
    positions = [top(-0.3)] * 3
    done = FinishedOutput("t", [1, 2, 3], "stop", 3, [8], 16, positions, [None, top(-2.0)], None)
    last = OutputDelta(5, [3], "", [top(-0.3)], done)
    for incremental, token_ids in ((True, [3]), (False, [1, 2, 3])):
        row = messages.row(8, last, incremental=incremental)
        (found,) = messages.load_outputs(messages.dump(Outputs([], [], [row]))).rows
        assert found == row and found.token_ids == token_ids
        assert found.logprobs is not None and len(found.logprobs) == len(token_ids)
        assert found.done is not None
        assert messages.prompt_logprobs(found.done, None) == [None, {4: -2.0, 2: -9.0}]
        assert (found.done.stop_reason, found.done.num_cached_tokens) == (3, 16)
