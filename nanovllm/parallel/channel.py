"""Messages between two processes over a private pair of sockets: no port, no name, no pickle."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator

# A message is this header (bytes of the name, bytes of the payload), the name, the payload.
HEADER = struct.Struct("<IQ")
MAX_NAME_BYTES = 1 << 10
MAX_PAYLOAD_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20  # at most so much is read at once

Message = tuple[str, bytes]  # a name and a payload


class ChannelClosed(ConnectionError):
    """The process at the other end has ended or has closed its end."""


def pack(name: str, payload: bytes = b"") -> bytes:
    """A message as bytes. Raises ValueError for a name above 1 KiB or a payload above 1 GiB."""
    return _head(name, payload) + payload


def unpack(received: bytearray) -> Message | None:
    """Take the first message out of bytes; None if it is not complete."""
    if len(received) < HEADER.size:
        return None
    num_name, num_payload = HEADER.unpack_from(received)
    _check_sizes(num_name, num_payload)
    start = HEADER.size + num_name
    end = start + num_payload
    if len(received) < end:
        return None
    with memoryview(received) as view:
        message = str(view[HEADER.size : start], "utf-8"), bytes(view[start:end])
    del received[:end]
    return message


class Channel:
    """One end of a pair of connected sockets (AF_UNIX), which sends and receives messages.

    Several threads may send. One thread may receive.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes over the socket."""
        sock.setblocking(True)
        self.sock = sock
        self._received = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's file descriptor, for selectors."""
        return self.sock.fileno()

    def send(self, name: str, payload: bytes = b"") -> None:
        """Send a message. It waits only if the other end has not read the messages before it.

        Raises ValueError as `pack` does, and ChannelClosed.
        """
        head = _head(name, payload)
        try:
            with self._sending:
                if len(payload) <= _PIECE_BYTES:
                    self.sock.sendall(head + payload)
                else:
                    self.sock.sendall(head)
                    self.sock.sendall(payload)
        except OSError as error:
            raise ChannelClosed(f"cannot send {name!r}: {error}") from error

    def send_packed(self, messages: bytes | bytearray) -> None:
        """The same for messages that were packed by `pack`."""
        try:
            with self._sending:
                self.sock.sendall(messages)
        except OSError as error:
            raise ChannelClosed(f"cannot send: {error}") from error

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed, or ValueError for one that is no message
        or is too large."""
        while (message := unpack(self._received)) is None:
            self._read()
        return message

    def receive_available(self) -> Iterator[Message]:
        """The messages that are complete once what is there now has been read, which must be
        something. It never waits for the rest of a message. Raises as `receive` does."""
        self._read()
        yield from self._complete()

    def pending(self, *, wait: bool) -> list[Message]:
        """The messages that are complete now; with `wait`, at least one. Raises as `receive` does.

        Unlike `receive_available` it may follow `receive`.
        """
        found = list(self._complete())
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while (wait and not found) or poll.poll(0):
            self._read()
            found += self._complete()
        return found

    def shut_down(self) -> None:
        """End the connection: whoever waits to send or receive here gets ChannelClosed."""
        with contextlib.suppress(OSError):  # it has ended already
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut_down()
        self.sock.close()

    def _read(self) -> None:
        try:
            piece = self.sock.recv(_PIECE_BYTES)
        except OSError as error:
            raise ChannelClosed(f"cannot receive: {error}") from error
        if not piece:
            raise ChannelClosed("the other end is closed")
        self._received += piece

    def _complete(self) -> Iterator[Message]:
        """Take the complete messages out of what has been received."""
        return iter(lambda: unpack(self._received), None)


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end, for a process that inherits it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs


def _head(name: str, payload: bytes) -> bytes:
    """What precedes the payload."""
    name_bytes = name.encode()
    _check_sizes(len(name_bytes), len(payload))
    return HEADER.pack(len(name_bytes), len(payload)) + name_bytes


def _check_sizes(num_name: int, num_payload: int) -> None:
    if num_name > MAX_NAME_BYTES:
        raise ValueError(f"a name of {num_name} bytes is above the limit of {MAX_NAME_BYTES}")
    if num_payload > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {num_payload} bytes is above {MAX_PAYLOAD_BYTES} (1 GiB)")
