"""Ranks as threads: every pattern runs, every phase type matches the oracle, and no rank hangs."""

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ncclbench.buffers.arrays import Buffers, allocate
from ncclbench.config.plugins import load, names
from ncclbench.errors import TransportError
from ncclbench.measure.case import Measurement, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import (
    DTYPES,
    AllToAllV,
    Case,
    Collective,
    Concurrent,
    Exchange,
    Kernel,
    Local,
    Op,
    Phase,
    Redop,
    Schedule,
    Timing,
    Unable,
)
from ncclbench.schedule.oracle import Oracle
from ncclbench.schedule.pattern import build_schedule
from ncclbench.schedule.rates import bus_factor
from ncclbench.store.records import Record
from ncclbench.topology import Topology
from ncclbench.transports.base import Program, all_gather_text, broadcast_text
from ncclbench.transports.threads import ThreadTransport, ThreadWorld, play
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.simulated import worlds_of

# Patterns of one schedule; those with variants need nodes and rails, and have tests of their own.
PATTERNS = [name for name in names("patterns") if not hasattr(load("patterns", name), "variants")]
QUICK = Settings(iterations=6, warmup=1)
WORLD_SIZES = (1, 2, 5, 8)


def takes(pattern: str, parameter: str) -> bool:
    return parameter in load("patterns", pattern).Params.__struct_fields__


def reductions(pattern: str) -> list[Redop]:
    """The reductions that a pattern can be asked for; one without any is run once."""
    return list(Redop) if takes(pattern, "redop") else [Redop.SUM]


CASES = [(pattern, redop) for pattern in PATTERNS for redop in reductions(pattern)]


def run(case: Case, world_size: int, settings: Settings = QUICK) -> Record:
    topology = Topology.single_node(world_size)
    measured = play(world_size, lambda transport: run_case(case, transport, topology, settings))
    assert measured[1:] == [None] * (world_size - 1)
    assert isinstance(measured[0], Measurement)
    return measured[0].record


def wrong_after_runs(schedule: Schedule, runs: int = 1) -> list[int]:
    """Wrong elements of each rank after the schedule has run; salts differ from run to run."""

    def main(transport: ThreadTransport) -> int:
        buffers = allocate(schedule, "cpu")
        program, wrong = transport.compile(schedule, buffers), 0
        for salt in range(runs):
            oracle = Oracle(schedule, transport.rank, salt)
            oracle.prepare(buffers)
            transport.barrier()
            program.run()
            transport.barrier()
            wrong += oracle.count_wrong(buffers)
        return wrong

    return play(schedule.world_size, main)


def by_hand(world_size: int, *phases: Phase, dtype: str = "float32") -> Schedule:
    nbytes = 64 * DTYPES[dtype].itemsize
    return Schedule(
        world_size=world_size,
        dtype=DTYPES[dtype],
        buffers=dict.fromkeys("abcd", nbytes),
        inputs=("a",),
        phases=phases,
        op=None,
        size_bytes=nbytes,
        count=64,
    )


# The fast suite tries every type on 2 ranks, and one of each kind of arithmetic on all world sizes.
WORLDS = [(dtype, size) for dtype in DTYPES for size in worlds_of(dtype, WORLD_SIZES)]
FEW_TYPES = ("float32", "bfloat16", "int32", "uint8")


@pytest.mark.parametrize(
    ("dtype", "world_size"), exhaustive_if(lambda pair: pair[1] != 2 and pair[0] not in FEW_TYPES, WORLDS)
)
@pytest.mark.parametrize(("pattern", "redop"), CASES)
def test_every_pattern_is_right_or_skipped_with_reason(pattern: str, redop: Redop, dtype: str, world_size: int) -> None:
    params = {"redop": redop} if len(reductions(pattern)) > 1 else {}
    case = Case(pattern=pattern, nbytes=1000, dtype=dtype, params=params)
    record = run(case, world_size)
    if record.status == "skipped":
        with pytest.raises(Unable, match=re.escape(str(record.reason))):
            build_schedule(case, Topology.single_node(world_size))
        return
    assert (record.status, record.wrong, record.reason) == ("ok", 0, None)
    assert record.wrong_ranks == []
    rounds = redop is Redop.AVG and world_size == 5 and DTYPES[dtype].is_float
    alone = [note for note in record.notes if note == "a group of one rank sends nothing: its rates are of no link"]
    assert bool(alone) == (record.group_size == 1 and record.alg_gb_per_s is not None)
    assert bool(record.tolerance) == bool(set(record.notes) - set(alone)) == rounds
    assert record.time_us is not None
    assert record.time_us.n == 6


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_runs_on_some_of_these_worlds(pattern: str) -> None:
    statuses = {run(Case(pattern=pattern, nbytes=1000), world_size).status for world_size in WORLD_SIZES}
    assert "ok" in statuses


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rates_use_the_median_and_the_moved_bytes(pattern: str) -> None:
    record = run(Case(pattern=pattern, nbytes=1000), 4)
    assert record.time_us is not None
    assert record.size_bytes is not None
    schedule = build_schedule(Case(pattern=pattern, nbytes=1000), Topology.single_node(4))
    if schedule.op is None:
        assert (record.alg_gb_per_s, record.bus_gb_per_s) == (None, None)
        return
    rate = record.size_bytes / record.time_us.p50 / 1e3  # bytes a microsecond are MB/s
    assert record.alg_gb_per_s == pytest.approx(rate)
    assert record.bus_gb_per_s == pytest.approx(rate * bus_factor(schedule.op, schedule.rate_groups.shape[1]))


@pytest.mark.parametrize("spec", ["node", "rail", "2"])
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if takes(pattern, "group")])
def test_every_pattern_is_right_in_groups_side_by_side(pattern: str, spec: str) -> None:
    case = Case(pattern=pattern, nbytes=512, params={"group": spec})
    topology = Topology.from_hosts("xyxyxyxy")
    measured = play(8, lambda transport: run_case(case, transport, topology, QUICK))[0]
    assert measured is not None
    record = measured.record
    assert (record.status, record.wrong) == ("ok", 0)
    assert [group.ranks for group in record.groups] == topology.groups(spec).tolist()
    assert all(group.time_us.n == 6 and group.bus_gb_per_s for group in record.groups)


@pytest.mark.parametrize("root", range(5))
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if takes(pattern, "root")])
def test_any_rank_can_be_the_root(pattern: str, root: int) -> None:
    record = run(Case(pattern=pattern, nbytes=1000, params={"root": root}), 5)
    assert (record.status, record.wrong, record.root) == ("ok", 0, root)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("nbytes", [32, 70_000])
def test_transfer_check_covers_sizes_around_the_fill_period(pattern: str, nbytes: int) -> None:
    assert run(Case(pattern=pattern, nbytes=nbytes, dtype="uint8"), 4).status == "ok"


@pytest.mark.parametrize("timing", [Timing.ISOLATED, Timing.PIPELINED])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_data_are_right_after_many_repeated_launches(pattern: str, timing: Timing, dtype: str) -> None:
    case = Case(pattern=pattern, nbytes=256, dtype=dtype, timing=timing)
    record = run(case, 4, Settings(iterations=40, warmup=20))
    assert (record.status, record.wrong) == ("ok", 0)
    assert record.launches_per_sample == (40 if timing is Timing.PIPELINED else 1)


def test_a_graph_is_skipped_on_the_host_with_the_reason() -> None:
    record = run(Case(pattern="all_reduce", nbytes=64, timing=Timing.GRAPH), 2)
    assert record.status == "skipped"
    assert record.reason == "graph timing needs a GPU transport; threads runs on the host"


def test_data_that_were_not_checked_are_not_called_right() -> None:
    record = run(Case(pattern="all_reduce", nbytes=64), 2, Settings(iterations=6, warmup=1, check=False))
    assert record.wrong is None


# --- phases made by hand --------------------------------------------------------------------------------------------

AB: dict[str, Any] = {"read": "a", "write": "b"}
BC: dict[str, Any] = {"read": "b", "write": "c"}
TWO, THREE, FOUR = (np.arange(n)[None] for n in (2, 3, 4))
GROUPS = np.array([[3, 0, 2], [4, 5, 1]])
UNEVEN = np.array([[[0, 3, 1], [0, 0, 0], [2, 0, 4]], [[1, 0, 0], [5, 0, 1], [0, 2, 0]]])
FLOWS = Exchange(
    "x",
    src=np.array([0, 0, 1, 3]),
    dst=np.array([1, 0, 3, 0]),  # the second goes from a rank to itself
    nbytes=np.array([16, 8, 4, 12]),
    send_offset=np.array([0, 4, 8, 12]),
    recv_offset=np.array([0, 40, 4, 8]),
    **AB,
)
TWO_BRANCHES = Concurrent(
    "both",
    (
        (Collective("node", Op.ALL_REDUCE, np.array([[0, 1], [2, 3]]), 9, **AB),),
        (
            Collective("rail", Op.ALL_GATHER, np.array([[0, 2], [1, 3]]), 9, read="a", write="c"),
            Local("copy", Kernel.COPY, 4, read="c", write="d"),
        ),
    ),
)

BY_HAND: dict[str, Schedule] = {
    "uneven, some pairs silent": by_hand(6, AllToAllV("v", GROUPS, UNEVEN, 8, **AB)),
    "uneven, all silent": by_hand(6, AllToAllV("v", GROUPS, 0 * UNEVEN, 8, **AB)),
    "uneven, ranks left out": by_hand(8, AllToAllV("v", GROUPS, UNEVEN, 4, **AB)),
    "flows": by_hand(5, FLOWS),
    "copy": by_hand(3, Local("l", Kernel.COPY, 5, **AB)),
    "gather rows": by_hand(2, Local("l", Kernel.GATHER_ROWS, 3, rows=np.array([[0, 2, 2], [5, 1, 0]]), **AB)),
    "reduce chunks": by_hand(3, Local("l", Kernel.REDUCE_CHUNKS, 7, chunks=4, **AB)),
    "pack, dispatch, add": by_hand(
        2,
        Local("pack", Kernel.GATHER_ROWS, 2, rows=np.array([[3, 0, 1], [2, 2, 4]]), **AB),
        AllToAllV("dispatch", TWO, np.array([[[1, 2], [2, 1]]]), 8, **BC),
        Local("add", Kernel.REDUCE_CHUNKS, 2, chunks=3, read="c", write="d"),
    ),
    "all_reduce by hand": by_hand(
        4,
        Collective("scatter", Op.ALL_TO_ALL, FOUR, 3, **AB),
        Local("add", Kernel.REDUCE_CHUNKS, 3, chunks=4, **BC),
        Collective("gather", Op.ALL_GATHER, FOUR, 3, read="c", write="d"),
    ),
    "two branches": by_hand(4, TWO_BRANCHES),
    "a branch, then its result": by_hand(
        4, TWO_BRANCHES, Collective("sum", Op.ALL_REDUCE, FOUR, 9, read="b", write="b")
    ),
    "a barrier between": by_hand(
        3,
        Collective("move", Op.BROADCAST, THREE, 8, 2, **AB),
        Collective("wait", Op.BARRIER, THREE, 0, **AB),
        Local("copy", Kernel.COPY, 8, **BC),
    ),
}


@pytest.mark.parametrize("schedule", BY_HAND.values(), ids=BY_HAND)
def test_phases_arrive_where_the_oracle_expects_them(schedule: Schedule) -> None:
    assert wrong_after_runs(schedule, runs=3) == [0] * schedule.world_size


@pytest.mark.parametrize("op", [op for op in Op if op is not Op.BARRIER])
@pytest.mark.parametrize("groups", [[[0]], [[1, 0]], [[4, 0, 2], [1, 5, 3]]], ids=["alone", "two", "two groups"])
@pytest.mark.parametrize("write", ["a", "b"], ids=["in place", "out of place"])
def test_every_op_arrives_where_the_oracle_expects_it(op: Op, groups: list[list[int]], write: str) -> None:
    root = len(groups[0]) - 1
    phase = Collective("one", op, np.array(groups), 7, root, Redop.MAX, read="a", write=write)
    schedule = by_hand(1 + max(map(max, groups)), phase)
    assert wrong_after_runs(schedule, runs=2) == [0] * schedule.world_size


@hypothesis_settings(max_examples=40)
@given(data=st.data())
def test_random_schedules_arrive_where_the_oracle_expects_them(
    exact_schedule: st.SearchStrategy[Schedule], data: st.DataObject
) -> None:
    schedule = data.draw(exact_schedule)
    assert wrong_after_runs(schedule, runs=2) == [0] * schedule.world_size


def test_uneven_all_to_all_orders_rows_by_source() -> None:
    """In plain numbers, without an oracle: rank r sends 10r, 10r + 1, ..."""
    schedule = by_hand(2, AllToAllV("v", TWO, np.array([[[1, 2], [0, 3]]]), 4, **AB))

    def main(transport: ThreadTransport) -> list[float]:
        buffers = {"a": np.arange(64, dtype=np.float32) + 10 * transport.rank, "b": np.zeros(64, np.float32)}
        transport.compile(schedule, buffers).run()
        return [float(value) for value in buffers["b"][:6]]

    assert play(2, main) == [[0, 0, 0, 0, 0, 0], [1, 2, 10, 11, 12, 0]]


def test_an_average_of_integers_floors() -> None:
    schedule = by_hand(3, Collective("c", Op.ALL_REDUCE, THREE, 3, redop=Redop.AVG, **AB), dtype="int32")

    def main(transport: ThreadTransport) -> list[int]:
        buffers = {"a": np.full(64, transport.rank * 2, np.int32), "b": np.zeros(64, np.int32)}
        buffers["a"][1] += 1
        transport.compile(schedule, buffers).run()
        return [int(value) for value in buffers["b"][:4]]

    assert play(3, main) == [[2, 3, 2, 0]] * 3


def test_several_schedules_are_compiled_before_the_first_is_run() -> None:
    """The variants of a case: the timed loop rotates through programs that were all made beforehand."""
    schedules = [by_hand(2, AllToAllV("v", TWO, np.full((1, 2, 2), rows), 4, **AB)) for rows in (1, 2, 3, 4)]

    def main(transport: ThreadTransport) -> int:
        buffers = [allocate(schedule, "cpu") for schedule in schedules]
        programs = [transport.compile(one, held) for one, held in zip(schedules, buffers, strict=True)]
        wrong = 0
        for salt, (schedule, program, held) in enumerate(zip(schedules, programs, buffers, strict=True)):
            oracle = Oracle(schedule, transport.rank, salt)
            oracle.prepare(held)
            program.run()
            wrong += oracle.count_wrong(held)
        return wrong

    assert play(2, main) == [0, 0]


# --- control messages -----------------------------------------------------------------------------------------------


def test_control_messages_reach_all_ranks_in_rank_order() -> None:
    def main(transport: ThreadTransport) -> tuple[Any, ...]:
        mine, control = np.array([transport.rank, -transport.rank]), transport.control
        gathered = control.gather(mine)
        return (
            None if gathered is None else gathered.tolist(),
            control.all_gather(mine).tolist(),
            control.broadcast(mine + 5).tolist(),
        )

    stacked = [[0, 0], [1, -1], [2, -2]]
    assert play(3, main) == [(stacked, stacked, [5, 5]), (None, stacked, [5, 5]), (None, stacked, [5, 5])]


def test_texts_of_different_lengths_travel_as_control_messages() -> None:
    texts = ["", "node\N{EN DASH}1", "x" * 100]

    def main(transport: ThreadTransport) -> tuple[list[str], str]:
        mine = texts[transport.rank]
        return all_gather_text(transport.control, mine), broadcast_text(transport.control, mine + "!")

    assert play(3, main) == [(texts, "!")] * 3


# --- errors ---------------------------------------------------------------------------------------------------------

Wait = Callable[[ThreadTransport, Buffers], object]


def launch(transport: ThreadTransport, buffers: Buffers) -> None:
    # Its last phase needs all four ranks: the branches alone let a rank that never meets the culprit finish.
    transport.compile(BY_HAND["a branch, then its result"], buffers).run()


WAITS: dict[str, Wait] = {
    "barrier": lambda transport, _: transport.barrier(),
    "control": lambda transport, _: transport.control.all_gather(np.zeros(1)),
    "phase": launch,
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("culprit", [0, 3])
def test_error_of_one_rank_ends_all_and_surfaces(wait: Wait, culprit: int) -> None:
    seen: dict[int, str] = {}

    def main(transport: ThreadTransport) -> None:
        if transport.rank == culprit:
            raise LookupError("out of tokens")
        try:
            with transport.translating("dispatch"):
                wait(transport, allocate(BY_HAND["a branch, then its result"], "cpu"))
        except TransportError as error:
            seen[transport.rank] = str(error)
            raise

    with pytest.raises(LookupError, match="out of tokens"):
        play(4, main)
    assert seen == {
        rank: f"dispatch on rank {rank}: rank {culprit} stopped: out of tokens" for rank in range(4) if rank != culprit
    }
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rank-")]


def test_a_rank_that_never_comes_is_given_up_on() -> None:
    def main(transport: ThreadTransport) -> None:
        with transport.translating("start"):
            if transport.rank:
                transport.barrier()

    with pytest.raises(TransportError, match=r"start on rank 1: no answer for 0\.05 s"):
        play(2, main, timeout=0.05)


def test_an_error_in_a_pattern_surfaces_from_every_world() -> None:
    with pytest.raises(ValueError, match="no pattern 'all_reduced'; did you mean 'all_reduce'"):
        run(Case(pattern="all_reduced", nbytes=64), 3)


def test_results_come_in_rank_order() -> None:
    assert play(5, lambda transport: transport.rank**2) == [0, 1, 4, 9, 16]


def test_aborted_world_ends_all_waits() -> None:
    world = ThreadWorld(2)
    world.abort("over")
    with (
        pytest.raises(TransportError, match="late on rank 0: over"),
        (late := ThreadTransport(world, 0)).translating("late"),
    ):
        late.barrier()


def test_the_manifest_names_the_transport() -> None:
    assert play(1, lambda transport: dict(transport.describe())) == [{"transport": "threads", "numpy": np.__version__}]


class _UnableHere(ThreadTransport):
    """Cannot compile the case of 64 bytes on some ranks: their library is another one."""

    where: tuple[int, ...] = ()

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        if self.rank in self.where and schedule.size_bytes == 64:
            raise Unable("this library has no such thing")
        return program


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ((1,), "rank 1: this library has no such thing"),
        ((1, 2), "rank 1: this library has no such thing"),
        ((0, 1, 2), "this library has no such thing"),
    ],
)
def test_one_unable_rank_skips_the_case_on_all(where: tuple[int, ...], reason: str) -> None:
    topology, settings = Topology.single_node(3), Settings(iterations=2, warmup=1)
    cases = [Case(pattern="all_reduce", nbytes=nbytes) for nbytes in (64, 128)]

    def main(transport: ThreadTransport) -> list[Measurement | None]:
        mine = _UnableHere(transport.world, transport.rank)
        mine.where = where
        return [run_case(case, mine, topology, settings) for case in cases]

    first, second = play(3, main, timeout=20)[0]
    assert first is not None
    assert second is not None
    assert (first.record.status, first.record.reason) == ("skipped", reason)
    assert second.record.status == "ok"


@pytest.mark.parametrize(("check", "status"), [(True, "skipped"), (False, "ok")])
def test_unverifiable_average_runs_without_checks(check: bool, status: str) -> None:
    case = Case(pattern="all_reduce", nbytes=64, dtype="float8_e4m3fn", params={"redop": Redop.AVG})
    settings = Settings(iterations=6, warmup=1, check=check)
    ranks = play(66, lambda transport: run_case(case, transport, Topology.single_node(66), settings))
    assert ranks[0] is not None
    assert (ranks[0].record.status, ranks[0].record.wrong) == (status, None)
