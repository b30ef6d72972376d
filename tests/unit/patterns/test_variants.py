"""Cases whose iterations rotate through several schedules."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from ncclbench.measure.case import Measurement, memory_needed, run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Exchange, Params, Schedule, Timing
from ncclbench.schedule import pattern as pattern_module
from ncclbench.schedule.schedule import shared_buffers
from ncclbench.topology import Topology
from ncclbench.transports.threads import ThreadTransport, play

RANKS = 4
SHIFTS = (1, 2, 3)


def shifted(shift: int, label: str, topology: Topology, dtype: str = "float32") -> Schedule:
    ranks, nbytes = np.arange(topology.world_size), 64 * shift
    flows = Exchange(label=label, src=ranks, dst=np.roll(ranks, -shift), nbytes=np.array([nbytes]))
    return Schedule(
        world_size=topology.world_size,
        dtype=Case(pattern="shifts", nbytes=64, dtype=dtype).element,
        buffers={"send": nbytes, "recv": nbytes},
        inputs=("send",),
        phases=(flows,),
        op="send_recv",
        size_bytes=nbytes,
        count=nbytes // 4,
    )


@pytest.fixture(params=["a name a variant", "one name"])
def pattern(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pattern of three variants, each with a phase of its own name, or all with the same one."""
    module, named = ModuleType("shifts"), request.param == "a name a variant"

    def variants(_case: Case, topology: Topology) -> list[Schedule]:
        return [shifted(s, f"shift_{s}" if named else "shift", topology) for s in SHIFTS]

    module.variants = variants  # type: ignore[attr-defined]
    module.Params = Params  # type: ignore[attr-defined]
    monkeypatch.setattr(pattern_module, "load", lambda _kind, _name: module)
    return str(request.param)


def measured(
    settings: Settings, timing: Timing = Timing.ISOLATED, spoil: Callable[[ThreadTransport], None] | None = None
) -> Measurement:
    def main(transport: ThreadTransport) -> Measurement | None:
        if spoil:
            spoil(transport)
        case = Case(pattern="shifts", nbytes=64, timing=timing)
        return run_case(case, transport, Topology.single_node(RANKS), settings)

    measurement = play(RANKS, main)[0]
    assert measurement is not None
    return measurement


def test_every_variant_is_measured_equally_often(pattern: str) -> None:
    measurement = measured(Settings(iterations=10))
    record, samples = measurement.record, measurement.samples
    assert samples is not None
    assert (record.status, record.variants, record.stopped) == ("ok", 3, "iterations")
    assert samples.seconds_RNK.shape[1] == 12  # 10, rounded up to whole rotations
    if pattern == "one name":
        assert samples.labels == ["total"]
        return
    assert samples.labels == ["total", "shift_1", "shift_2", "shift_3"]
    there = ~np.isnan(samples.seconds_RNK[0, :, 1:])
    assert np.array_equal(there, np.eye(3, dtype=bool)[np.arange(12) % 3])
    assert [(p.label, p.time_us.n if p.time_us else 0) for p in record.phases] == [(f"shift_{s}", 4) for s in SHIFTS]
    assert [p.ledger.bottleneck_bytes for p in record.phases] == [64 * s for s in SHIFTS]


def test_bytes_and_rates_cover_one_rotation(pattern: str) -> None:
    measurement = measured(Settings(iterations=30))
    record, samples = measurement.record, measurement.samples
    assert record.ledger is not None
    assert samples is not None
    assert record.ledger.sent_bytes["node"] == RANKS * 64 * sum(SHIFTS)
    assert record.ledger.bottleneck_bytes == 64 * sum(SHIFTS)
    seconds = sum(np.median(samples.slowest_N[k::3]) for k in range(3))
    assert record.alg_gb_per_s == pytest.approx(64 * sum(SHIFTS) / seconds / 1e9)
    assert record.ledger.bottleneck_gb_per_s == pytest.approx(record.alg_gb_per_s)
    if pattern == "one name":
        assert [p.label for p in record.phases] == ["shift"]
        assert record.phases[0].ledger.bottleneck_bytes == 64 * sum(SHIFTS)


@pytest.mark.usefixtures("pattern")
def test_block_has_whole_rotations() -> None:
    record = measured(Settings(iterations=4), Timing.PIPELINED).record
    assert (record.launches_per_sample, record.status) == (6, "ok")


@pytest.mark.usefixtures("pattern")
@pytest.mark.parametrize("variant", range(3))
def test_wrong_data_in_one_variant_are_found(variant: int) -> None:
    def spoil(transport: ThreadTransport) -> None:
        compiled, original = [], transport.compile

        def compile_(schedule: Schedule, buffers: dict[str, np.ndarray]) -> object:
            compiled.append(schedule)
            program = original(schedule, buffers)
            if len(compiled) - 1 != variant or transport.rank != 2:
                return program
            step = program.steps[0]

            def launch() -> None:
                step.launch()
                buffers["recv"][5] += 1

            return type(program)((type(step)(step.label, launch),))

        transport.compile = compile_  # type: ignore[method-assign,assignment]

    record = measured(Settings(iterations=6), spoil=spoil).record
    assert (record.status, record.wrong, record.wrong_ranks) == ("wrong", 2, [2])


def test_memory_covers_the_largest_variant(pattern: str) -> None:
    assert pattern
    assert memory_needed(Case(pattern="shifts", nbytes=64), Topology.single_node(RANKS)) == 2 * 64 * 3


def test_variants_that_cannot_share_buffers_are_refused() -> None:
    single = Topology.single_node(RANKS)
    with pytest.raises(ValueError, match="same inputs, element type and world size"):
        shared_buffers([shifted(1, "a", single), shifted(1, "a", single, dtype="float64")])
