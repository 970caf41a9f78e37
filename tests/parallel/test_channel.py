"""Messages arrive as they were sent; bad ones are refused."""

from __future__ import annotations

import socket
import threading

import pytest

from nanovllm.parallel import channel as channels
from nanovllm.parallel.channel import HEADER, Channel, ChannelClosed, channel_pair


@pytest.fixture
def ends() -> tuple[Channel, Channel]:
    ours, theirs = channel_pair()
    return ours, Channel(theirs)


@pytest.mark.parametrize("size", [0, 1, 19, 989, 1 << 20, (1 << 20) + 1, 5_000_003])
def test_payloads_arrive_in_order(ends: tuple[Channel, Channel], size: int) -> None:
    ours, theirs = ends
    payload = bytes(i % 251 for i in range(989)) * (size // 989 + 1)
    sent = [("first", payload[:size]), ("grüße", b""), ("", payload[1 : size + 1])]
    sender = threading.Thread(target=lambda: [ours.send(*message) for message in sent])
    sender.start()
    assert [theirs.receive() for _ in sent] == sent
    sender.join()


def test_messages_of_several_threads_stay_whole(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    payloads = [bytes([i]) * 300_000 for i in range(5)]
    threads = [threading.Thread(target=ours.send, args=("x", payload)) for payload in payloads]
    for thread in threads:
        thread.start()
    assert sorted(theirs.receive()[1] for _ in threads) == payloads


def test_a_part_of_a_message_keeps_nobody_waiting() -> None:
    raw, other = socket.socketpair()
    theirs = Channel(other)
    raw.sendall(HEADER.pack(1, 3) + b"a12")
    assert list(theirs.receive_available()) == []
    raw.sendall(b"3" + HEADER.pack(1, 0) + b"b" + HEADER.pack(9, 9)[:5])
    assert list(theirs.receive_available()) == [("a", b"123"), ("b", b"")]


def test_a_closed_end_is_noticed_on_both_sides(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send("last", b"1")
    ours.close()
    assert theirs.receive() == ("last", b"1")
    with pytest.raises(ChannelClosed):
        theirs.receive()
    with pytest.raises(ChannelClosed):
        theirs.send("x")


def test_who_waits_to_send_goes_on_when_the_channel_is_shut_down(
    ends: tuple[Channel, Channel],
) -> None:
    ours, _ = ends
    errors: list[Exception] = []

    def send() -> None:
        try:
            ours.send("x", bytes(10_000_000))  # more than the sockets hold
        except ChannelClosed as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.2)
    assert sender.is_alive()
    ours.shut_down()
    sender.join(60)
    assert len(errors) == 1


def test_sizes_above_the_limits_are_refused(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ends
    with pytest.raises(ValueError, match="name of 1025 bytes is above the limit of 1024"):
        ours.send("x" * 1025)
    monkeypatch.setattr(channels, "MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(ValueError, match="payload of 11 bytes is above"):
        ours.send("x", bytes(11))
    ours.send("x", bytes(10))
    assert theirs.receive() == ("x", bytes(10))


def test_a_header_with_a_size_above_the_limit_is_refused_before_its_payload_is_read() -> None:
    raw, other = socket.socketpair()
    raw.sendall(HEADER.pack(1, (1 << 30) + 1))
    with pytest.raises(ValueError, match="payload of 1073741825 bytes is above"):
        Channel(other).receive()


def test_pending_messages_include_those_that_an_earlier_call_has_read() -> None:
    ours, theirs = channel_pair()
    other = Channel(theirs)
    assert ours.pending(wait=False) == []
    for name in ("a", "b", "c"):
        other.send(name, b"x")
    assert ours.receive() == ("a", b"x")
    assert ours.pending(wait=True) == [("b", b"x"), ("c", b"x")]
    assert ours.pending(wait=False) == []
    timer = threading.Timer(0.1, other.send, ("d",))
    timer.start()
    assert ours.pending(wait=True) == [("d", b"")]
    other.close()
    with pytest.raises(ChannelClosed):
        ours.pending(wait=False)
    ours.close()
