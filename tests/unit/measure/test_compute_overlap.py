"""Overlap of a collective with computing, on a clock that moves only during work and waits."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import Unable
from ncclbench.measure import compute_overlap as overlap
from ncclbench.measure.case import run_case
from ncclbench.measure.timing_host import Loop, Progress
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Collective, CollectiveParams, Op, Schedule, Timing
from ncclbench.schedule.dtypes import Array, dtype_of
from ncclbench.schedule.pattern import build_schedule, build_variants
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Split, Step
from ncclbench.transports.threads import play

OVERLAPPED = {"overlap": True}
COLLECTIVES = [name for name in names("patterns") if issubclass(load("patterns", name).Params, CollectiveParams)]


@dataclass
class Network:
    """A network that takes a second for a collective, a part of it by itself and the rest only while it is called."""

    by_itself: float
    now: float = 0.0
    calls: list[str] = field(default_factory=list)
    _arrives: float = 0.0

    def start(self) -> None:
        self.calls.append("start")
        self._arrives = self.now + self.by_itself

    def wait(self) -> None:
        self.calls.append("wait")
        self.now = max(self.now, self._arrives) + 1.0 - self.by_itself

    def work(self, units: int) -> None:
        self.calls.append("work")
        self.now += units / 1024

    def loop(self) -> Loop:
        return Loop(
            programs=(Program((Step("all_reduce", Split(self.start, self.wait)),)),),
            barrier=lambda: self.calls.append("barrier"),
            clock=lambda: self.now,
            refill=lambda: self.calls.append("refill"),
            refill_every=4,
            progress=Progress(),
        )


class Alone:
    """Control messages of a world of one."""

    def all_gather(self, array: Array) -> Array:
        return array[None]

    def gather(self, array: Array) -> Array:
        return array[None]

    def broadcast(self, array: Array) -> Array:
        return array


@pytest.mark.parametrize("by_itself", [0.0, 0.25, 0.5, 1.0])
def test_the_share_is_what_the_network_does_by_itself(by_itself: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(by_itself)
    monkeypatch.setattr(overlap.Work, "do", lambda _self, units: network.work(units))
    measure = overlap.overlapped(network.loop(), Alone())
    network.calls.clear()
    seconds_NK = measure(4)
    # A unit takes 1/1024 s, so computing was made as long as the collective: 1024 of them.
    assert seconds_NK.tolist() == [[1.0, 2.0 - by_itself, 1.0]] * 4
    twice = ["barrier", "start", "wait", "barrier", "start", "work", "wait"]
    assert network.calls == ["refill", *twice, *twice] * 2  # two launches an iteration, and four from refill to refill
    found = overlap.overlap_of(list(overlap.COLUMNS), seconds_NK[None])
    assert found is not None
    assert found.share_percent == pytest.approx(100 * by_itself)
    assert (found.pure_us, found.compute_us, found.overlapped_us) == (1e6, 1e6, (2 - by_itself) * 1e6)


@pytest.mark.parametrize(
    ("pure", "overlapped", "compute", "percent"),
    [(10.0, 20.0, 10.0, 0.0), (10.0, 10.0, 10.0, 100.0), (8.0, 12.0, 10.0, 75.0), (10.0, 50.0, 10.0, 0.0)],
)
def test_osus_formula(pure: float, overlapped: float, compute: float, percent: float) -> None:
    assert overlap.share_percent(pure, overlapped, compute) == percent


def test_the_share_is_of_means_over_ranks_and_iterations() -> None:
    seconds_RNK = np.array([[[1.0, 2.0, 1.0], [3.0, 3.0, 1.0]], [[2.0, 2.0, 2.0], [2.0, 3.0, 2.0]]])
    found = overlap.overlap_of(list(overlap.COLUMNS), seconds_RNK)
    assert found is not None
    assert found.share_percent == 100 - (2.5 - 1.5) / 2.0 * 100


def test_without_overlap_there_is_none() -> None:
    assert overlap.overlap_of(["total"], np.ones((2, 3, 1))) is None


@pytest.mark.parametrize("pattern", COLLECTIVES)
def test_every_collective_can_be_asked_for_it(pattern: str) -> None:
    case = Case(pattern=pattern, nbytes=64, params=OVERLAPPED)
    (phase,) = build_schedule(case, Topology.single_node(2)).phases
    assert isinstance(phase, Collective)
    assert phase.overlap
    assert overlap.is_overlapped(build_variants(case, Topology.single_node(2)), Timing.ISOLATED)


@pytest.mark.parametrize("timing", [Timing.PIPELINED, Timing.GRAPH])
def test_other_regimes_are_unable(timing: Timing) -> None:
    case = Case(pattern="all_reduce", nbytes=64, params=OVERLAPPED)
    with pytest.raises(Unable, match=f"isolated regime, not in {timing}"):
        overlap.is_overlapped(build_variants(case, Topology.single_node(2)), timing)


def test_an_iteration_of_several_phases_is_unable() -> None:
    world = np.arange(2)[None]
    schedule = Schedule(
        world_size=2,
        dtype=dtype_of("float32"),
        buffers={"data": 8},
        inputs=("data",),
        phases=tuple(
            Collective(name, Op.ALL_REDUCE, world, 2, 0, read="data", write="data", overlap=True) for name in "ab"
        ),
        op=None,
        size_bytes=8,
        count=2,
    )
    with pytest.raises(Unable, match="an iteration is one collective"):
        overlap.is_overlapped((schedule,), Timing.ISOLATED)


def test_a_transport_without_it_skips_the_case() -> None:
    case, topology = Case(pattern="all_reduce", nbytes=64, params=OVERLAPPED), Topology.single_node(2)
    measured = play(2, lambda transport: run_case(case, transport, topology, Settings(iterations=2)))[0]
    assert measured is not None
    assert measured.record.status == "skipped"
    assert measured.record.reason == "threads have no overlap of a collective with computing; --transport mpi has"


def test_work_takes_the_requested_time() -> None:
    """What a unit takes is measured; here every look at the clock is a second later."""
    seconds = iter(range(1000))
    work = overlap.Work(lambda: float(next(seconds)))
    assert work.units(10 * work.seconds_per_unit) == 10
    assert work.units(0.0) == 1
