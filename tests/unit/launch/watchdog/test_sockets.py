"""Watchdogs of one job as threads of one process: when they send, and how soon a fault arrives."""

import errno
import gc
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ncclbench.errors import Exit
from ncclbench.launch.watchdog import heartbeat, protocol, watchdog
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.measure.timing_host import Progress
from ncclbench.topology.network_addresses import connect_first


class Watch:
    """Watchdogs of one job in this process: the messages they sent, and the faults they found."""

    def __init__(self, ranks: int, interval: float, patch: pytest.MonkeyPatch, of: int = 0) -> None:
        self.links: list[socket.socket] = []
        self.said: list[tuple[int, int]] = []
        self.words: list[str] = []
        self.faults: list[Fault] = []
        patch.setattr(watchdog, "encode", self._encode)
        patch.setattr(watchdog, "end_process", self._end)
        patch.setattr(watchdog, "connect_first", self._connect)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(signal, "set_wakeup_fd", lambda *_, **__: -1)
        self.dogs = [watchdog.Watchdog(rank, ranks, Progress(), self._found) for rank in range(ranks)]
        where = self.dogs[0].open("127.0.0.1")
        self.address = ("127.0.0.1", int(where.split("|")[1]))
        for dog in self.dogs:
            dog.interval, dog.world_size = interval, of or ranks
            dog.join(where)

    def _encode(self, kind: int, rank: int, *rest: Any, honest: Any = protocol.encode) -> bytes:
        self.said.append((kind, rank))
        self.words.append(rest[-1])
        return bytes(honest(kind, rank, *rest))

    def _found(self, fault: Fault) -> Exit:
        self.faults.append(fault)
        return Exit.ENVIRONMENT

    def _connect(self, *rest: Any, honest: Any = connect_first, **named: Any) -> socket.socket:
        self.links.append(honest(*rest, **named))
        return self.links[-1]

    def _end(self, *_: object) -> None:
        sys.exit()  # of the thread alone

    def close(self) -> None:
        for dog in reversed(self.dogs):
            dog.close()

    def beats(self) -> Counter[int]:
        return Counter(rank for kind, rank in self.said if kind == protocol.Kind.HEARTBEAT)


# Ending a process is ending a thread here, by an exception that keeps its sockets for a while.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def eventually(is_so: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 20.0
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(is_so())


Watching = Callable[..., Watch]


def open_sockets() -> list[socket.socket]:
    # By its type: asked for its class, some of torch's objects warn.
    return [one for one in gc.get_objects() if issubclass(type(one), socket.socket) and one.fileno() >= 0]


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    begun, others = [], {id(one) for one in open_sockets()}

    def begin(ranks: int, interval: float, of: int = 0) -> Watch:
        begun.append(Watch(ranks, interval, monkeypatch, of))
        return begun[-1]

    yield begin
    for watch in begun:
        watch.close()
    for one in open_sockets():  # a process's end closes them; here there is none
        if id(one) not in others:
            one.close()


def test_heartbeats_follow_the_clock_and_are_not_answered(watching: Watching) -> None:
    """Regression: ranks answered each other, thousands of messages per second beside the measurement."""
    begun = time.monotonic()
    watch = watching(4, 0.1)
    time.sleep(1.5)
    watch.close()
    due = (time.monotonic() - begun) / 0.1 + 1
    beats = watch.beats()
    assert set(beats) == {0, 1, 2, 3}
    assert max(beats.values()) <= due
    assert min(beats.values()) >= 3  # of 15, however busy the machine
    assert Counter(rank for kind, rank in watch.said if kind == protocol.Kind.GOODBYE) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert not watch.faults


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_a_failure_does_not_wait_for_a_heartbeat(how: str, watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SETTLE_SECONDS", 0.0)
    watch = watching(3, 3600.0)
    if how == "fails":
        watch.dogs[2].fail("raised", "ValueError: no")
    else:
        watch.links[1].shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: watch.faults)
    (fault,) = watch.faults
    assert fault.ranks == (2,)


@pytest.mark.parametrize(("ranks", "gap"), [(2, 0.0), (400, 0.2)])
def test_a_new_stage_is_sent_before_the_next_heartbeat(ranks: int, gap: float, watching: Watching) -> None:
    """In large jobs the news is delayed a little, and still sent."""
    watch = watching(2, 3600.0, of=ranks)
    assert eventually(lambda: watch.beats()[1] == 1)
    time.sleep(2 * gap)
    begun = time.monotonic()
    for stage in range(20):
        watch.dogs[1].progress.enter(f"stage {stage}")
        assert gap or eventually(lambda stage=stage: watch.beats()[1] == 2 + stage)  # type: ignore[misc]
        time.sleep(0.003)
    took = time.monotonic() - begun
    assert eventually(lambda: watch.words[-1] == "stage 19")
    assert not gap or watch.beats()[1] <= 3 + took / gap


def test_a_suspended_job_has_no_fault(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks stop for longer than the limit and continue. Regression: rank 1 named rank 0."""
    monkeypatch.setattr(heartbeat, "SUSPENDED_SECONDS", 0.2)
    stopping, stopped = threading.Event(), set()

    def select(self: Any, wait: float | None = None, honest: Any = selectors.DefaultSelector.select) -> Any:
        if stopping.is_set() and threading.get_ident() not in stopped:
            stopped.add(threading.get_ident())
            time.sleep(2.0)
            return []  # nothing was sent meanwhile
        return honest(self, wait)

    monkeypatch.setattr(selectors.DefaultSelector, "select", select)
    watch = watching(2, 0.1)
    for dog in watch.dogs:
        dog.limit, dog.progress.case = 1.0, 0
    assert eventually(lambda: watch.beats()[1] > 2)
    stopping.set()
    assert eventually(lambda: len(stopped) == 2)
    beats = watch.beats()
    assert eventually(lambda: watch.faults or watch.beats()[1] > beats[1] + 3)
    assert not watch.faults


def accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_port_is_closed_once_all_ranks_have_joined(watching: Watching) -> None:
    address = watching(3, 0.1).address
    assert eventually(lambda: not accepts(address))


def test_a_connection_that_cannot_be_accepted_is_ignored(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another connection holds all descriptors of rank 0."""
    watch = watching(2, 0.1, of=3)
    assert eventually(lambda: watch.beats()[1] > 1)
    refused: list[int] = []

    def accept(_self: socket.socket) -> None:
        refused.append(errno.EMFILE)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        stranger = socket.create_connection(watch.address)
        assert eventually(lambda: len(refused) > 2)
        beats = watch.beats()
        assert eventually(lambda: watch.beats()[0] > beats[0] + 2 and watch.beats()[1] > beats[1] + 2)
    stranger.close()
    assert not watch.faults


def test_bytes_from_a_foreign_connection_are_ignored(watching: Watching) -> None:
    """Regression: bytes that are not ASCII ended the watchdog of rank 0, and with it the run."""
    watch = watching(2, 0.1, of=3)  # one rank has not joined yet
    header = protocol.HEADER.pack(protocol.MAGIC, protocol.Kind.HELLO, 2, 0, 0, 0, 32)
    for said in (header + b"\xff\xfe" + b"0" * 30, header + b"0" * 32, b"GET / HTTP/1.1\r\n\r\n", header[:9], b""):
        with socket.create_connection(watch.address) as stranger:
            stranger.sendall(said)
    beats = watch.beats()
    assert eventually(lambda: watch.beats()[0] > beats[0] + 2 and watch.beats()[1] > beats[1] + 2)
    assert not watch.faults
