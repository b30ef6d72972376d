"""A transport without ranks, in one file: every byte that the busiest rank sends or receives takes a nanosecond."""

from collections.abc import Sequence

import numpy as np

from ncclbench.errors import Unable
from ncclbench.measure.executor import ModelExecutor
from ncclbench.measure.sampling import Samples
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case, Schedule
from ncclbench.schedule.ledger import schedule_ledger
from ncclbench.topology import Topology
from ncclbench.transports.capabilities import Capabilities, Hosting

CAPABILITIES = Capabilities(name="toy", hosting=Hosting.NONE, devices=(), uses_nics=False, simulated=True)


class Toy(ModelExecutor):
    """Computes times."""

    def samples(self, case: Case, variants: Sequence[Schedule], topology: Topology, settings: Settings) -> Samples:
        """The same duration in every iteration."""
        if case.pattern == "broadcast":
            raise Unable("toy has no model of a broadcast")
        ledgers = [schedule_ledger(variant, topology) for variant in variants]
        busiest = [max(one.sent.sum(axis=1).max(), one.received.sum(axis=1).max()) for one in ledgers]
        seconds = np.array([busiest[k % len(busiest)] * 1e-9 for k in range(settings.iterations or 6)])
        seconds_RNK = np.broadcast_to(seconds[None, :, None], (topology.world_size, len(seconds), 1)).copy()
        return Samples(["total"], seconds_RNK, "iterations")


def open_executor(_name: str, world_size: int) -> Toy:
    """The executor of a run of `world_size` ranks."""
    return Toy(CAPABILITIES, world_size)
