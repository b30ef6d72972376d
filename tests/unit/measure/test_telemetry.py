"""GPUs are asked before and after a case, and not twice within a moment between two."""

from ncclbench.measure.telemetry import Telemetry
from ncclbench.store.records import GpuState, Json
from ncclbench.transports.base import Evidence
from ncclbench.transports.threads import ThreadTransport, play
from tests.helpers.stored import known


class Counting:
    """A transport with a device: each answer has the number of answers before it."""

    stream = object()

    def __init__(self, real: ThreadTransport) -> None:
        self.control, self.rank, self.asked = real.control, real.rank, 0

    def evidence(self) -> Evidence:
        self.asked += 1
        return Evidence(gpu=GpuState(errors={"rank": self.rank, "reading": self.asked}))


def readings(evidence: list[Evidence]) -> list[tuple[Json, Json]]:
    """The rank of each evidence, and how often that rank was read."""
    states = [known(known(one.gpu).errors) for one in evidence]
    return [(errors["rank"], errors["reading"]) for errors in states]


def test_recent_evidence_is_reused_by_the_next_case() -> None:
    def main(real: ThreadTransport) -> list[list[tuple[Json, Json]]]:
        now = [100.0]
        telemetry = Telemetry(Counting(real), clock=lambda: now[0])  # type: ignore[arg-type]
        seen = [readings(telemetry.before()), readings(telemetry.after())]  # however short a case, it is asked after it
        now[0] += 0.01
        seen += [readings(telemetry.before())]
        now[0] += 0.01
        seen += [readings(telemetry.after())]
        now[0] += 0.3 if real.rank else 0.1  # one rank is slower: each goes by its own clock, and none waits
        return [*seen, readings(telemetry.before())]

    for seen in play(2, main, 20.0):
        assert seen == [
            [(0, 1), (1, 1)],
            [(0, 2), (1, 2)],
            [(0, 2), (1, 2)],
            [(0, 3), (1, 3)],
            [(0, 3), (1, 4)],
        ]


def test_host_transport_has_no_evidence() -> None:
    def main(real: ThreadTransport) -> list[list[Evidence]]:
        telemetry = Telemetry(real)
        return [telemetry.before(), telemetry.after()]

    assert play(2, main, 20.0) == [[[], []], [[], []]]
