"""What the record of a MoE dispatch says: the ledger against what was seen on the wire, rows, ratios and bases."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncclbench.buffers import Buffers
from ncclbench.measure.case import build_variants, run_case
from ncclbench.plan import Settings
from ncclbench.schedule import AllToAllV, Case, Schedule
from ncclbench.schedule.experts.control import equal_rows
from ncclbench.schedule.phases import Collective, Ints, SimplePhase, flatten
from ncclbench.store.records import Record
from ncclbench.topology import Link, Topology
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play, received
from tests.moe_cases import ALL, ROUTINGS, case_of, run

# The ledger against what was seen on the wire.


class Wire(ThreadTransport):
    """Counts the bytes of every pair in every phase as they are read from the other rank's buffer."""

    def __init__(self, real: ThreadTransport, seen: Counter[tuple[str, int, int]]) -> None:
        super().__init__(real.world, real.rank)
        self.seen = seen

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program = super().compile(schedule, buffers)
        steps = [
            Step(step.label, self._counted(step, phase))
            for step, phase in zip(program.steps, flatten(schedule.phases), strict=True)
        ]
        return replace(program, steps=tuple(steps))

    def _counted(self, step: Step, phase: SimplePhase) -> Callable[[], None]:
        def launch() -> None:
            if isinstance(phase, AllToAllV | Collective):
                self._note(phase)
            step.launch()

        return launch

    def _note(self, phase: AllToAllV | Collective) -> None:
        """Play the phase on buffers whose every byte is the name of the rank that has it."""
        group = next(list(map(int, ranks)) for ranks in phase.groups if self.rank in ranks)
        named = {rank: np.full(self.capacity, rank, np.uint8) for rank in group}
        arrived = np.concatenate([values for _, values in received(phase, self.rank, group, named, 1)])
        for rank in group:
            count, key = int(np.count_nonzero(arrived == rank)), (phase.label, rank, self.rank)
            assert self.seen.setdefault(key, count) == count  # every launch moves the same

    capacity = 1 << 17


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
    params=st.sampled_from([p for p in ALL if not p.get("quad")]),
    routing=st.sampled_from(ROUTINGS),
)
def test_the_ledger_counts_what_is_on_the_wire(
    seed: int, tokens: list[int], params: dict[str, Any], routing: str
) -> None:
    case = case_of(**params, seed=seed, tokens=",".join(map(str, tokens)), routing=routing, routings=1)
    seen: Counter[tuple[str, int, int]] = Counter()
    once = Settings(iterations=1, warmup=0, check=False)
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    if "placement" in params:
        case = case_of(**{**case.params, "placement": "2x2"})
    measured = play(4, lambda real: run_case(case, Wire(real, seen), topology, once))[0]
    assert measured is not None
    for phase in measured.record.phases:
        by_link = Counter[str]()
        for (label, src, dst), nbytes in seen.items():
            if label == phase.label:
                by_link[Link(int(topology.link_classes(src, dst))).label] += nbytes
        assert {k: v for k, v in phase.ledger["sent_bytes"].items() if v} == dict(by_link), phase.label
    check_the_matrices(case, measured.record, seen)


def check_the_matrices(case: Case, record: Record, seen: Counter[tuple[str, int, int]]) -> None:
    """Rows that the record names are the rows of that phase on the wire."""
    facts, variant = record.facts[0], case.params["variant"]
    if variant in ("padded", "control"):
        return
    basis, label = ("rank_dedup", "dispatch") if case.params.get("dedup") != "selection" else ("selection", "dispatch")
    if variant == "hierarchical":
        basis, label = "domain_dedup", "dispatch_rail"
    row_bytes = facts["row_bytes"]
    if case.params.get("scales") == "separate":
        row_bytes = case.params["hidden"]
    for src, dst in product(range(4), repeat=2):
        assert facts["rows"][basis][0][src][dst] * row_bytes == seen[label, src, dst]


def test_hierarchical_sends_each_token_once_to_a_domain() -> None:
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    params = {"tokens": "40", "experts": 32, "top_k": 8, "routings": 1}
    flat, rail = (run(case_of(**params, variant=v), 4, topology) for v in ("flat", "hierarchical"))
    facts = flat.facts[0]
    assert facts["routing_sha256"] == rail.facts[0]["routing_sha256"]
    tokens_to_other_domain = sum(facts["rows"]["domain_dedup"][0][s][d] for s, d in [(0, 2), (1, 3), (2, 0), (3, 1)])
    assert 0 < tokens_to_other_domain <= 160

    def crossing(record: Record, label: str) -> int:
        sent = next(phase.ledger["sent_bytes"] for phase in record.phases if phase.label == label)
        return int(sent["same_rail"] + sent["cross_rail"])

    assert crossing(rail, "dispatch_rail") == tokens_to_other_domain * 64
    assert crossing(rail, "dispatch_domain") == 0
    assert crossing(flat, "dispatch") > 1.5 * crossing(rail, "dispatch_rail")


# The splits that reach the host.


class Reading(ThreadTransport):
    """Keeps the calls that bring counts to the host, and the all-to-all that each stands before."""

    def __init__(self, real: ThreadTransport) -> None:
        super().__init__(real.world, real.rank)
        self.read: list[tuple[str, Any, list[int]]] = []

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program, phases = super().compile(schedule, buffers), flatten(schedule.phases)
        for k, step in enumerate(program.steps):
            if step.label.startswith("splits"):
                moved = next(phase for phase in phases[k:] if isinstance(phase, AllToAllV))
                group, member = (int(place) for place in np.argwhere(moved.groups == self.rank)[0])
                self.read.append((moved.label, step.launch, moved.rows[group, :, member].tolist()))
        return program


@pytest.mark.parametrize(
    ("params", "labels"),
    [({}, ["dispatch"]), ({"dedup": "selection"}, ["dispatch"]),
     ({"variant": "hierarchical"}, ["dispatch_rail", "dispatch_domain"])],
)  # fmt: skip
def test_the_splits_that_reach_the_host_are_those_of_the_ready_calls(params: dict[str, Any], labels: list[str]) -> None:
    """The calls do not read them, so that they must be the same for the benchmark to be of a real layer."""
    topology, case = Topology.from_hosts(["x", "x", "y", "y"]), case_of(routing="zipf:1.5", routings=1, **params)

    def main(real: ThreadTransport) -> list[tuple[str, Any, list[int]]]:
        reading = Reading(real)
        run_case(case, reading, topology, Settings(iterations=1, warmup=0))
        return reading.read

    for found in play(4, main):
        assert [label for label, _, _ in found] == labels
        for _, call, expected in found:
            assert call.splits == expected
            assert sum(expected)


# What the record says.


def test_the_record_of_a_flat_dispatch() -> None:
    record = run(case_of(routing="zipf:1.5"), 4, settings=Settings(iterations=8, warmup=1))
    labels = ["counts", "splits", "pack", "dispatch", "pack_meta", "dispatch_meta", "expert", "expert_reduce",
              "combine", "unpack"]  # fmt: skip
    assert [phase.label for phase in record.phases] == labels
    assert all(phase.time_us is not None for phase in record.phases)
    assert record.subtotals["dispatch"].labels == labels[:8]
    assert record.subtotals["combine"].labels == labels[8:]
    assert record.subtotals["comm_only"].labels == ["dispatch", "combine"]
    assert record.subtotals["roundtrip"].time_us.p50 > record.subtotals["comm_only"].time_us.p50
    assert len(record.facts) == record.variants == 2
    facts = record.facts[0]
    assert facts["max_vio"] > 0.5
    assert facts["max_over_mean_received"] > 1
    assert facts["over_capacity"] > 0
    assert len(facts["routing_sha256"]) == 64
    dispatch = record.phases[3].ledger
    assert dispatch["links"]["node"]["bottleneck_bytes"] == dispatch["bottleneck_bytes"]
    bases = [fact["bases"]["rank_dedup"] for fact in record.facts]
    assert dispatch["bottleneck_bytes"] == sum(base["bottleneck_bytes"] for base in bases)
    assert dispatch["sent_bytes"]["node"] == sum(base["remote_bytes"] for base in bases)
    assert record.comparable["deepep_dispatch"].over == "dispatch"
    assert "its own included" in record.comparable["deepep_dispatch"].definition


def test_deepep_counts_the_ranks_own_rows_and_we_do_not() -> None:
    record = run(case_of(routings=1), 2)
    rows = np.array(record.facts[0]["rows"]["rank_dedup"][0])
    assert record.comparable["deepep_dispatch"].bytes == rows.sum(axis=0).max() * 64
    assert record.facts[0]["bases"]["rank_dedup"]["bottleneck_bytes"] == max(rows[0, 1], rows[1, 0]) * 64


def test_deepep_counts_the_rows_that_are_moved() -> None:
    record = run(case_of(routings=1, dedup="selection"), 2)
    rows = np.array(record.facts[0]["rows"]["selection"][0])
    assert record.comparable["deepep_dispatch"].bytes == rows.sum(axis=0).max() * 64


# Experts 2r and 2r + 1 live on rank r; ranks 0 and 1 are a domain, and 2 and 3. Received from others, by rank:
# once a choice 1, 4, 2, 1; once a rank 1, 2, 2, 1; by way of domains 1, 2, 2, 2: rank 3 passes on both rows of rank 2.
_TRACE = [(0, 0, [2, 3]), (0, 1, [2, 3]), (1, 0, [4, 6]), (1, 1, [0, 4])]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 2 / 1.5),
        ({"variant": "cached", "dedup": "selection"}, 4 / 2),
        ({"dedup": "selection"}, 4 / 2),
        ({"variant": "padded"}, 2 / 1.5),
        ({"variant": "control"}, 2 / 1.5),
        ({"variant": "hierarchical"}, 2 / 1.75),
    ],
)
def test_the_busiest_receiver_is_that_of_the_rows_that_are_moved(
    params: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [json.dumps({"rank": rank, "token": token, "experts": experts}) for rank, token, experts in _TRACE]
    trace.write_text("\n".join(lines))
    case = case_of(experts=8, top_k=2, tokens="", routing=f"trace:{trace}", **params)
    facts = build_variants(case, Topology.from_hosts(["x", "x", "y", "y"]))[0].facts
    assert facts["max_over_mean_received"] == pytest.approx(expected)


def test_padding_is_reported_and_control_moves_the_same_bytes_in_equal_splits() -> None:
    params = {"routing": "zipf:1.5", "routings": 2, "tokens": "50"}
    flat, padded, control = (run(case_of(**params, variant=v), 4) for v in ("flat", "padded", "control"))
    for fact in padded.facts:
        rows = np.array(fact["rows"]["rank_dedup"])
        assert fact["padding_ratio"] == pytest.approx(fact["padded_to"] * 16 / rows.sum())
        assert fact["padded_to"] >= rows.max()
    assert [phase.label for phase in control.phases] == ["dispatch", "combine", "control_dispatch", "control_combine"]
    moved = [sum(p.ledger["sent_bytes"].values()) for p in (flat.phases[3], *control.phases[:3:2])]
    assert moved[0] == moved[1] == moved[2]
    busiest = [phase.ledger["bottleneck_bytes"] for phase in control.phases]
    assert busiest[0] > 1.1 * busiest[2]
    penalty = control.subtotals["comm_only"].time_us.p50 / control.subtotals["control_comm_only"].time_us.p50
    assert control.ratios == {"skew_penalty": pytest.approx(penalty)}
    assert control.variants == 4
    assert len(control.facts) == 2
    assert flat.ratios == {}


@given(st.integers(1, 9), st.integers(0, 400))
def test_equal_splits_are_as_equal_as_whole_rows_can_be(members: int, total: int) -> None:
    matrix: Ints = np.zeros((members, members), np.int64)
    matrix[0, members - 1] = total
    rows = equal_rows(matrix)
    assert rows.sum() == total
    assert rows.max() - rows.min() <= 1
    for axis in (0, 1):
        sums = rows.sum(axis=axis)
        assert sums.max() - sums.min() <= 1
