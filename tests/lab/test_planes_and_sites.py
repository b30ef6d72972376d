"""Faults of planes and sites, on real packets: MPI stripes over all planes, so a plane is a share of its NIC's rate."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ncclbench.analysis.flows import endpoint_medians, far_over_near_by_leaf, flows_of
from ncclbench.store.run_directory import read_run
from scripts.lab import faults, kernel
from scripts.lab.plan import Lab
from tests.helpers.stored import known
from tests.lab.conftest import NBYTES
from tests.lab.test_lab import heals
from tests.lab.test_path import command_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.ranks]

# Two planes of 50 Mbit/s, so slow that a busy machine leaves most flows two thirds of it.
WHOLE = 65.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two sites of two nodes, each with one NIC of two planes."""
    if (reason := kernel.unable()) is not None:
        pytest.skip(reason)
    found = Lab(prefix=f"t{uuid.uuid4().hex[:8]}", nodes=4, rails=1, planes=2, sites=2, nic_rate=5e7, spine_rate=2e8)
    try:
        kernel.make(found)
        yield found
    finally:
        kernel.remove(found.prefix)


@pytest.mark.parametrize(
    ("where", "name", "value", "ways"),
    [
        ("nic", "n1:r0:p1", "50%", ("send", "receive")),
        ("uplink", "a-leaf0p1", "30mbit", ("receive",)),  # from the leaf up, as the spine sees it
        ("site", "a", "30mbit", ("send",)),
    ],
)
def test_what_is_slow_shows_where_it_is(
    lab: Lab, tmp_path: Path, where: str, name: str, value: str, ways: tuple[str, ...]
) -> None:
    on = faults.inject(lab, [], where, name, "rate", value, ways)
    try:
        line = f"run leaf_contrast --param direction=apart -b {2 * NBYTES} -e {2 * NBYTES} -n 30 -w 1 --transport mpi"
        done = command_line(lab, tmp_path, line, "--mpi")
    finally:
        faults.heal(lab, on)
    assert done.returncode == 0, done.stderr[-2000:]
    run = read_run(tmp_path / "run")
    (record,) = run.records
    table = flows_of(record)
    assert len(table.src) == 12, "every pair"
    rates = (table.gb_per_s * 8e3).tolist()
    mbit = {(a, b): x for a, b, x in zip(table.src.tolist(), table.dst.tolist(), rates, strict=True)}
    assert record.path is not None
    assert record.path.proof == "proven", "both planes together carried what had to go"
    if where == "nic":  # one plane of two at half its rate: the NIC has half of its rate, and no other NIC has less
        ends = endpoint_medians(table, 4)
        assert ends.send[1] * 8e3 <= 60, mbit
        assert ends.receive[1] * 8e3 <= 60, mbit
        assert typical(mbit, lambda src, dst: 1 not in (src, dst)) >= WHOLE, mbit
        return
    # Two flows at once share what is left; the other way, and inside a site, all is as it was.
    assert typical(mbit, lambda src, dst: src < 2 <= dst) <= 40, mbit
    assert typical(mbit, lambda src, dst: dst < 2 <= src) >= WHOLE, mbit
    assert typical(mbit, lambda src, dst: (src < 2) == (dst < 2)) >= WHOLE, mbit
    wiring = known(known(run.topology).wiring)
    ratios = {wiring.leaf_names[k]: x for k, x in far_over_near_by_leaf(record, wiring.leaves).items()}
    # A leaf of several planes is called by the first of them.
    assert ratios["a-leaf0p0"] < 0.7 * ratios["b-leaf0p0"], ratios


def typical(mbit: dict[tuple[int, int], float], which: Callable[[int, int], bool]) -> float:
    """The median of some flows: a single one may have had to wait for a core."""
    return float(np.median([rate for pair, rate in mbit.items() if which(*pair)]))


@pytest.mark.parametrize(("kind", "value"), [("rate", "10mbit"), ("delay", "10ms"), ("loss", "1%"), ("down", "")])
def test_a_cable_between_sites_is_healed(lab: Lab, kind: str, value: str) -> None:
    heals(lab, "site", "b", kind, value)
