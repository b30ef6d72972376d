"""The timing loops on a clock that only moves when told to, and when sampling stops."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncclbench.analysis.summary import Floats
from ncclbench.measure.sampling import FEWEST_SAMPLES, MAX_SAMPLES, MIN_SAMPLES, Rule, Samples, collect
from ncclbench.measure.timing_host import Loop, Progress, isolated, pipelined, quiet_gc
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play

# Powers of two, so that sums of them are exact: anything that leaks into a stretch shows in its own bit.
REGIMES = {"isolated": isolated, "pipelined": pipelined}
LAUNCH, FINISH, BARRIER, REFILL = 1.0, 1 / 16, 1024.0, 65536.0


@dataclass
class Stage:
    """A program of the given phases, and everything around it; each does nothing but take its time."""

    phases: int = 1
    now: float = 0.0
    calls: list[str] = field(default_factory=list)
    on_call: Callable[[str], None] = lambda _: None

    def take(self, what: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(what)
            self.now += seconds
            self.on_call(what)

        return call

    def program(self, name: str) -> Program:
        steps = [Step(f"phase_{k}", self.take(f"{name} {k}", LAUNCH * 2**k)) for k in range(self.phases)]
        return Program(tuple(steps), finish=self.take("finish", FINISH))

    def loop(self, refill_every: int = 1 << 30, launches_per_block: int = 20) -> Loop:
        return Loop(
            programs=(self.program("launch"),),
            barrier=self.take("barrier", BARRIER),
            clock=lambda: self.now,
            refill=self.take("refill", REFILL),
            refill_every=refill_every,
            progress=Progress(),
            launches_per_block=launches_per_block,
        )


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_isolated_times_the_launch_and_its_completion_and_nothing_else(samples: int) -> None:
    stage = Stage()
    assert isolated(stage.loop(refill_every=2), samples).tolist() == [[LAUNCH + FINISH]] * samples


def test_isolated_completes_each_phase_and_times_it_apart() -> None:
    stage = Stage(phases=3)
    loop = stage.loop()
    assert loop.columns == ["total", "phase_0", "phase_1", "phase_2"]
    each = [LAUNCH + FINISH, 2 * LAUNCH + FINISH, 4 * LAUNCH + FINISH]
    assert isolated(loop, 2).tolist() == [[sum(each), *each]] * 2


def test_a_single_phase_has_one_column() -> None:
    assert Stage().loop().columns == ["total"]


@given(lengths=st.lists(st.lists(st.floats(1e-7, 10.0), min_size=3, max_size=3), min_size=1, max_size=10))
def test_the_phases_of_an_iteration_sum_to_its_total(lengths: list[list[float]]) -> None:
    stage, durations = Stage(phases=3), iter(np.ravel(lengths))

    def dawdle(what: str) -> None:
        if what.startswith("launch"):
            stage.now += next(durations)

    stage.on_call = dawdle
    seconds = isolated(stage.loop(), len(lengths))
    np.testing.assert_allclose(seconds[:, 0], seconds[:, 1:].sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("phases", [1, 3])
def test_barrier_is_directly_before_the_clock(phases: int) -> None:
    stage = Stage(phases=phases)
    isolated(stage.loop(refill_every=2), 3)
    launches = [call for k in range(phases) for call in (f"launch {k}", "finish")]
    iteration = ["barrier", *launches]
    assert stage.calls == ["refill", *iteration, *iteration, "refill", *iteration]


@given(samples=st.integers(1, 40), every=st.integers(1, 50), phases=st.integers(1, 2))
def test_isolated_never_launches_more_often_than_the_data_allow(samples: int, every: int, phases: int) -> None:
    stage = Stage(phases=phases)
    isolated(stage.loop(refill_every=every), samples)
    since_refill = most = 0
    for call in stage.calls:
        since_refill = 0 if call == "refill" else since_refill + (call == "launch 0")
        most = max(most, since_refill)
    assert stage.calls[0] == "refill"  # the batch before may have used the data up
    assert most == min(samples, every)
    assert stage.calls.count("refill") == -(-samples // every)


@pytest.mark.parametrize("launches", [1, 4, 64])
def test_pipelined_divides_block_time_by_launches(launches: int) -> None:
    stage = Stage(phases=2)
    found = pipelined(stage.loop(launches_per_block=launches), 3)
    assert found.tolist() == [[3 * LAUNCH + FINISH / launches]] * 3


def test_pipelined_refills_before_and_finishes_once_per_block() -> None:
    stage = Stage()
    pipelined(stage.loop(launches_per_block=3), 2)
    assert stage.calls == 2 * ["refill", "finish", "barrier", "launch 0", "launch 0", "launch 0", "finish"]


def test_pipelined_takes_turns_over_the_sets_of_buffers() -> None:
    stage = Stage()
    loop = replace(stage.loop(launches_per_block=5), programs=tuple(stage.program(f"set {k}") for k in range(3)))
    assert pipelined(loop, 1).tolist() == [[LAUNCH + FINISH / 5]]
    turns = [call for call in stage.calls if call.startswith("set")]
    assert turns == ["set 0 0", "set 1 0", "set 2 0", "set 0 0", "set 1 0"]


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_progress_moves_with_every_sample(regime: Callable[[Loop, int], Floats]) -> None:
    stage = Stage()
    loop = stage.loop(launches_per_block=5)
    seen: list[tuple[int, int]] = []
    stage.on_call = lambda what: (
        seen.append((loop.progress.iteration, loop.progress.ticks)) if "launch" in what else None
    )
    regime(loop, 3)
    assert len(set(seen)) == len({iteration for iteration, _ in seen}) == len({ticks for _, ticks in seen}) == 3
    assert seen == sorted(seen)
    assert loop.progress.ticks > seen[-1][1]


# --- the garbage collector ------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["gc on", "gc off"])
def collector(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The collector as a caller has set it; put back afterwards."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_garbage_collector_is_off_only_while_timing(
    regime: Callable[[Loop, int], Floats], phases: int, collector: bool
) -> None:
    inside: set[bool] = set()
    stage = Stage(phases=phases, on_call=lambda what: inside.add(gc.isenabled()) if "launch" in what else None)
    regime(stage.loop(), 3)
    assert inside == {False}
    assert gc.isenabled() == collector


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_the_garbage_collector_is_as_it_was_after_an_error(
    regime: Callable[[Loop, int], Floats], collector: bool
) -> None:
    def fail(what: str) -> None:
        if what == "finish":
            raise ConnectionError("peer is gone")

    with pytest.raises(ConnectionError, match="peer is gone"):
        regime(Stage(on_call=fail).loop(), 3)
    assert gc.isenabled() == collector


def test_quiet_gc_may_be_nested(collector: bool) -> None:
    with quiet_gc():
        with quiet_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() == collector


# --- when to stop ---------------------------------------------------------------------------------------------------

OPEN = Rule(fixed=None, precision=0.02, max_seconds=2.0)
STEADY, NOISY = np.ones(MAX_SAMPLES), np.tile([1.0, 2.0], MAX_SAMPLES // 2)


@pytest.mark.parametrize("fixed", [1, 7, 5000])
def test_a_fixed_number_is_one_batch_whatever_it_costs(fixed: int) -> None:
    rule = Rule(fixed=fixed, precision=1e-9, max_seconds=0.001)
    assert rule.first(seconds_each=100.0) == fixed
    assert rule.next(NOISY[:fixed], elapsed=1e6) == (0, "iterations")


@pytest.mark.parametrize(
    ("seconds_each", "first"),
    [(0.0, MIN_SAMPLES), (1e-6, MIN_SAMPLES), (0.1, 20), (0.2, 10), (0.4, FEWEST_SAMPLES), (100.0, FEWEST_SAMPLES)],
)
def test_first_batch_fits_the_time_and_allows_an_interval(seconds_each: float, first: int) -> None:
    assert OPEN.first(seconds_each) == first


def test_steady_samples_stop_for_precision() -> None:
    assert OPEN.next(STEADY[:MIN_SAMPLES], elapsed=0.1) == (0, "precision")


@pytest.mark.parametrize("n", range(FEWEST_SAMPLES, MIN_SAMPLES))
def test_precision_is_not_believed_of_a_few_samples(n: int) -> None:
    assert OPEN.next(STEADY[:n], elapsed=0.001)[0] > 0


@pytest.mark.parametrize("spread", [0.019, 0.021])
def test_precision_is_half_the_medians_interval_over_the_median(spread: float) -> None:
    samples = np.repeat([1 - spread, 1.0, 1 + spread], [30, 1, 30])
    expected = (0, "precision") if spread < OPEN.precision else (61, "")
    assert OPEN.next(samples, elapsed=0.001) == expected


@pytest.mark.parametrize("elapsed", [2.0, 2.5, 100.0])
def test_noisy_samples_stop_when_the_time_is_spent(elapsed: float) -> None:
    assert OPEN.next(NOISY[:40], elapsed) == (0, "time")


def test_the_next_batch_fits_into_the_time_that_is_left() -> None:
    assert OPEN.next(NOISY[:32], elapsed=1.5) == (10, "")  # 0.047 s each, 0.5 s left
    assert OPEN.next(NOISY[:40], elapsed=1.99) == (0, "time")


def test_batches_double_up_to_a_thousand() -> None:
    assert OPEN.next(NOISY[:40], elapsed=0.001) == (40, "")
    assert OPEN.next(NOISY[:4000], elapsed=0.001) == (1000, "")


def test_samples_are_capped() -> None:
    assert OPEN.next(NOISY[: MAX_SAMPLES - 10], elapsed=0.001) == (10, "")
    assert OPEN.next(NOISY, elapsed=0.001) == (0, "iterations")


def test_a_clock_that_stands_still_does_not_stop_the_sampling() -> None:
    assert OPEN.next(NOISY[:40], elapsed=0.0) == (40, "")


@given(
    n=st.integers(FEWEST_SAMPLES, MAX_SAMPLES),
    elapsed=st.floats(0, 10),
    max_seconds=st.floats(0, 5),
    precision=st.floats(0, 0.1),
)
def test_a_rule_asks_for_more_or_says_why_not(n: int, elapsed: float, max_seconds: float, precision: float) -> None:
    batch, stopped = Rule(fixed=None, precision=precision, max_seconds=max_seconds).next(NOISY[:n], elapsed)
    assert n + batch <= MAX_SAMPLES
    assert (stopped in ("precision", "time", "iterations")) == (batch == 0)
    assert elapsed + batch * elapsed / n <= max_seconds * (1 + 1e-9) or batch == 0


# --- collecting over ranks ------------------------------------------------------------------------------------------


@dataclass
class Collected:
    batches: list[int]
    samples: Samples | None


def collect_on(
    ranks: int, rule: Rule, duration: Callable[[int, int], float], clocks_step: float = 0.0, seconds_each: float = 0.0
) -> list[Collected]:
    """Every rank measures `duration(rank, i)` in iteration i; its own clock moves by that and by `clocks_step`."""

    def main(transport: ThreadTransport) -> Collected:
        batches: list[int] = []
        now = 1e6 * (1 + transport.rank)  # clocks of different machines share no zero

        def measure(batch: int) -> Floats:
            nonlocal now
            first = sum(batches)
            batches.append(batch)
            total = np.array([duration(transport.rank, i) for i in range(first, first + batch)])
            now += float(total.sum()) + transport.rank * clocks_step
            return np.stack([total, total / 2], axis=1)

        labels = ["total", "half"]
        return Collected(batches, collect(measure, labels, rule, transport.control, lambda: now, seconds_each))

    return play(ranks, main)


def noise(rank: int, i: int) -> float:
    """Never precise, and rank 1 is the slowest."""
    return (0.01 if i % 2 else 0.02) * (2 if rank == 1 else 1)


@pytest.mark.parametrize(
    ("rule", "duration", "stopped"),
    [
        (Rule(fixed=7, precision=0.02, max_seconds=1.0), noise, "iterations"),
        (Rule(fixed=None, precision=0.02, max_seconds=100.0), lambda _rank, _i: 0.01, "precision"),
        (Rule(fixed=None, precision=0.0, max_seconds=1.5), noise, "time"),
    ],
    ids=["fixed", "precision", "time"],
)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_agree_on_batches_and_rank_0_has_samples(
    ranks: int, rule: Rule, duration: Callable[[int, int], float], stopped: str
) -> None:
    found = collect_on(ranks, rule, duration, clocks_step=50.0)  # each clock on its own would decide otherwise
    assert all(one.batches == found[0].batches for one in found)
    assert [one.samples is None for one in found] == [False] + [True] * (ranks - 1)
    samples = found[0].samples
    assert samples is not None
    assert samples.stopped == stopped
    assert (len(found[0].batches) > 1) == (stopped == "time")
    assert samples.labels == ["total", "half"]
    n = sum(found[0].batches)
    expected = [[[duration(rank, i), duration(rank, i) / 2] for i in range(n)] for rank in range(ranks)]
    assert samples.seconds_RNK.tolist() == expected


def test_the_slowest_rank_of_each_iteration_is_what_counts() -> None:
    found = collect_on(3, Rule(fixed=4, precision=0.02, max_seconds=1.0), lambda rank, i: float((rank + i) % 3 + rank))
    assert found[0].samples is not None
    assert found[0].samples.slowest_N.tolist() == [4.0, 3.0, 3.0, 4.0]


def test_precision_is_judged_by_the_slowest_rank() -> None:
    """Rank 0 alone is steady; the iteration is not."""
    rule = Rule(fixed=None, precision=0.02, max_seconds=1.0)
    found = collect_on(2, rule, lambda rank, i: 0.01 if rank == 0 else noise(1, i))
    assert found[0].samples is not None
    assert found[0].samples.stopped == "time"


def test_slow_case_starts_with_the_fewest_samples() -> None:
    found = collect_on(2, Rule(fixed=None, precision=0.0, max_seconds=0.05), noise, seconds_each=0.02)
    assert found[1].batches == [FEWEST_SAMPLES]
