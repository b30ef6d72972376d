"""One rank of a job that stays: it measures whatever case the test asks for next, so that a fault can come between.

    worker.py SOCKET TOPOLOGY

Rank 0 reads requests from the socket, ``{"pattern": ..., "nbytes": ..., "params": ..., "settings": {...}}``, and
answers each with the record. Everything below that is the product's own: launcher detection, meeting, transport,
topology file, `run_case`.
"""

import json
import os
import socket
import sys
from multiprocessing.connection import Client
from typing import Any

import msgspec

from ncclbench.launch.launcher_detection import detect
from ncclbench.launch.rendezvous import with_store
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings
from ncclbench.schedule.case import Case
from ncclbench.topology.placement import place_ranks
from ncclbench.topology.topology_file import read_topology
from ncclbench.transports.base import Transport, all_gather_text, broadcast_text
from ncclbench.transports.gloo import open_transport

_PATIENCE_SECONDS = 600.0


def main() -> None:
    """Join, and measure until told to stop."""
    identity = detect(os.environ)
    assert identity is not None
    transport: Transport = open_transport("gloo", with_store(identity), _PATIENCE_SECONDS)
    hosts = all_gather_text(transport.control, socket.gethostname())
    topology = place_ranks(read_topology(sys.argv[2]), hosts)
    link = Client(sys.argv[1]) if identity.rank == 0 else None
    if link:
        link.send(msgspec.json.encode({"hosts": hosts, "topology": topology.as_record()}).decode())
    while request := broadcast_text(transport.control, link.recv() if link else ""):
        wanted: dict[str, Any] = json.loads(request)
        settings = Settings(warmup=1, seed=7, timeout=60.0, **wanted.pop("settings"))
        measured = run_case(Case(**wanted), transport, topology, settings)
        if link:
            assert measured is not None
            link.send(msgspec.json.encode(measured.record).decode())
    transport.close()


if __name__ == "__main__":
    main()
