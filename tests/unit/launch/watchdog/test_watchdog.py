"""Fault attribution for every kind of rank status, and messages that arrive in pieces or damaged."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.launch.watchdog import protocol, watchdog
from ncclbench.launch.watchdog.attribution import Ending, Fault, RankStatus, attribute_fault
from ncclbench.launch.watchdog.protocol import Kind, Message
from ncclbench.measure.timing_host import Progress

LIMIT = 30.0
NOW = 1000.0


def well(case: int = 3, ticks: int = 100, stage: str = "timed", iteration: int = 40) -> RankStatus:
    """A rank that was heard just now and makes progress."""
    return RankStatus(case=case, stage=stage, iteration=iteration, ticks=ticks, moved=NOW - 1, heard=NOW - 0.4)


def dead() -> RankStatus:
    status = well()
    status.lost = True
    return status


def said(how: Ending, message: str) -> RankStatus:
    status = well()
    status.failure = (how, message)
    return status


def silent(seconds: float = LIMIT + 2) -> RankStatus:
    status = well()
    status.heard = status.moved = NOW - seconds
    return status


def stuck(ticks: int = 100, seconds: float = LIMIT + 2, heard: float = 0.3) -> RankStatus:
    """A rank that sends heartbeats and makes no progress."""
    status = well(ticks=ticks)
    status.moved, status.heard = NOW - seconds, NOW - heard
    return status


def verdict(**statuses: RankStatus) -> Fault:
    fault = attribute_fault({int(name[1:]): status for name, status in statuses.items()}, NOW, LIMIT)
    assert fault is not None
    assert fault.case == 3
    assert "\n" not in fault.reason
    return fault


def test_no_fault_while_all_ranks_are_well() -> None:
    assert attribute_fault({r: well() for r in range(4)}, NOW, LIMIT) is None
    assert attribute_fault({}, NOW, LIMIT) is None


def test_no_rank_hangs_before_the_first_case() -> None:
    waiting = RankStatus(moved=0.0, heard=0.0)
    assert attribute_fault({0: waiting, 1: waiting}, NOW, LIMIT) is None


def test_a_rank_that_has_not_begun_when_others_have_is_behind() -> None:
    """Regression: the waiting ranks were named instead."""
    absent = RankStatus(moved=NOW - LIMIT - 3, heard=NOW - LIMIT - 3)
    fault = verdict(r0=stuck(), r1=stuck(), r2=absent)
    assert (fault.status, fault.ranks) == ("timeout", (2,))
    absent.heard = NOW - 0.3  # it sends heartbeats, but has not begun
    assert verdict(r0=stuck(), r1=stuck(), r2=absent).ranks == (2,)


def test_a_rank_may_be_silent_after_its_goodbye() -> None:
    gone = silent()
    gone.left = True
    assert attribute_fault({0: well(), 1: gone}, NOW, LIMIT) is None


def test_nothing_is_late_before_the_limit() -> None:
    assert attribute_fault({0: well(), 1: stuck(seconds=LIMIT - 1), 2: silent(LIMIT - 1)}, NOW, LIMIT) is None


def test_a_rank_that_died() -> None:
    fault = verdict(r0=well(), r1=well(), r2=dead())
    assert (fault.status, fault.ranks) == ("failed", (2,))
    assert fault.reason == "rank 2 died (last seen in timed, iteration 40)"


def test_all_ranks_that_died_are_named() -> None:
    fault = verdict(r0=well(), r1=dead(), r2=dead())
    assert fault.ranks == (1, 2)
    assert "rank 1 died" in fault.reason
    assert "rank 2 died" in fault.reason


def test_a_rank_that_raised() -> None:
    fault = verdict(r0=well(), r1=said("raised", "ValueError: no"))
    assert (fault.status, fault.ranks, fault.reason) == ("failed", (1,), "rank 1: ValueError: no")


def test_an_interruption_names_no_rank() -> None:
    fault = verdict(r0=said("signal", "interrupted by SIGTERM"), r1=said("signal", "interrupted by SIGTERM"))
    assert (fault.status, fault.ranks, fault.reason) == ("failed", (), "interrupted by SIGTERM")


def test_a_rank_that_went_silent() -> None:
    fault = verdict(r0=well(), r1=silent(45))
    assert (fault.status, fault.ranks) == ("timeout", (1,))
    assert "no progress for 30 s" in fault.reason
    assert "rank 1 (timed, iteration 40, silent for 45 s)" in fault.reason


def test_the_rank_without_progress_is_named() -> None:
    fault = verdict(r0=stuck(ticks=101), r1=stuck(ticks=100), r2=stuck(ticks=101))
    assert (fault.status, fault.ranks) == ("timeout", (1,))
    assert "rank 1 (timed, iteration 40)" in fault.reason
    assert "silent" not in fault.reason


def test_a_rank_in_an_earlier_case_is_behind() -> None:
    late = stuck(ticks=500)
    late.case = 2
    fault = verdict(r0=stuck(ticks=100), r1=late)
    assert fault.ranks == (1,)


def test_ranks_equally_far_are_all_named() -> None:
    fault = verdict(r0=stuck(), r1=stuck())
    assert fault.ranks == (0, 1)


def test_the_quiet_rank_is_named_when_none_makes_progress() -> None:
    fault = verdict(r0=stuck(), r1=stuck(heard=8.0), r2=stuck())
    assert fault.ranks == (1,)
    assert "silent for 8 s" in fault.reason


def test_eight_of_many_hung_ranks_are_shown() -> None:
    fault = attribute_fault({r: stuck() for r in range(12)}, NOW, LIMIT)
    assert fault is not None
    assert fault.ranks == tuple(range(12))
    assert fault.reason.endswith("and 4 more")


def test_a_library_error_names_the_ranks_that_reported_it() -> None:
    fault = verdict(r0=well(), r1=said("transport", "connection reset"), r2=said("transport", "connection reset"))
    assert (fault.status, fault.ranks) == ("failed", (1, 2))
    assert fault.reason == "connection reset"  # once


def test_different_library_errors_are_all_in_the_reason() -> None:
    fault = verdict(r0=said("transport", "reset"), r1=said("transport", "timed out"))
    assert fault.reason == "reset; timed out"


# From the surest sign to the weakest: each decides over all that follow.
SIGNS = {
    "died": dead(),
    "raised": said("raised", "boom"),
    "signal": said("signal", "interrupted by SIGINT"),
    "hung": silent(),
    "transport": said("transport", "peer gone"),
}
EXPECTED = {
    "died": ("failed", (1,)),
    "raised": ("failed", (1,)),
    "signal": ("failed", ()),
    "hung": ("timeout", (1,)),
    "transport": ("failed", (1,)),
}


def stronger_and_weaker() -> Iterator[tuple[str, str]]:
    order = list(SIGNS)
    for k, strong in enumerate(order):
        for weak in order[k + 1 :]:
            yield strong, weak


@pytest.mark.parametrize(("strong", "weak"), list(stronger_and_weaker()))
@pytest.mark.parametrize("swapped", [False, True])
def test_the_surer_sign_decides(strong: str, weak: str, swapped: bool) -> None:
    statuses = {1: SIGNS[strong], 2: SIGNS[weak]}
    if swapped:  # the order does not matter
        statuses = dict(reversed(statuses.items()))
    fault = attribute_fault({0: well(), **statuses}, NOW, LIMIT)
    assert fault is not None
    assert (fault.status, fault.ranks) == EXPECTED[strong]


def test_a_heartbeat_without_new_ticks_is_no_progress() -> None:
    status = RankStatus(case=0, ticks=5, moved=10.0, heard=10.0)
    status.update(0, "timed", 1, 5, 20.0)
    assert (status.moved, status.heard) == (10.0, 20.0)
    status.update(0, "timed", 1, 6, 30.0)
    assert (status.moved, status.heard) == (30.0, 30.0)
    status.update(1, "compile", -1, 6, 40.0)
    assert (status.moved, status.where()) == (40.0, "compile")


def progress(case: int, iteration: int, ticks: int) -> Progress:
    made = Progress()
    made.case, made.iteration, made.ticks = case, iteration, ticks
    return made


WHOLE = (
    protocol.encode(Kind.HELLO, 3, progress(-1, -1, 0), "token")
    + protocol.encode(Kind.HEARTBEAT, 3, progress(7, 12, 1 << 40), "timed")
    + protocol.encode(Kind.FAILURE, 3, progress(7, 12, 99), "raised|größer")
)
MESSAGES = [
    (Kind.HELLO, 3, -1, -1, 0, "token"),
    (Kind.HEARTBEAT, 3, 7, 12, 1 << 40, "timed"),
    (Kind.FAILURE, 3, 7, 12, 99, "raised|größer"),
]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_messages_arrive_however_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    received, found = bytearray(), []
    for start, end in itertools.pairwise(edges):
        received += WHOLE[start:end]
        found += protocol.take_messages(received)
    assert found == MESSAGES
    assert not received


@given(st.binary(min_size=1, max_size=200).filter(lambda raw: not raw.startswith(b"n")))
def test_bytes_that_are_no_message_are_dropped(garbage: bytes) -> None:
    received = bytearray(garbage)
    assert protocol.take_messages(received) == []
    # Either the bytes are gone, or there are too few of them to be checked.
    assert len(received) < protocol.HEADER.size


def test_a_message_before_invalid_bytes_is_kept() -> None:
    received = bytearray(WHOLE + b"GET / HTTP/1.1\r\nHost: somewhere-else\r\n\r\n")
    assert protocol.take_messages(received) == MESSAGES
    assert not received


def test_a_too_large_length_is_invalid() -> None:
    lie = bytearray(protocol.HEADER.pack(b"ncb1", Kind.HEARTBEAT, 0, 0, 0, 0, 1 << 31) + b"x" * 10)
    assert protocol.take_messages(lie) == []
    assert not lie


def test_text_that_is_no_utf8_is_kept_readable() -> None:
    raw = protocol.HEADER.pack(b"ncb1", Kind.FAILURE, 1, 0, 0, 0, 2) + b"\xff\xfe"
    ((*_, text),) = protocol.take_messages(bytearray(raw))
    assert text == "��"


def test_a_long_message_is_cut_not_refused_by_the_reader() -> None:
    ((*_, text),) = protocol.take_messages(bytearray(protocol.encode(Kind.FAILURE, 0, Progress(), "ü" * 5000)))
    assert text.startswith("ü" * 2000)
    assert len(text.encode()) <= 4099


def test_an_arriving_failure_is_noted() -> None:
    status = well()
    protocol.apply_message(status, Message(Kind.FAILURE, 1, 3, 41, 101, "transport|peer | gone"), NOW)
    assert status.failure == ("transport", "peer | gone")
    assert status.stage == "timed"


def test_a_goodbye_is_noted() -> None:
    status = well()
    protocol.apply_message(status, Message(Kind.GOODBYE, 1, 3, -1, 101, ""), NOW)
    assert status.left


def test_a_closed_connection_is_not_an_empty_one() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        assert protocol.receive(here) is None
        there.sendall(b"x")
        assert protocol.receive(here) == b"x"
        there.close()
        assert protocol.receive(here) == b""


def test_a_zombie_process_is_not_alive() -> None:
    assert watchdog.is_alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert watchdog.is_alive(child.pid)
    assert child.stdin is not None
    child.stdin.close()
    while watchdog.is_alive(child.pid):  # a zombie now, since its parent has not waited for it
        time.sleep(0.01)
    assert child.poll() is not None
    assert not watchdog.is_alive(child.pid)


def test_a_failure_during_a_heartbeat_is_sent_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a failure between two reads of the same flag was never sent, once in 30 runs."""
    dog = watchdog.Watchdog(2, 3, Progress(), lambda _fault: pytest.fail("only ranks 0 and 1 store faults"))
    here, there = socket.socketpair()
    told = []

    def encode(kind: int, rank: int, progress: Progress, text: str, honest: Any = protocol.encode) -> bytes:
        told.append(kind)
        if len(told) == 1:  # the main thread fails while the first heartbeat is being sent
            dog._failure = ("transport", "connection reset")
        if len(told) == 2:  # and the run ends while the failure is being sent
            dog._ending.set()
        return bytes(honest(kind, rank, progress, text))

    monkeypatch.setattr(watchdog, "encode", encode)
    dog.interval = 0.001
    with here, there, dog._wake_read, dog._wake_write:
        dog._follow(here)
    assert told == [Kind.HEARTBEAT, Kind.FAILURE, Kind.GOODBYE]


@pytest.mark.parametrize("beat", [0.5, 16.0])
def test_the_heartbeat_interval_is_added_to_the_limit(beat: float) -> None:
    """In large jobs heartbeats are rare, which must not look like silence."""
    late = well()
    late.heard = late.moved = NOW - 5.0 - 0.9 * beat
    assert attribute_fault({0: well(), 1: late}, NOW, 5.0, beat) is None
    late.heard = late.moved = NOW - 5.0 - 1.1 * beat
    fault = attribute_fault({0: well(), 1: late}, NOW, 5.0, beat)
    assert fault is not None
    assert fault.ranks == (1,)
