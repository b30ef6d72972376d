"""Flows to NICs that do not answer: left out, named, and all others measured."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ncclbench.errors import EnvironmentFault
from ncclbench.measure.case import run_case
from ncclbench.measure.reachability import LostFlows
from ncclbench.plan.plan import Settings
from ncclbench.schedule.case import Case
from ncclbench.topology import Topology
from ncclbench.topology.network_addresses import address_of_interface
from ncclbench.transports._tcp_probe import Listeners
from ncclbench.transports.threads import ThreadTransport, play

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ncclbench.measure.case import Measurement

THREE_BY_TWO = Topology.from_hosts([f"n{rank // 2}" for rank in range(6)])


class Deaf(ThreadTransport):
    """A transport that can ask, and of which some ranks never answer."""

    dead: frozenset[int] = frozenset()

    def unreachable(self, ranks: Sequence[int], seconds: float) -> list[int]:
        assert seconds > 0
        return [rank for rank in ranks if rank in self.dead or self.rank in self.dead]


def measured(pattern: str, dead: set[int]) -> Measurement:
    def main(transport: ThreadTransport) -> Measurement | None:
        transport.__class__ = type("Deaf", (Deaf,), {"dead": frozenset(dead)})
        case = Case(pattern=pattern, nbytes=4096, params={})
        return run_case(case, transport, THREE_BY_TWO, Settings(iterations=12, warmup=1))

    (found,) = [one for one in play(6, main, 30) if one is not None]
    return found


def flows(found: Measurement) -> set[tuple[int, int]]:
    rounds = [phase.flows for phase in found.record.phases if phase.flows]
    return {pair for one in rounds for pair in zip(one.src, one.dst, strict=True)}


@pytest.mark.parametrize("pattern", ["same_rail", "cross_rail", "pairs", "ring"])
def test_flows_of_an_unreachable_rank_are_left_out(pattern: str) -> None:
    whole, cut = measured(pattern, set()), measured(pattern, {2})
    assert (whole.record.status, whole.record.reason) == ("ok", None)
    assert (cut.record.status, cut.record.ranks, cut.record.wrong) == ("timeout", [2], 0)
    assert flows(cut) == {pair for pair in flows(whole) if 2 not in pair}
    assert flows(cut)
    assert cut.record.reason is not None
    for pair in flows(whole) - flows(cut):
        assert f"{pair[0]} -> {pair[1]}" in cut.record.reason


def test_no_flow_left_is_a_record_without_figures() -> None:
    found = measured("same_rail", {0, 1, 2, 3, 4, 5})
    assert (found.record.status, found.record.time_us, found.samples) == ("timeout", None, None)
    assert found.record.reason is not None
    assert "none is left" in found.record.reason


def test_a_collective_is_not_asked_about() -> None:
    found = measured("all_reduce", {2})
    assert (found.record.status, found.record.reason) == ("ok", None)


def test_wrong_data_are_worse_than_lost_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncclbench.schedule.oracle.Oracle.count_wrong", lambda *_: 3)
    found = measured("same_rail", {2})
    assert found.record.status == "wrong"
    assert any("got no answer" in note for note in found.record.notes)


@pytest.mark.parametrize(
    ("pairs", "ranks"),
    [
        ([(0, 2), (2, 0), (2, 4), (4, 2)], [2]),
        ([(0, 4), (4, 0)], [0, 4]),  # nothing tells which
        ([(0, 1), (0, 2), (0, 3), (5, 4), (6, 4)], [0, 4]),
    ],
)
def test_ranks_in_most_lost_pairs_are_named(pairs: list[tuple[int, int]], ranks: list[int]) -> None:
    assert LostFlows(tuple(pairs), 12).ranks == ranks


def test_a_reason_is_one_line_however_many_flows() -> None:
    reason = LostFlows(tuple((0, k) for k in range(1, 500)), 900).as_reason()
    assert reason.startswith("499 of 900 flows got no answer within 3 s")
    assert "and 487 more" in reason
    assert len(reason) < 300


class _Alone:
    """The control network of a world of one."""

    def gather(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> object:
        return array[None]

    all_gather = gather

    def broadcast(self, array: object) -> object:
        return array


def test_open_listener_is_reachable_and_closed_one_is_not() -> None:
    listeners = Listeners(_Alone(), "lo")  # type: ignore[arg-type]
    assert listeners.unreachable([0], 5.0) == []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        listeners.addresses.append(closed.getsockname())
    assert listeners.unreachable([0, 1], 5.0) == [1]
    assert listeners.unreachable([], 5.0) == []
    listeners.close()
    assert listeners.unreachable([0], 5.0) == [0]


def test_an_interface_that_is_not_there_is_named() -> None:
    assert address_of_interface("lo") == "127.0.0.1"
    assert address_of_interface("lo,eth7") == "127.0.0.1"
    with pytest.raises(EnvironmentFault, match="network interface 'nope0'"):
        address_of_interface("nope0")
