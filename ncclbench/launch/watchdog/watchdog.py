"""The watchdog: it ends a run whose ranks died or hang, and names those ranks.

Every rank runs one thread beside the measurement. Each thread has a TCP connection to the thread of rank 0, apart from
the measured communicators, so the watchdog works also while all main threads wait in a collective that never returns.

- A rank sends heartbeats that tell its progress.
- A connection that closes without a goodbye means that the rank died.
- A rank that is silent, or makes no progress for longer than the limit of the case, hangs.

A dead rank makes its peers fail too, so rank 0 collects signs for a moment before it attributes the fault. It then
stores the record and ends the other ranks. If rank 0 itself dies or is silent, rank 1 stores the record.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ncclbench.errors import EnvironmentFault, Exit
from ncclbench.launch.signals import SIGNALS
from ncclbench.launch.watchdog.attribution import BEAT_SECONDS, Ending, Fault, RankStatus, attribute_fault
from ncclbench.launch.watchdog.heartbeat import Heartbeat, SuspendDetector
from ncclbench.launch.watchdog.protocol import Kind, apply_message, encode, receive, take_messages
from ncclbench.measure.timing_host import Progress
from ncclbench.store.records import Status
from ncclbench.topology.network_addresses import LOOPBACK, connect_first

_TOKEN_BYTES = 16
# Signs of one fault arrive one after the other: a connection closes, then its peers fail.
_COLLECT_SECONDS = 0.7
# How long the other ranks wait for rank 1 to store that rank 0 is gone: the first process that ends ends the job.
_TAKE_OVER_SECONDS = 2.0
# In large jobs a rank delays the news of a new stage, so that rank 0 receives about this many messages per second.
_MESSAGES_PER_SECOND = 2000
_FEW_RANKS = 64
# How long a rank that failed waits for rank 0 to end the run.
SETTLE_SECONDS = 10.0
# Pause after a connection that could not be accepted.
_ACCEPT_RETRY_SECONDS = 0.05
# Time limit per address of rank 0, before the next one is tried.
_CONNECT_SECONDS = 10.0


@dataclass
class _Peer:
    """One connection, and the bytes of an incomplete message."""

    socket: socket.socket
    rank: int = -1
    received: bytearray = field(default_factory=bytearray)


class Watchdog:
    """The watchdog of one rank.

    Args:
        rank: this rank.
        world_size: number of ranks.
        progress: kept up to date by the main thread of this rank.
        on_fault: stores the record, shows the error, and returns the exit code. Called once, on rank 0, or on rank 1 if
            rank 0 is gone.
        neighbours: process ids of the ranks on this node, this one included. A rank that hangs cannot end itself.
        parent: process id of the launcher, which ranks do not outlive; 0 if there is none to watch.
        trouble: called at every heartbeat; returns an error that the library had in the background, or None.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        progress: Progress,
        on_fault: Callable[[Fault], Exit],
        neighbours: Mapping[int, int] | None = None,
        parent: int = 0,
        trouble: Callable[[], str | None] | None = None,
    ) -> None:
        """Open nothing yet."""
        self.rank, self.world_size, self.progress, self.on_fault = rank, world_size, progress, on_fault
        self.limit = 60.0
        self._neighbours, self._parent, self._trouble = neighbours or {}, parent, trouble
        self.interval = BEAT_SECONDS * max(1.0, world_size / 256)
        self._ending = threading.Event()
        self._failure: tuple[Ending, str] | None = None
        self._end_by = float("inf")
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._token = b""

    def open(self, host: str) -> str:
        """On rank 0: listen, and return the text that the other ranks pass to `join`.

        Args:
            host: names and addresses of this node, separated by commas, the likeliest first.
        """
        bind = LOOPBACK if host in (LOOPBACK, "localhost") else ""
        self._listener = socket.create_server((bind, 0), backlog=min(self.world_size, 4096))
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        return f"{host}|{self._listener.getsockname()[1]}|{self._token.hex()}"

    def join(self, where: str) -> None:
        """Start the thread. Called by the main thread of every rank, with what `open` returned on rank 0."""
        host, port, token = where.split("|")
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the wake-up descriptor below wakes the thread
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        if self.rank == 0:
            main: Callable[[], None] = self._serve
        else:
            link = self._connect(host.split(","), int(port))
            link.sendall(encode(Kind.HELLO, self.rank, self.progress, token))
            link.setblocking(False)
            self.progress.announce = self._wake
            main = lambda: self._follow(link)  # noqa: E731  the thread's body, bound to this connection
        self._thread = threading.Thread(target=main, name="watchdog", daemon=True)
        self._thread.start()

    def _connect(self, hosts: list[str], port: int) -> socket.socket:
        try:
            return connect_first(hosts, port, timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise EnvironmentFault(
                f"rank {self.rank} cannot reach rank 0 as {' or '.join(hosts)} on port {port} ({error}): see the "
                "firewall, or name rank 0's host in MASTER_ADDR on all ranks"
            ) from None

    def fail(self, how: Ending, message: str) -> None:
        """Report a failure of this rank, and wait for the end of the process; return if rank 0 does not end it."""
        self._failure = (how, message)
        self._wake()
        time.sleep(SETTLE_SECONDS)

    def close(self) -> None:
        """Stop the watchdog: the run is over on all ranks."""
        if self._thread is None:
            return
        signal.set_wakeup_fd(-1)
        self._ending.set()
        self._wake()
        self._thread.join(timeout=5)
        self._thread = None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _read_wakeups(self) -> None:
        """Read the bytes that woke the thread: zero from the main thread, or the number of a signal."""
        with contextlib.suppress(BlockingIOError):
            for number in self._wake_read.recv(64):
                if number in SIGNALS and self._failure is None:
                    self._failure = ("signal", f"interrupted by {signal.Signals(number).name}")

    def _check_parent(self) -> None:
        """If the launching process is gone, report it as an interruption, and end if rank 0 does not."""
        if self._parent and os.getppid() != self._parent and self._failure is None:
            self._failure = ("signal", "interrupted: the launching process is gone")
            self._end_by = time.monotonic() + SETTLE_SECONDS
        if time.monotonic() > self._end_by:
            end_process()

    def _check_library(self) -> None:
        """Report an error that the library had in the background, while the main thread still waits."""
        if self._trouble is None or self._failure is not None:
            return
        error = None
        with contextlib.suppress(Exception):  # a library that cannot answer must not end the watchdog
            error = self._trouble()
        if error:
            self._failure = ("transport", f"rank {self.rank}: {error}")

    # Rank 0.

    def _serve(self) -> None:
        assert self._listener is not None
        selector = selectors.DefaultSelector()
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, None)
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        peers: dict[int, _Peer] = {}
        statuses = {0: RankStatus(moved=time.monotonic())}
        attribution_due: float | None = None
        heartbeat, suspend = Heartbeat(self.interval), SuspendDetector(self.interval)
        while True:
            news = self._receive_all(selector, heartbeat.wait(attribution_due), peers, statuses)
            now, beating = time.monotonic(), heartbeat.is_due()
            _shift(statuses, suspend.missed(now))
            if not (beating or news or (attribution_due is not None and now >= attribution_due)):
                continue
            own = self.progress
            statuses[0].update(own.case, own.stage, own.iteration, own.ticks, now)
            self._check_parent()
            self._check_library()
            statuses[0].failure = self._failure
            if self._ending.is_set():
                _send_to_all(peers, Kind.GOODBYE)
                return
            fault = attribute_fault(statuses, now, self.limit, self.interval)
            if fault is None:
                attribution_due = None
                if beating:
                    _send_to_all(peers, Kind.HEARTBEAT)
                continue
            attribution_due = attribution_due or now + _COLLECT_SECONDS
            if now >= attribution_due:
                self._end_run(fault, peers)

    def _receive_all(
        self, selector: selectors.BaseSelector, wait: float, peers: dict[int, _Peer], statuses: dict[int, RankStatus]
    ) -> bool:
        """Wait up to `wait` seconds and process what arrives; return whether it was more than heartbeats."""
        assert self._listener is not None
        news = False
        for key, _ in selector.select(wait):
            if key.fileobj is self._listener:
                self._accept(selector)
            elif key.fileobj is self._wake_read:
                self._read_wakeups()
                news = True
            else:
                news |= self._receive_from(key.data, peers, statuses, selector)
        return news

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        try:
            link, _address = self._listener.accept()
        except OSError:  # the connection is gone again, or this process has no descriptor left
            time.sleep(_ACCEPT_RETRY_SECONDS)
            return
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, _Peer(link))

    def _receive_from(
        self, peer: _Peer, peers: dict[int, _Peer], statuses: dict[int, RankStatus], selector: selectors.BaseSelector
    ) -> bool:
        """Process what one peer sent; return whether it was more than a heartbeat."""
        data = receive(peer.socket)
        if data is None:
            return False
        if not data:
            selector.unregister(peer.socket)
            if peer.rank >= 0 and not statuses[peer.rank].left:
                statuses[peer.rank].lost = True
                return True
            return False
        peer.received += data
        news = False
        for message in take_messages(peer.received):
            if peer.rank >= 0:
                apply_message(statuses[peer.rank], message, time.monotonic())
                news |= message.kind == Kind.FAILURE
            elif message.kind == Kind.HELLO and secrets.compare_digest(
                message.text.encode(), self._token.hex().encode()
            ):
                rank = message.rank
                peer.rank, peers[rank], statuses[rank] = rank, peer, RankStatus(moved=time.monotonic())
                if len(peers) == self.world_size - 1:  # all ranks have joined
                    self._stop_listening(selector)
            else:  # a connection that is not from a rank of this run
                selector.unregister(peer.socket)
                peer.socket.close()
                return False
        return news

    def _stop_listening(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        selector.unregister(self._listener)
        self._listener.close()

    def _end_run(self, fault: Fault, peers: dict[int, _Peer]) -> None:
        """Store the fault, end the other ranks, and end this process: its main thread may never return."""
        code = Exit.ENVIRONMENT
        try:
            code = self.on_fault(fault)
        except Exception as error:  # storing may fail too (a full disk); the ranks are ended all the same
            with contextlib.suppress(OSError):  # stderr may be closed
                print(f"ncclbench: error: {fault.reason}; and then: {error}", file=sys.stderr)
        hung = fault.ranks if fault.status == "timeout" else ()
        abort = encode(Kind.ABORT, 0, self.progress, ",".join(map(str, hung[:500])))
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.socket.settimeout(0.5)
                peer.socket.sendall(abort)
        self._kill_neighbours(hung)
        end_process(code)

    def _kill_neighbours(self, ranks: Iterable[int]) -> None:
        """Kill ranks of this job on this node that cannot end themselves: stopped, or blocked in a driver."""
        for rank in ranks:
            if rank in self._neighbours and rank != self.rank:
                with contextlib.suppress(OSError):
                    os.kill(self._neighbours[rank], signal.SIGKILL)

    # The other ranks.

    def _follow(self, link: socket.socket) -> None:
        selector = selectors.DefaultSelector()
        selector.register(link, selectors.EVENT_READ)
        selector.register(self._wake_read, selectors.EVENT_READ)
        told, heard, heartbeat = False, time.monotonic(), Heartbeat(self.interval, self._gap())
        suspend = SuspendDetector(self.interval)
        while True:
            for key, _ in selector.select(heartbeat.wait()):
                if key.fileobj is self._wake_read:
                    self._read_wakeups()
                    heartbeat.soon()
                    continue
                heard = time.monotonic()
                if self._rank_0_said_goodbye(link):
                    return
            now = time.monotonic()
            heard += suspend.missed(now)
            if not (heartbeat.is_due() or self._ending.is_set() or (self._failure and not told)):
                continue
            self._check_parent()
            # Rank 0 finds silent ranks. The other ranks only check rank 0.
            if now - heard > self.limit + self.interval:
                self._end_without_rank_0("timeout", f"rank 0 has been silent for {now - heard:.0f} s")
            self._check_library()
            # Both are read once: the main thread may set them while a heartbeat is being sent.
            ending, failure = self._ending.is_set(), self._failure
            told = self._report(link, ending, failure, told)
            if ending:
                return

    def _gap(self) -> float:
        """The fewest seconds between heartbeats. In small jobs 0, so that each is sent before anything is timed."""
        return 0.0 if self.world_size <= _FEW_RANKS else self.world_size / _MESSAGES_PER_SECOND

    def _report(self, link: socket.socket, ending: bool, failure: tuple[Ending, str] | None, told: bool) -> bool:
        """Send a heartbeat, failure or goodbye; return whether a failure has been reported."""
        kind, text = Kind.HEARTBEAT, self.progress.stage
        if ending:
            kind, text = Kind.GOODBYE, ""
        elif failure and not told:
            kind, text = Kind.FAILURE, "|".join(failure)
        try:
            link.sendall(encode(kind, self.rank, self.progress, text))
        except BlockingIOError:
            return told
        except OSError:
            self._end_without_rank_0()
        return told or bool(failure)

    def _rank_0_said_goodbye(self, link: socket.socket) -> bool:
        """Whether rank 0 said goodbye; end this process if rank 0 aborted the run or died."""
        data = receive(link)
        if data is None:
            return False
        if not data:
            if self._ending.is_set():
                return True
            self._end_without_rank_0()
        for kind, *_, text in take_messages(bytearray(data or b"")):
            if kind == Kind.ABORT:
                self._kill_neighbours(int(rank) for rank in text.split(",") if rank)
                end_process()
            if kind == Kind.GOODBYE:
                return True
        return False

    def _end_without_rank_0(self, status: Status = "failed", what: str = "rank 0 died") -> None:
        """Rank 0 is gone: rank 1 stores that, and this rank ends."""
        code = Exit.ENVIRONMENT
        if self.rank == 1:
            with contextlib.suppress(Exception):
                where = f"{what} (rank 1 was in {self.progress.stage})"
                code = self.on_fault(Fault(status, (0,), where, self.progress.case))
        else:
            self._wait_for_rank_1()
        self._kill_neighbours([0] if status == "timeout" else [])
        end_process(code)

    def _wait_for_rank_1(self) -> None:
        """Wait for rank 1 to store the fault; if rank 1 is on this node, only while it lives."""
        deadline = time.monotonic() + _TAKE_OVER_SECONDS
        while time.monotonic() < deadline and (1 not in self._neighbours or is_alive(self._neighbours[1])):
            time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Whether a process of this node runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _shift(statuses: Mapping[int, RankStatus], seconds: float) -> None:
    """Ignore a time in which this process was suspended."""
    for status in statuses.values():
        status.moved += seconds
        status.heard += seconds


def _send_to_all(peers: dict[int, _Peer], kind: Kind) -> None:
    """Send a message without text from rank 0 to all; a rank that does not read is found by its silence."""
    message = encode(kind, 0, Progress(), "")
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.socket.sendall(message)


def end_process(code: Exit = Exit.ENVIRONMENT) -> None:
    """End this process at once, whatever its main thread does; printed output is flushed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
