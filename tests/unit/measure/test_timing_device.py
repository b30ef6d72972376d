"""The device's timing loops on a made-up stream whose clock moves only as the test says."""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest

from ncclbench.measure.timing_device import (
    GATE_LIMIT_SECONDS,
    LAUNCH_BUDGET,
    captured,
    gated,
    graph_launches,
    starts_together,
)
from ncclbench.measure.timing_host import Loop, Progress
from ncclbench.schedule import Case
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import Collective, Concurrent, Exchange, Kernel, Local, Op
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, Step, nothing
from ncclbench.transports.cuda.nccl_limits import (
    COLLECTIVE_LAUNCHES,
    EXCHANGE_LAUNCHES,
    branches_launches,
    launches_of,
)
from tests.helpers.compilers import steps_of
from tests.helpers.fake_streams import FakeStream, PairedStream


def loop_on(stream: FakeStream, *programs: list[tuple[str, float]]) -> tuple[Loop, list[int]]:
    """A loop over programs of labelled phases, and a list that grows with each refill."""
    refills: list[int] = []
    made = tuple(Program(tuple(Step(label, stream.launch(s, label)) for label, s in steps)) for steps in programs)
    loop = Loop(
        programs=made,
        barrier=lambda: stream.log.append("barrier"),
        clock=lambda: 0.0,
        refill=lambda: refills.append(len(stream.log)),
        refill_every=1,
        progress=Progress(),
        stream=stream,
    )
    return loop, refills


def test_a_gated_iteration_is_the_devices_time_between_its_events() -> None:
    loop, _ = loop_on(FakeStream(), [("all_reduce", 3e-6)])
    np.testing.assert_allclose(gated(loop, 7), np.full((7, 1), 3e-6))


def test_phases_are_timed_each_and_add_up() -> None:
    loop, _ = loop_on(FakeStream(), [("pack", 1e-6), ("send", 5e-6)])
    seconds = gated(loop, 3)
    np.testing.assert_allclose(seconds, np.tile([6e-6, 1e-6, 5e-6], (3, 1)))


def test_buffers_take_turns() -> None:
    loop, _ = loop_on(FakeStream(), [("one", 1e-6)], [("two", 2e-6)])
    np.testing.assert_allclose(gated(loop, 4)[:, 0], [1e-6, 2e-6, 1e-6, 2e-6])


def test_gate_opens_after_all_ranks_enqueued() -> None:
    stream = FakeStream()
    gated(loop_on(stream, [("x", 1e-6)])[0], 2)
    assert stream.log == ["synchronize", "barrier", "hold", "x", "x", "barrier", "release", "synchronize"]
    assert stream.limits == [GATE_LIMIT_SECONDS]


def test_step_with_many_kernels_counts_them_all() -> None:
    stream = FakeStream()
    kernel, loop = stream.launch(1e-6, "kernel"), loop_on(stream, [("x", 0.0)])[0]
    step = Step("x", lambda: [kernel() for _ in range(90)] and None, launches=90)
    gated(dataclasses.replace(loop, programs=(Program((step,)),)), 20)
    assert 90 < stream.most_enqueued <= LAUNCH_BUDGET


def test_device_barrier_runs_before_each_iteration_untimed() -> None:
    stream = FakeStream()
    loop = dataclasses.replace(loop_on(stream, [("x", 1e-6)])[0], device_barrier=True)
    np.testing.assert_allclose(gated(loop, 2), np.full((2, 1), 1e-6))
    assert stream.log[:4] == ["device barrier", "synchronize", "barrier", "hold"]
    assert stream.log[4:] == ["device barrier", "x", "device barrier", "x", "barrier", "release", "synchronize"]
    gated(loop, 600)
    assert stream.most_enqueued <= LAUNCH_BUDGET


@pytest.mark.parametrize("device_barrier", [True, False])
def test_slow_rank_affects_only_its_own_rounds(device_barrier: bool) -> None:
    shared = PairedStream()
    ranks = [
        PairedStream(rank=r, clocks=shared.clocks, meetings=shared.meetings, everyone=shared.everyone) for r in range(4)
    ]
    found: dict[int, list[float]] = {}

    def run(stream: PairedStream) -> None:
        loop = loop_on(stream, [])[0]
        rounds = tuple(Program((Step("x", lambda distance=d: stream.meet(distance)),)) for d in (1, 2, 3))  # type: ignore[misc]
        found[stream.rank] = gated(dataclasses.replace(loop, programs=rounds, device_barrier=device_barrier), 6)[
            :, 0
        ].tolist()

    threads = [threading.Thread(target=run, args=(stream,)) for stream in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart = {rank: [2.0 if rank ^ d == 0 or rank == 0 else 1.0 for d in (1, 2, 3, 1, 2, 3)] for rank in range(4)}
    assert (found == apart) is device_barrier, "back to back, waiting for the slow one is in the figures of all"


@pytest.mark.parametrize(
    ("pattern", "by_itself"),
    [
        *(("all_reduce", True), ("all_gather", True), ("reduce_scatter", True), ("all_to_all", True)),
        *(("broadcast", False), ("reduce", False), ("gather", False), ("scatter", False), ("send_recv", False)),
        *(("same_rail", False), ("rail_groups", False), ("hypercube", False)),
    ],
)
def test_which_patterns_line_their_ranks_up(pattern: str, by_itself: bool) -> None:
    topology = Topology.from_hosts(["n0", "n0", "n1", "n1"])
    variants = build_variants(Case(pattern=pattern, nbytes=4096), topology)
    assert starts_together(variants) is by_itself


@pytest.mark.parametrize(
    ("op", "members", "launches"),
    [
        (Op.ALL_TO_ALL, 64, COLLECTIVE_LAUNCHES),
        (Op.ALL_TO_ALL, 65, 5),
        (Op.GATHER, 256, 16),
        (Op.SCATTER, 256, 16),
        (Op.ALL_REDUCE, 256, COLLECTIVE_LAUNCHES),
    ],
)
def test_grouped_sends_count_launches_by_peers(op: Op, members: int, launches: int) -> None:
    """Behind a gate NCCL would wait forever for space in its work ring."""
    phase = Collective("x", op, np.arange(members)[None], 1)
    (step,) = steps_of([phase], lambda *_: nothing)
    assert step.launches == launches
    other = dataclasses.replace(phase, read="send2", write="recv2")
    assert branches_launches(Concurrent("both", ((phase,), (other,)))) == 1 + 2 * (launches + 3)


@pytest.mark.parametrize(("flows", "launches"), [(1, EXCHANGE_LAUNCHES), (96, 6), (97, 7), (480, 30)])
def test_flows_count_launches_of_the_busiest_rank(flows: int, launches: int) -> None:
    incast = Exchange(
        "x", np.arange(1, flows + 1), np.zeros(flows, np.int64), np.full(flows, 8), recv_offset=8 * np.arange(flows)
    )
    assert launches_of(incast) == launches
    local = Local("copy", Kernel.COPY, 1, read="a", write="b")
    assert launches_of(local) == 1


def test_what_nccl_brings_along_is_within_the_budget() -> None:
    """One launch of NCCL by torch is two events waited for or recorded, a kernel and another event."""
    stream = FakeStream()
    entries = [stream.launch(0.0, "event"), stream.launch(1e-6, "kernel"), stream.launch(0.0, "event")] * 2
    phase = Collective("x", Op.ALL_REDUCE, np.arange(2)[None], 1)
    (step,) = steps_of([phase], lambda *_: lambda: [call() for call in entries[:4]] and None)
    loop = dataclasses.replace(loop_on(stream, [])[0], programs=(Program((step,)),))
    gated(loop, 600)
    assert LAUNCH_BUDGET // 2 < stream.most_enqueued <= LAUNCH_BUDGET


@pytest.mark.parametrize("phases", [1, 3, 40])
def test_the_queue_never_holds_more_than_the_budget(phases: int) -> None:
    stream = FakeStream()
    loop, refills = loop_on(stream, [(f"p{k}", 1e-6) for k in range(phases)])
    assert gated(loop, 600).shape[0] == 600
    assert stream.most_enqueued <= LAUNCH_BUDGET
    assert len(refills) == stream.log.count("hold")


def test_a_gate_that_gave_up_is_said() -> None:
    stream = FakeStream(gives_up=True)
    loop, _ = loop_on(stream, [("x", 1e-6)])
    gated(loop, 1)
    assert any("opened by itself" in remark for remark in loop.remarks)


def test_graph_is_captured_once_and_timed_per_launch() -> None:
    stream = FakeStream()
    loop, _ = loop_on(stream, [("one", 1e-6)], [("two", 3e-6)])
    measure = captured(loop, 10)
    np.testing.assert_allclose(measure(45), np.full((45, 1), 2e-6))
    np.testing.assert_allclose(measure(1), [[2e-6]])
    assert [line for line in stream.log if line.startswith("capture")] == ["capture 10"]
    after = stream.log[stream.log.index("capture 10") + 1]
    assert after == "barrier", "all ranks have instantiated before the first replay"


def test_short_launches_share_a_graph_with_many() -> None:
    launches = [graph_launches(nbytes) for nbytes in (8, 1 << 20, 2 << 20, 16 << 20, 1 << 30)]
    assert launches == [50, 50, 20, 20, 4]


def test_the_garbage_collector_is_back_after_an_error() -> None:
    import gc

    stream = FakeStream()
    loop, _ = loop_on(stream, [("x", 1e-6)])
    loop.programs[0].steps[0].__dict__["launch"] = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gated(loop, 1)
    assert gc.isenabled()


def test_branch_times_are_read_after_all_launches() -> None:
    stream, launched = FakeStream(), list[int]()

    def ask() -> Callable[[], list[float]]:
        number = len(launched)

        def tell() -> list[float]:
            assert not stream.held
            return [number * 1e-6, number * 2e-6]

        return tell

    alone = Program((Step("one", stream.launch(5e-6, "one")),))
    both = Program((Step("both", lambda: launched.append(1), ("one", "two"), ask),))
    loop = dataclasses.replace(loop_on(stream, [])[0], programs=(alone, both))
    assert loop.columns == ["total", "one", "both", "both.one", "both.two"]
    seconds = gated(loop, 4)
    nan = np.nan
    expected = [[nan, nan], [1e-6, 2e-6], [nan, nan], [2e-6, 4e-6]]
    np.testing.assert_allclose(seconds[:, 3:], expected)
