"""Who is to blame: what the watchdog makes of every kind of sighting, and how its messages survive the network."""

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

from ncclbench.launch.watchdog import watchdog
from ncclbench.launch.watchdog.attribution import Ending, Fault, Sighting, judge
from ncclbench.measure.timing_host import Progress

LIMIT = 30.0
NOW = 1000.0


def well(case: int = 3, ticks: int = 100, stage: str = "timed", iteration: int = 40) -> Sighting:
    """A rank that was heard just now and moves on."""
    return Sighting(case=case, stage=stage, iteration=iteration, ticks=ticks, moved=NOW - 1, heard=NOW - 0.4)


def dead() -> Sighting:
    sighting = well()
    sighting.lost = True
    return sighting


def said(how: Ending, message: str) -> Sighting:
    sighting = well()
    sighting.failure = (how, message)
    return sighting


def silent(seconds: float = LIMIT + 2) -> Sighting:
    sighting = well()
    sighting.heard = sighting.moved = NOW - seconds
    return sighting


def stuck(ticks: int = 100, seconds: float = LIMIT + 2, heard: float = 0.3) -> Sighting:
    """It is heard, but does not get on."""
    sighting = well(ticks=ticks)
    sighting.moved, sighting.heard = NOW - seconds, NOW - heard
    return sighting


def verdict(**sightings: Sighting) -> Fault:
    fault = judge({int(name[1:]): sighting for name, sighting in sightings.items()}, NOW, LIMIT)
    assert fault is not None
    assert fault.case == 3
    assert "\n" not in fault.reason
    return fault


def test_all_is_well() -> None:
    assert judge({r: well() for r in range(4)}, NOW, LIMIT) is None
    assert judge({}, NOW, LIMIT) is None


def test_nobody_is_hung_before_the_first_case() -> None:
    waiting = Sighting(moved=0.0, heard=0.0)
    assert judge({0: waiting, 1: waiting}, NOW, LIMIT) is None


def test_a_rank_that_has_not_begun_when_others_have_is_behind() -> None:
    """It was left out, and those that waited for it were named."""
    absent = Sighting(moved=NOW - LIMIT - 3, heard=NOW - LIMIT - 3)
    fault = verdict(r0=stuck(), r1=stuck(), r2=absent)
    assert (fault.status, fault.ranks) == ("timeout", (2,))
    absent.heard = NOW - 0.3  # it is heard, and does not come
    assert verdict(r0=stuck(), r1=stuck(), r2=absent).ranks == (2,)


def test_a_rank_that_said_goodbye_may_be_silent() -> None:
    gone = silent()
    gone.left = True
    assert judge({0: well(), 1: gone}, NOW, LIMIT) is None


def test_nothing_is_late_before_the_limit() -> None:
    assert judge({0: well(), 1: stuck(seconds=LIMIT - 1), 2: silent(LIMIT - 1)}, NOW, LIMIT) is None


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


def test_an_interruption_is_nobodys_fault() -> None:
    fault = verdict(r0=said("signal", "interrupted by SIGTERM"), r1=said("signal", "interrupted by SIGTERM"))
    assert (fault.status, fault.ranks, fault.reason) == ("failed", (), "interrupted by SIGTERM")


def test_a_rank_that_went_silent() -> None:
    fault = verdict(r0=well(), r1=silent(45))
    assert (fault.status, fault.ranks) == ("timeout", (1,))
    assert "no progress for 30 s" in fault.reason
    assert "rank 1 (timed, iteration 40, silent for 45 s)" in fault.reason


def test_a_rank_that_stands_still_keeps_the_others_waiting() -> None:
    fault = verdict(r0=stuck(ticks=101), r1=stuck(ticks=100), r2=stuck(ticks=101))
    assert (fault.status, fault.ranks) == ("timeout", (1,))
    assert "rank 1 (timed, iteration 40)" in fault.reason
    assert "silent" not in fault.reason


def test_a_rank_in_an_earlier_case_is_the_one_behind_whatever_its_ticks() -> None:
    late = stuck(ticks=500)
    late.case = 2
    fault = verdict(r0=stuck(ticks=100), r1=late)
    assert fault.ranks == (1,)


def test_ranks_equally_far_are_all_named() -> None:
    fault = verdict(r0=stuck(), r1=stuck())
    assert fault.ranks == (0, 1)


def test_where_all_stand_still_the_one_that_is_also_quiet_is_to_blame() -> None:
    fault = verdict(r0=stuck(), r1=stuck(heard=8.0), r2=stuck())
    assert fault.ranks == (1,)
    assert "silent for 8 s" in fault.reason


def test_of_many_hung_ranks_eight_are_shown_and_all_are_named() -> None:
    fault = judge({r: stuck() for r in range(12)}, NOW, LIMIT)
    assert fault is not None
    assert fault.ranks == tuple(range(12))
    assert fault.reason.endswith("and 4 more")


def test_a_librarys_error_alone_names_the_ranks_that_saw_it() -> None:
    fault = verdict(r0=well(), r1=said("transport", "connection reset"), r2=said("transport", "connection reset"))
    assert (fault.status, fault.ranks) == ("failed", (1, 2))
    assert fault.reason == "connection reset"  # once


def test_different_errors_of_a_library_are_all_told() -> None:
    fault = verdict(r0=said("transport", "reset"), r1=said("transport", "timed out"))
    assert fault.reason == "reset; timed out"


# From the surest sign to the least: each beats all that come after it.
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
def test_the_surer_sign_wins(strong: str, weak: str, swapped: bool) -> None:
    sightings = {1: SIGNS[strong], 2: SIGNS[weak]}
    if swapped:  # the order in which they were seen does not matter
        sightings = dict(reversed(sightings.items()))
    fault = judge({0: well(), **sightings}, NOW, LIMIT)
    assert fault is not None
    assert (fault.status, fault.ranks) == EXPECTED[strong]


def test_progress_is_what_moves_a_rank_not_its_voice() -> None:
    sighting = Sighting(case=0, ticks=5, moved=10.0, heard=10.0)
    sighting.update(0, "timed", 1, 5, 20.0)
    assert (sighting.moved, sighting.heard) == (10.0, 20.0)
    sighting.update(0, "timed", 1, 6, 30.0)
    assert (sighting.moved, sighting.heard) == (30.0, 30.0)
    sighting.update(1, "compile", -1, 6, 40.0)
    assert (sighting.moved, sighting.where()) == (40.0, "compile")


def progress(case: int, iteration: int, ticks: int) -> Progress:
    made = Progress()
    made.case, made.iteration, made.ticks = case, iteration, ticks
    return made


WHOLE = (
    watchdog._encode(watchdog._HELLO, 3, progress(-1, -1, 0), "token")
    + watchdog._encode(watchdog._BEAT, 3, progress(7, 12, 1 << 40), "timed")
    + watchdog._encode(watchdog._FAIL, 3, progress(7, 12, 99), "raised|größer")
)
MESSAGES = [
    (watchdog._HELLO, 3, -1, -1, 0, "token"),
    (watchdog._BEAT, 3, 7, 12, 1 << 40, "timed"),
    (watchdog._FAIL, 3, 7, 12, 99, "raised|größer"),
]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_messages_arrive_however_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    received, found = bytearray(), []
    for start, end in itertools.pairwise(edges):
        received += WHOLE[start:end]
        found += watchdog._messages(received)
    assert found == MESSAGES
    assert not received


@given(st.binary(min_size=1, max_size=200).filter(lambda raw: not raw.startswith(b"n")))
def test_garbage_is_thrown_away_and_breaks_nothing(garbage: bytes) -> None:
    received = bytearray(garbage)
    assert watchdog._messages(received) == []
    # Either it is gone, or it is still too short to be known for what it is.
    assert len(received) < watchdog._HEADER.size


def test_garbage_after_a_message_does_not_take_the_message_with_it() -> None:
    received = bytearray(WHOLE + b"GET / HTTP/1.1\r\nHost: somewhere-else\r\n\r\n")
    assert watchdog._messages(received) == MESSAGES
    assert not received


def test_a_length_that_is_a_lie_is_garbage() -> None:
    lie = bytearray(watchdog._HEADER.pack(b"ncb1", watchdog._BEAT, 0, 0, 0, 0, 1 << 31) + b"x" * 10)
    assert watchdog._messages(lie) == []
    assert not lie


def test_text_that_is_no_utf8_is_kept_readable() -> None:
    raw = watchdog._HEADER.pack(b"ncb1", watchdog._FAIL, 1, 0, 0, 0, 2) + b"\xff\xfe"
    ((*_, text),) = watchdog._messages(bytearray(raw))
    assert text == "��"


def test_a_long_message_is_cut_not_refused_by_the_reader() -> None:
    ((*_, text),) = watchdog._messages(bytearray(watchdog._encode(watchdog._FAIL, 0, Progress(), "ü" * 5000)))
    assert text.startswith("ü" * 2000)
    assert len(text.encode()) <= 4099


def test_an_arriving_failure_is_noted() -> None:
    sighting = well()
    watchdog._note(sighting, watchdog._FAIL, 3, 41, 101, "transport|peer | gone")
    assert sighting.failure == ("transport", "peer | gone")
    assert sighting.stage == "timed"


def test_a_goodbye_is_noted() -> None:
    sighting = well()
    watchdog._note(sighting, watchdog._BYE, 3, -1, 101, "")
    assert sighting.left


def test_a_closed_connection_is_not_an_empty_one() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        assert watchdog._receive(here) is None
        there.sendall(b"x")
        assert watchdog._receive(here) == b"x"
        there.close()
        assert watchdog._receive(here) == b""


def test_a_process_lives_until_it_has_ended_reaped_or_not() -> None:
    assert watchdog._lives(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert watchdog._lives(child.pid)
    assert child.stdin is not None
    child.stdin.close()
    while watchdog._lives(child.pid):  # it is a zombie now, since nobody has waited for it
        time.sleep(0.01)
    assert child.poll() is not None
    assert not watchdog._lives(child.pid)


def test_what_happens_during_a_heartbeat_is_told_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came between composing one message and noting what had been said, and was never told: once in 30 runs."""
    dog = watchdog.Watchdog(2, 3, Progress(), lambda _fault: pytest.fail("not this rank's affair"))
    here, there = socket.socketpair()
    told = []

    def encode(kind: int, rank: int, progress: Progress, text: str, honest: Any = watchdog._encode) -> bytes:
        told.append(kind)
        if len(told) == 1:  # the main thread fails while the first heartbeat is on its way
            dog._failure = ("transport", "connection reset")
        if len(told) == 2:  # and the run ends while that is told
            dog._ending.set()
        return bytes(honest(kind, rank, progress, text))

    monkeypatch.setattr(watchdog, "_encode", encode)
    dog._interval = 0.001
    with here, there, dog._wake_read, dog._wake_write:
        dog._follow(here)
    assert told == [watchdog._BEAT, watchdog._FAIL, watchdog._BYE]


@pytest.mark.parametrize("beat", [0.5, 16.0])
def test_what_a_heartbeat_is_late_by_is_nobodys_fault(beat: float) -> None:
    """Of thousands of ranks each is heard rarely, which must not look like silence, whatever the limit."""
    late = well()
    late.heard = late.moved = NOW - 5.0 - 0.9 * beat
    assert judge({0: well(), 1: late}, NOW, 5.0, beat) is None
    late.heard = late.moved = NOW - 5.0 - 1.1 * beat
    fault = judge({0: well(), 1: late}, NOW, 5.0, beat)
    assert fault is not None
    assert fault.ranks == (1,)
