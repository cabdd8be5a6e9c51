"""The messages between an engine and the processes that follow grammars for it, and what these may take.

Without llguidance and numpy.
"""

import select
import socket
import struct
from typing import NamedTuple

HEAD = struct.Struct("<BIII")  # kind, matcher, MiB that the process has taken, bytes that follow
ASK = struct.Struct("<BII")  # kind, matcher, token

READY, MASK, TAKEN, ENDED, FAILED, DIED = range(6)  # to the engine
OPEN, ACCEPT, CLOSE = range(3)  # from it

MOST_MIB = 192  # of a grammar, and of each output that follows it
TOKEN_S = 0.5  # of processor time, for one token
MEAN_TOKEN_S = 0.01  # for all tokens of an output, beside TOKEN_S once


class Frame(NamedTuple):
    """One message to the engine."""

    kind: int
    matcher: int
    mib: int
    data: bytes


def write_frame(link: socket.socket, kind: int, matcher: int = 0, data: bytes = b"", mib: int = 0) -> None:
    """Send one message; raises OSError if nobody reads any more."""
    link.sendall(HEAD.pack(kind, matcher, mib, len(data)) + data)


def read_frame(link: socket.socket) -> Frame | None:
    """The next message; None at the end."""
    head = read_exactly(link, HEAD.size)
    if head is None:
        return None
    kind, matcher, mib, length = HEAD.unpack(head)
    data = read_exactly(link, length)
    return None if data is None else Frame(kind, matcher, mib, data)


def has_come(link: socket.socket) -> bool:
    """Whether something can be read, or has ended. (`select` knows no descriptor above 1023.)"""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(0))


def read_exactly(link: socket.socket, count: int) -> bytes | None:
    """So many bytes; None if they end before."""
    found = bytearray()
    while len(found) < count:
        try:
            piece = link.recv(count - len(found))
        except OSError:
            return None
        if not piece:
            return None
        found += piece
    return bytes(found)
