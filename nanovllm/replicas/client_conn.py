"""The engine's side of a client connection: a non-blocking socket."""

from __future__ import annotations

import contextlib
import socket

from nanovllm.parallel.channel import Channel, ChannelClosed, Message, pack, unpack
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Outputs, RowTokens

PIECE_BYTES = 1 << 20  # after reading this much, other clients are served first
# If more numbers (tokens, log-probabilities) wait for a client, its largest answers end with an
# error. 256 answers of 32,768 tokens use half of it.
MAX_HELD_NUMBERS = 1 << 24


class ClientConn:
    """Collects the new tokens of a step and sends them as one message.

    While the client has not read earlier messages, its tokens are held here, one row per answer. So
    a slow client gets fewer and larger messages, and memory is bounded.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes ownership of the socket."""
        sock.setblocking(False)
        self._sock = sock
        self.answers: dict[int, int] = {}  # unfinished: the client's id -> the engine's
        self.media = b""  # for the next prompt
        self._received = bytearray()
        self._unsent = bytearray()
        self._ids: list[int] = []
        self._tokens: list[int] = []
        self._rows: list[RowTokens] = []
        self._held: dict[int, RowTokens] = {}
        self._held_sizes: dict[int, int] = {}  # numbers of each held row
        self._too_large: list[int] = []

    def fileno(self) -> int:
        """The socket's file descriptor, for selectors."""
        return self._sock.fileno()

    @property
    def is_waiting(self) -> bool:
        """Whether messages wait for the client to read earlier ones."""
        return bool(self._unsent)

    def add_token(self, request_id: int, token_id: int) -> None:
        """Collect an answer's new token that comes alone."""
        self._ids.append(request_id)
        self._tokens.append(token_id)

    def add_row(self, row: RowTokens) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        """Send the collected tokens, or hold them. Too many end the largest answers: see
        `take_too_large`. Raises ChannelClosed."""
        if not self._ids and not self._rows:
            return
        if self._unsent:
            self._hold()
        else:
            self._unsent += _packed(self._ids, self._tokens, self._rows)
            self.send_more()
        self._ids, self._tokens, self._rows = [], [], []

    def take_too_large(self) -> list[int]:
        """The answers that `flush` has ended since the last call, also ones that had finished."""
        found, self._too_large = self._too_large, []
        return found

    def send(self, name: str, payload: bytes) -> None:
        """Send a message, and keep what the socket does not accept now. Raises ChannelClosed."""
        self._unsent += pack(name, payload)
        self.send_more()

    def send_more(self) -> None:
        """Send waiting messages as far as the client reads. Raises ChannelClosed."""
        while self._unsent:
            try:
                num = self._sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed(f"cannot send: {error}") from error
            del self._unsent[:num]
            if not self._unsent and self._held:
                self._unsent += _packed([], [], list(self._held.values()))
                self._held, self._held_sizes = {}, {}

    def read(self) -> list[Message]:
        """Read the available bytes and return the complete messages. Raises ChannelClosed."""
        num_bytes = 0
        while num_bytes < PIECE_BYTES:
            try:
                piece = self._sock.recv(PIECE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise ChannelClosed(f"cannot receive: {error}") from error
            if not piece:
                raise ChannelClosed("the client has closed the connection")
            self._received += piece
            num_bytes += len(piece)
        return list(iter(lambda: unpack(self._received), None))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def _hold(self) -> None:
        """Merge collected tokens into the held rows. Above the limit the largest answers end."""
        rows = [RowTokens(*one) for one in zip(self._ids, ([token] for token in self._tokens))]
        sizes = self._held_sizes
        for row in rows + self._rows:
            num = len(row.token_ids) + sum(len(top or ()) for top in row.logprobs or ())
            sizes[row.request_id] = sizes.get(row.request_id, 0) + num
            if row.request_id in self._held:
                self._held[row.request_id].extend(row)
            else:
                # a copy: the engine continues to change its list
                row.token_ids = row.token_ids[:]
                self._held[row.request_id] = row
        num_held = sum(sizes.values())
        while num_held > MAX_HELD_NUMBERS:
            largest = max(sizes, key=sizes.__getitem__)
            error = ValueError(f"the client has not read {sizes[largest]} numbers of the answer")
            self._held[largest] = messages.failed(largest, error)
            num_held -= sizes[largest]
            sizes[largest] = 0
            self._too_large.append(largest)


class ParentConn(ClientConn):
    """The connection to the parent process, over its channel. A thread of the parent reads at any
    time, so the engine may block."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel.sock)
        channel.sock.setblocking(True)
        self._channel = channel

    def send_more(self) -> None:
        self._channel.send_packed(self._unsent)
        self._unsent.clear()

    def read(self) -> list[Message]:
        return self._channel.pending(wait=False)


def _packed(ids: list[int], tokens: list[int], rows: list[RowTokens]) -> bytes:
    """New tokens as a message. If it would be too large, each row becomes its own message; a row
    that is too large ends its answer with an error."""
    try:
        return pack(messages.OUTPUTS, messages.dump(Outputs(ids, tokens, rows)))
    except ValueError as error:
        if len(rows) > 1 or ids:
            singles = [_packed([], [], [row]) for row in rows]
            return b"".join([_packed(ids, tokens, []), *singles] if ids else singles)
        told = ValueError(f"a step has too many log-probabilities: {error}")
        return _packed([], [], [messages.failed(rows[0].request_id, told)])
