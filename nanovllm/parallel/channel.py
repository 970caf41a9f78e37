"""Messages between two processes over a private socket pair: no port, no name, no pickle."""

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
_PIECE_BYTES = 1 << 20  # maximum size of one read

Message = tuple[str, bytes]  # a name and a payload


class ChannelClosed(ConnectionError):
    """The process at the other end has ended or closed its end."""


def pack(name: str, payload: bytes = b"") -> bytes:
    """A message as bytes. Raises ValueError for a name above 1 KiB or a payload above 1 GiB."""
    return _head(name, payload) + payload


def unpack(received: bytearray) -> Message | None:
    """Remove and return the first message in a buffer; None if it is incomplete."""
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
    """One end of a connected socket pair (AF_UNIX) that sends and receives messages.

    Several threads may send; one thread may receive.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes ownership of the socket."""
        sock.setblocking(True)
        self.sock = sock
        self._received = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's file descriptor, for selectors."""
        return self.sock.fileno()

    def send(self, name: str, payload: bytes = b"") -> None:
        """Send a message. Blocks only if the other end has not read earlier messages.

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
        """Send messages packed by `pack`."""
        try:
            with self._sending:
                self.sock.sendall(messages)
        except OSError as error:
            raise ChannelClosed(f"cannot send: {error}") from error

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed, or ValueError for an invalid or too
        large message."""
        while (message := unpack(self._received)) is None:
            self._read()
        return message

    def receive_available(self) -> Iterator[Message]:
        """Read what is available (there must be something) and yield the complete messages. Never
        waits for the rest of a message. Raises as `receive` does."""
        self._read()
        yield from self._complete()

    def pending(self, *, wait: bool) -> list[Message]:
        """The complete messages; with `wait`, at least one. Raises as `receive` does.

        Unlike `receive_available` it may be used after `receive`.
        """
        found = list(self._complete())
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while (wait and not found) or poll.poll(0):
            self._read()
            found += self._complete()
        return found

    def shut_down(self) -> None:
        """End the connection: threads that send or receive here get ChannelClosed."""
        with contextlib.suppress(OSError):  # already ended
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
        """Remove and return the complete messages of the buffer."""
        return iter(lambda: unpack(self._received), None)


def channel_pair() -> tuple[Channel, socket.socket]:
    """A channel, and the socket of its other end for a process to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs


def _head(name: str, payload: bytes) -> bytes:
    """The bytes before the payload."""
    name_bytes = name.encode()
    _check_sizes(len(name_bytes), len(payload))
    return HEADER.pack(len(name_bytes), len(payload)) + name_bytes


def _check_sizes(num_name: int, num_payload: int) -> None:
    if num_name > MAX_NAME_BYTES:
        raise ValueError(f"a name of {num_name} bytes is above the limit of {MAX_NAME_BYTES}")
    if num_payload > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {num_payload} bytes is above {MAX_PAYLOAD_BYTES} (1 GiB)")
