"""Messages between watchdogs: a fixed header and a short text, over one TCP connection per rank.

The header holds a magic number, the kind of message, the rank, and how far that rank is: case, iteration, ticks.
"""

import socket
import struct
from enum import IntEnum
from typing import NamedTuple

from ncclbench.launch.watchdog.attribution import Ending, RankStatus
from ncclbench.measure.timing_host import Progress

MAGIC = b"ncb1"
# Magic, kind, rank, case, iteration, ticks, bytes of the text that follows.
HEADER = struct.Struct("!4sBiiqqI")
MAX_TEXT_BYTES = 4096


class Kind(IntEnum):
    """What a message says."""

    HELLO = 0
    """A rank joins; the text is the token of the run."""
    HEARTBEAT = 1
    """The text is the stage that the rank is in."""
    FAILURE = 2
    """The rank cannot continue; the text is the `Ending`, a bar, and the error."""
    GOODBYE = 3
    """The rank has finished, or rank 0 ends the watch."""
    ABORT = 4
    """Rank 0 ends the run; the text lists the ranks that hang, separated by commas."""


class Message(NamedTuple):
    """One message, decoded."""

    kind: int
    rank: int
    case: int
    iteration: int
    ticks: int
    text: str


def encode(kind: Kind, rank: int, progress: Progress, text: str) -> bytes:
    """One message; a text over `MAX_TEXT_BYTES` is cut."""
    raw = text.encode()[:MAX_TEXT_BYTES]
    return HEADER.pack(MAGIC, kind, rank, progress.case, progress.iteration, progress.ticks, len(raw)) + raw


def take_messages(received: bytearray) -> list[Message]:
    """Remove the whole messages from the front of `received` and return them.

    Bytes that do not begin with a valid header empty the buffer.
    """
    found = []
    while len(received) >= HEADER.size:
        magic, kind, rank, case, iteration, ticks, length = HEADER.unpack_from(received)
        if magic != MAGIC or length > MAX_TEXT_BYTES:
            received.clear()
            break
        if len(received) < HEADER.size + length:
            break
        text = bytes(received[HEADER.size : HEADER.size + length]).decode(errors="replace")
        del received[: HEADER.size + length]
        found.append(Message(kind, rank, case, iteration, ticks, text))
    return found


def receive(link: socket.socket) -> bytes | None:
    """What has arrived on a non-blocking socket: None if nothing yet, empty if the other end is closed."""
    try:
        return link.recv(65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def apply_message(status: RankStatus, message: Message, now: float) -> None:
    """Update what is known of a rank by its message, which arrived at `now`."""
    stage = message.text if message.kind == Kind.HEARTBEAT else status.stage
    status.update(message.case, stage, message.iteration, message.ticks, now)
    if message.kind == Kind.GOODBYE:
        status.left = True
    elif message.kind == Kind.FAILURE:
        how, _, text = message.text.partition("|")
        endings: dict[str, Ending] = {"raised": "raised", "transport": "transport", "signal": "signal"}
        status.failure = (endings[how], text)
