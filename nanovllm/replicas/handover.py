"""Gives the clients of replicas new sockets, after a replica has been started again.

The replicas' parent has a socket to each client. Its end is the end of all replicas.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_INDEX = struct.Struct("<I")


@contextmanager
def new_sockets(clients: Sequence[socket.socket], index: int) -> Iterator[list[int]]:
    """The descriptors for a replica that is started within; its clients get the other ends."""
    pairs = [socket.socketpair() for _ in clients]
    try:
        yield [theirs.fileno() for _, theirs in pairs]
        for client, (ours, _) in zip(clients, pairs):
            with contextlib.suppress(OSError):  # the client has ended
                socket.send_fds(client, [_INDEX.pack(index)], [ours.fileno()])
    finally:
        for pair in pairs:
            for one in pair:
                one.close()


def take(parent: socket.socket) -> tuple[int, socket.socket] | None:
    """A client's next socket, and the index of its replica; None after the parent's end."""
    try:
        data, descriptors, _, _ = socket.recv_fds(parent, _INDEX.size, 1)
    except OSError:
        return None
    if not descriptors:
        return None
    return _INDEX.unpack(data)[0], socket.socket(fileno=descriptors[0])
