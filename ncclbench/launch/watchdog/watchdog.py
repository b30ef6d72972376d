"""The watchdog: no rank hangs, and whoever is missing is named.

Every rank runs one small thread beside the measurement. The threads speak over TCP connections of their own, a star
around rank 0, so they work also while all main threads sit inside a collective that will never return. A rank sends a
heartbeat with how far it is; a connection that closes without a goodbye is a rank that died; one that stays silent,
or whose progress stands still for longer than the case's limit, is a rank that hangs. Rank 0 collects signs for a
moment (a dead rank makes its peers fail too), names the culprit, stores the record, and frees everybody. If rank 0
itself dies or goes silent, rank 1 writes the record.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ncclbench.errors import EnvironmentFault, Exit
from ncclbench.launch.signals import SIGNALS
from ncclbench.launch.watchdog.attribution import BEAT_SECONDS, Ending, Fault, Sighting, judge
from ncclbench.launch.watchdog.heartbeat import Awake, Beat
from ncclbench.measure.timing_host import Progress
from ncclbench.store.records import Status
from ncclbench.topology.network_addresses import LOOPBACK, connect_first

# Magic, kind, rank, case, iteration, ticks, length of the text that follows.
_HEADER = struct.Struct("!4sBiiqqI")
_MAGIC = b"ncb1"
_TOKEN_BYTES = 16
_HELLO, _BEAT, _FAIL, _BYE, _ABORT = range(5)

# Signs of one fault arrive one after the other: the culprit's connection closes, then its peers fail.
_COLLECT_SECONDS = 0.7
# How long the others wait for rank 1 to write down that rank 0 is gone: a launcher ends the job with the first to end.
_TAKE_OVER_SECONDS = 2.0
# Of many ranks each waits before it says that a new stage begins, so that rank 0 hears about so many in a second.
_HEARD_A_SECOND = 2000
_FEW_RANKS = 64
# How long a rank with bad news waits for rank 0 to settle the matter.
_SETTLE_SECONDS = 10.0
# How long to leave a connection that cannot be taken in.
_REFUSED_SECONDS = 0.05
# For each of rank 0's addresses, before the next one is tried.
_CONNECT_SECONDS = 10.0


@dataclass
class _Peer:
    """One connection, and the bytes of a message not yet whole."""

    socket: socket.socket
    rank: int = -1
    received: bytearray = field(default_factory=bytearray)


class Watchdog:
    """One rank's end of the watch.

    Args:
        rank: this rank.
        world_size: how many there are.
        progress: what this rank's main thread keeps up to date.
        on_fault: stores the record, tells the user, and returns what this process ends in; called once, on rank 0,
            or on rank 1 if rank 0 is gone.
        neighbours: process ids of the ranks on this node, this one too. A rank that hangs cannot end itself.
        parent: process id of the one that started the ranks, which they do not outlive; 0 if it does not matter.
        trouble: asked at every heartbeat for an error that the library has had in the background.
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
        """Prepare; nothing is opened yet."""
        self.rank, self.world_size, self.progress, self.on_fault = rank, world_size, progress, on_fault
        self.limit = 60.0
        self._neighbours, self._parent, self._trouble = neighbours or {}, parent, trouble
        self._interval = BEAT_SECONDS * max(1.0, world_size / 256)
        self._ending = threading.Event()
        self._failure: tuple[Ending, str] | None = None
        self._last_word = float("inf")
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._token = b""

    def open(self, host: str) -> str:
        """On rank 0: listen, and return what the other ranks need to `join`.

        Args:
            host: names and addresses of this node, comma-separated, the likeliest first.
        """
        bind = LOOPBACK if host in (LOOPBACK, "localhost") else ""
        self._listener = socket.create_server((bind, 0), backlog=min(self.world_size, 4096))
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        return f"{host}|{self._listener.getsockname()[1]}|{self._token.hex()}"

    def join(self, where: str) -> None:
        """Start watching; `where` is what rank 0's `open` returned. The main thread of every rank calls this."""
        host, port, token = where.split("|")
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the wake-up descriptor below tells the thread, at once
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        if self.rank == 0:
            main: Callable[[], None] = self._serve
        else:
            link = self._reach(host.split(","), int(port))
            link.sendall(_encode(_HELLO, self.rank, self.progress, token))
            link.setblocking(False)
            self.progress.announce = self._wake
            main = lambda: self._follow(link)  # noqa: E731  the thread's body, bound to this connection
        self._thread = threading.Thread(target=main, name="watchdog", daemon=True)
        self._thread.start()

    def _reach(self, hosts: list[str], port: int) -> socket.socket:
        try:
            return connect_first(hosts, port, timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise EnvironmentFault(
                f"rank {self.rank} cannot reach rank 0 as {' or '.join(hosts)} on port {port} ({error}): see the "
                "firewall, or name rank 0's host in MASTER_ADDR on all ranks"
            ) from None

    def fail(self, how: Ending, message: str) -> None:
        """This rank cannot go on. Tells rank 0 and waits until the process is ended; returns only if nobody ends it."""
        self._failure = (how, message)
        self._wake()
        time.sleep(_SETTLE_SECONDS)

    def close(self) -> None:
        """The run is over, all ranks are here: stop watching."""
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

    def _heed_wakeups(self) -> None:
        """Read what woke the thread: a note from the main thread, or the number of a signal."""
        with contextlib.suppress(BlockingIOError):
            for number in self._wake_read.recv(64):
                if number in SIGNALS and self._failure is None:
                    self._failure = ("signal", f"interrupted by {signal.Signals(number).name}")

    def _heed_parent(self) -> None:
        """A rank does not outlive whoever started it; but first it says so, as after a signal."""
        if self._parent and os.getppid() != self._parent and self._failure is None:
            self._failure = ("signal", "interrupted: the launching process is gone")
            self._last_word = time.monotonic() + _SETTLE_SECONDS
        if time.monotonic() > self._last_word:
            end_process()

    def _heed_trouble(self) -> None:
        """An error in the background is this rank's failure, although its main thread waits on."""
        if self._trouble is None or self._failure is not None:
            return
        words = None
        with contextlib.suppress(Exception):  # a library that cannot be asked must not end the watch
            words = self._trouble()
        if words:
            self._failure = ("transport", f"rank {self.rank}: {words}")

    # Rank 0.

    def _serve(self) -> None:
        assert self._listener is not None
        selector = selectors.DefaultSelector()
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, None)
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        peers: dict[int, _Peer] = {}
        sightings = {0: Sighting(moved=time.monotonic())}
        verdict_due: float | None = None
        beat, awake = Beat(self._interval), Awake(self._interval)
        while True:
            news = self._take_in(selector, beat.wait(verdict_due), peers, sightings)
            now, beating = time.monotonic(), beat.is_due()
            _excuse(sightings, awake.missed(now))
            if not (beating or news or (verdict_due is not None and now >= verdict_due)):
                continue
            own = self.progress
            sightings[0].update(own.case, own.stage, own.iteration, own.ticks, now)
            self._heed_parent()
            self._heed_trouble()
            sightings[0].failure = self._failure
            if self._ending.is_set():
                _tell(peers, _BYE)
                return
            fault = judge(sightings, now, self.limit, self._interval)
            if fault is None:
                verdict_due = None
                if beating:
                    _tell(peers, _BEAT)
                continue
            verdict_due = verdict_due or now + _COLLECT_SECONDS
            if now >= verdict_due:
                self._settle(fault, peers)

    def _take_in(
        self, selector: selectors.BaseSelector, wait: float, peers: dict[int, _Peer], sightings: dict[int, Sighting]
    ) -> bool:
        """What arrives, for which it waits `wait` seconds; returns whether there is more among it than heartbeats."""
        assert self._listener is not None
        news = False
        for key, _ in selector.select(wait):
            if key.fileobj is self._listener:
                self._accept(selector)
            elif key.fileobj is self._wake_read:
                self._heed_wakeups()
                news = True
            else:
                news |= self._hear(key.data, peers, sightings, selector)
        return news

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        try:
            link, _address = self._listener.accept()
        except OSError:  # it came and went, or somebody holds all descriptors that this process may have
            time.sleep(_REFUSED_SECONDS)
            return
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, _Peer(link))

    def _hear(
        self, peer: _Peer, peers: dict[int, _Peer], sightings: dict[int, Sighting], selector: selectors.BaseSelector
    ) -> bool:
        """Note what a peer says; returns whether it is more than a heartbeat."""
        data = _receive(peer.socket)
        if data is None:
            return False
        if not data:
            selector.unregister(peer.socket)
            if peer.rank >= 0 and not sightings[peer.rank].left:
                sightings[peer.rank].lost = True
                return True
            return False
        peer.received += data
        news = False
        for kind, rank, case, iteration, ticks, text in _messages(peer.received):
            if peer.rank >= 0:
                _note(sightings[peer.rank], kind, case, iteration, ticks, text)
                news |= kind == _FAIL
            elif kind == _HELLO and secrets.compare_digest(text.encode(), self._token.hex().encode()):
                peer.rank, peers[rank], sightings[rank] = rank, peer, Sighting(moved=time.monotonic())
                if len(peers) == self.world_size - 1:  # nobody else has any business here
                    self._shut(selector)
            else:  # somebody who is not one of ours has found the port
                selector.unregister(peer.socket)
                peer.socket.close()
                return False
        return news

    def _shut(self, selector: selectors.BaseSelector) -> None:
        """Let nobody in any more."""
        assert self._listener is not None
        selector.unregister(self._listener)
        self._listener.close()

    def _settle(self, fault: Fault, peers: dict[int, _Peer]) -> None:
        """Store what happened, free the others, and end this process: its main thread may never return."""
        code = Exit.ENVIRONMENT
        try:
            code = self.on_fault(fault)
        except Exception as error:  # storing may fail too (a full disk); the ranks are freed all the same
            with contextlib.suppress(OSError):  # nobody may be left to read it
                print(f"ncclbench: error: {fault.reason}; and then: {error}", file=sys.stderr)
        hung = fault.ranks if fault.status == "timeout" else ()
        abort = _encode(_ABORT, 0, self.progress, ",".join(map(str, hung[:500])))
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.socket.settimeout(0.5)
                peer.socket.sendall(abort)
        self._kill_neighbours(hung)
        end_process(code)

    def _kill_neighbours(self, ranks: Iterable[int]) -> None:
        """End ranks of this job on this node that cannot end themselves: stopped, or lost in a driver."""
        for rank in ranks:
            if rank in self._neighbours and rank != self.rank:
                with contextlib.suppress(OSError):
                    os.kill(self._neighbours[rank], signal.SIGKILL)

    # The other ranks.

    def _follow(self, link: socket.socket) -> None:
        selector = selectors.DefaultSelector()
        selector.register(link, selectors.EVENT_READ)
        selector.register(self._wake_read, selectors.EVENT_READ)
        told, heard, beat = False, time.monotonic(), Beat(self._interval, self._gap())
        awake = Awake(self._interval)
        while True:
            for key, _ in selector.select(beat.wait()):
                if key.fileobj is self._wake_read:
                    self._heed_wakeups()
                    beat.soon()
                    continue
                heard = time.monotonic()
                if self._hub_has_spoken(link):
                    return
            now = time.monotonic()
            heard += awake.missed(now)
            if not (beat.is_due() or self._ending.is_set() or (self._failure and not told)):
                continue
            self._heed_parent()
            # Rank 0 finds silent ranks by itself; only its own silence must be found by the others.
            if now - heard > self.limit + self._interval:
                self._hub_is_gone("timeout", f"rank 0 has been silent for {now - heard:.0f} s")
            self._heed_trouble()
            # Both are read once: the main thread may set them while a heartbeat is on its way.
            ending, failure = self._ending.is_set(), self._failure
            told = self._report(link, ending, failure, told)
            if ending:
                return

    def _gap(self) -> float:
        """Seconds between heartbeats at least; of few ranks none, so that each is out before anything is timed."""
        return 0.0 if self.world_size <= _FEW_RANKS else self.world_size / _HEARD_A_SECOND

    def _report(self, link: socket.socket, ending: bool, failure: tuple[Ending, str] | None, told: bool) -> bool:
        """Send what there is to say; returns whether a failure has been told."""
        kind, text = _BEAT, self.progress.stage
        if ending:
            kind, text = _BYE, ""
        elif failure and not told:
            kind, text = _FAIL, "|".join(failure)
        try:
            link.sendall(_encode(kind, self.rank, self.progress, text))
        except BlockingIOError:
            return told
        except OSError:
            self._hub_is_gone()
        return told or bool(failure)

    def _hub_has_spoken(self, link: socket.socket) -> bool:
        """Whether rank 0 has said goodbye; ends the process if it has aborted the run or died."""
        data = _receive(link)
        if data is None:
            return False
        if not data:
            if self._ending.is_set():
                return True
            self._hub_is_gone()
        for kind, *_, text in _messages(bytearray(data or b"")):
            if kind == _ABORT:
                self._kill_neighbours(int(rank) for rank in text.split(",") if rank)
                end_process()
            if kind == _BYE:
                return True
        return False

    def _hub_is_gone(self, status: Status = "failed", what: str = "rank 0 died") -> None:
        """Rank 0 is not there any more: rank 1 writes it down, and everybody ends."""
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
        """Until it has written down what happened: for a while, and where it can be seen, no longer than it lives."""
        deadline = time.monotonic() + _TAKE_OVER_SECONDS
        while time.monotonic() < deadline and (1 not in self._neighbours or _lives(self._neighbours[1])):
            time.sleep(0.05)


def _lives(process: int) -> bool:
    """Whether a process of this node has not ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _excuse(sightings: Mapping[int, Sighting], seconds: float) -> None:
    """Nobody listened for that long."""
    for sighting in sightings.values():
        sighting.moved += seconds
        sighting.heard += seconds


def _receive(link: socket.socket) -> bytes | None:
    """What has arrived: None if nothing yet, empty if the other end is gone."""
    try:
        return link.recv(65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _note(sighting: Sighting, kind: int, case: int, iteration: int, ticks: int, text: str) -> None:
    now = time.monotonic()
    sighting.update(case, text if kind == _BEAT else sighting.stage, iteration, ticks, now)
    if kind == _BYE:
        sighting.left = True
    elif kind == _FAIL:
        how, _, message = text.partition("|")
        endings: dict[str, Ending] = {"raised": "raised", "transport": "transport", "signal": "signal"}
        sighting.failure = (endings[how], message)


def _tell(peers: dict[int, _Peer], kind: int) -> None:
    """A word from rank 0 to all; one who does not listen is found out by his silence, not here."""
    message = _encode(kind, 0, Progress(), "")
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.socket.sendall(message)


def _encode(kind: int, rank: int, progress: Progress, text: str) -> bytes:
    raw = text.encode()[:4096]
    header = _HEADER.pack(_MAGIC, kind, rank, progress.case, progress.iteration, progress.ticks, len(raw))
    return header + raw


def _messages(received: bytearray) -> "list[tuple[int, int, int, int, int, str]]":
    """Take the whole messages off the front of `received`; anything that is not ours empties it."""
    found = []
    while len(received) >= _HEADER.size:
        magic, kind, rank, case, iteration, ticks, length = _HEADER.unpack_from(received)
        if magic != _MAGIC or length > 4096:
            received.clear()
            break
        if len(received) < _HEADER.size + length:
            break
        text = bytes(received[_HEADER.size : _HEADER.size + length]).decode(errors="replace")
        del received[: _HEADER.size + length]
        found.append((kind, rank, case, iteration, ticks, text))
    return found


def end_process(code: Exit = Exit.ENVIRONMENT) -> None:
    """End at once, whatever the main thread is doing; what was printed is out."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
