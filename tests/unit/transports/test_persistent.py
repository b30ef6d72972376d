import pytest

from ncclbench.config.plugins import load, names
from ncclbench.errors import UsageError
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Collective, CollectiveParams
from ncclbench.schedule.pattern import build_schedule
from ncclbench.store.records import Record
from ncclbench.topology import Topology
from ncclbench.transports.threads import ThreadTransport, play

COLLECTIVES = [name for name in names("patterns") if issubclass(load("patterns", name).Params, CollectiveParams)]


@pytest.mark.parametrize("pattern", COLLECTIVES)
def test_the_parameter_reaches_the_phase(pattern: str) -> None:
    for value in (False, True):
        schedule = build_schedule(
            Case(pattern=pattern, nbytes=64, params={"persistent": value}), Topology.single_node(2)
        )
        (phase,) = schedule.phases
        assert isinstance(phase, Collective)
        assert phase.persistent is value


def test_a_transport_without_persistent_collectives_skips() -> None:
    case = Case(pattern="all_reduce", nbytes=64, params={"persistent": True})

    def main(transport: ThreadTransport) -> Record | None:
        measured = run_case(case, transport, Topology.single_node(2), Settings(iterations=6))
        return measured.record if measured else None

    record = play(2, main)[0]
    assert record is not None
    assert record.status == "skipped"
    assert "no persistent collectives" in str(record.reason)


def test_flows_have_no_such_parameter() -> None:
    with pytest.raises(UsageError, match="has no parameter 'persistent'"):
        build_schedule(Case(pattern="send_recv", nbytes=64, params={"persistent": True}), Topology.single_node(2))
