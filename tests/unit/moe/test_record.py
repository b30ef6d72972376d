"""The record of a MoE dispatch: the ledger against the bytes on the wire, rows, ratios and bases."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncclbench.buffers.arrays import Buffers
from ncclbench.measure.case import run_case
from ncclbench.moe.equal_split_control import equal_rows
from ncclbench.plan.plan import Settings, parse_plan
from ncclbench.schedule import AllToAllV, Case, Collective, RowWork, Schedule
from ncclbench.schedule.ledger import flows
from ncclbench.schedule.pattern import build_variants
from ncclbench.schedule.phases import Ints, SimplePhase, flatten
from ncclbench.schedule.row_formats import FORMATS
from ncclbench.store.records import Record
from ncclbench.topology import Link, Topology
from ncclbench.transports import threads
from ncclbench.transports.base import Program, Step
from ncclbench.transports.threads import ThreadTransport, play, received
from tests.helpers.exhaustive import exhaustive_if
from tests.helpers.moe_cases import ALL, ONCE, SMALL, case_of, facts_of, named, run, write_lines
from tests.helpers.stored import known, plain

# The ledger against the bytes on the wire.


Pairs = dict[tuple[str, int, int], int]
"""Bytes by phase, source and destination."""


class Watched(np.ndarray[Any, Any]):
    """Another rank's buffer; counts the bytes that are read from it."""

    taken: Callable[[int], None] | None = None

    def __getitem__(self, key: Any) -> Any:
        found = np.asarray(self)[key]
        if self.taken:
            self.taken(found.nbytes)
        return found


class Wire(ThreadTransport):
    """Records the bytes that this rank copies from each rank's buffer in every phase, its own included."""

    def __init__(self, real: ThreadTransport, seen: Pairs) -> None:
        super().__init__(real.world, real.rank)
        self.seen = seen

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        """The same program, with buffers that count what other ranks copy."""
        program = super().compile(schedule, buffers)
        self.world.program(self._programs)[self.rank] = {name: self._watched(array) for name, array in buffers.items()}
        steps = [
            Step(step.label, self._counted(step, phase))
            for step, phase in zip(program.steps, flatten(schedule.phases), strict=True)
        ]
        return replace(program, steps=tuple(steps))

    def _watched(self, array: Any) -> Watched:
        found: Watched = array.view(Watched)
        found.taken = lambda nbytes: taken_by[threading.get_ident()].update({self.rank: nbytes})
        return found

    def _counted(self, step: Step, phase: SimplePhase) -> Callable[[], None]:
        def launch() -> None:
            moved = taken_by[threading.get_ident()] = Counter()
            step.launch()
            assert not moved or isinstance(phase, AllToAllV | Collective)
            for src in range(self.world_size) if isinstance(phase, AllToAllV | Collective) else ():
                key = (phase.label, src, self.rank)
                assert self.seen.setdefault(key, moved[src]) == moved[src]  # every launch moves the same bytes

        return launch


taken_by: dict[int, Counter[int]] = {}
"""The bytes that each thread (one per rank) has read from each rank's buffers in its current phase."""

EXPERTS, TOP_K, RANKS, HIDDEN = 10, 3, 4, 32
TOKEN = st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
TABLES = st.lists(st.lists(TOKEN, max_size=5), min_size=RANKS, max_size=RANKS).filter(any)
"""Experts that every token of each rank chooses: any table, not only those of a router."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for traces."""
    return tmp_path_factory.mktemp("traces")


# The fast suite: flat, separate scales, the control, and hierarchical.
FEW = [ALL[0], ALL[2], ALL[6], ALL[7]]


@pytest.mark.parametrize("params", exhaustive_if(lambda params: params not in FEW, ALL), ids=named)
@settings(max_examples=12)
@given(table=TABLES)
def test_ledger_equals_bytes_on_the_wire(folder: Path, params: dict[str, Any], table: list[list[list[int]]]) -> None:
    """For every pair in every phase of every variant: the bytes copied, the ledger, and the table counted by hand."""
    rows = [{"rank": r, "token": t, "experts": chosen} for r, mine in enumerate(table) for t, chosen in enumerate(mine)]
    trace = folder / f"{hashlib.sha256(repr(table).encode()).hexdigest()}.jsonl"
    write_lines(trace, rows)
    shape = {"hidden": HIDDEN, "experts": EXPERTS, "top_k": TOP_K, "tokens": ""}
    case = case_of(**{**params, **shape, "routing": f"trace:{trace}"})
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    record, seen = on_the_wire(case, topology)
    assert (record.status, record.wrong) == ("ok", 0)  # the copied data are also correct
    schedules = build_variants(case, topology)
    assert {label for label, _, _ in seen} == {
        phase.label for schedule in schedules for phase in schedule.phases if not isinstance(phase, RowWork)
    }
    assert seen == in_ledger(schedules)
    for phase in record.phases:
        by_link = Counter[str]()
        for (label, src, dst), nbytes in seen.items():
            if label == phase.label:
                by_link[Link(int(topology.link_classes(src, dst))).label] += nbytes
        assert {k: v for k, v in phase.ledger.sent_bytes.items() if v} == dict(+by_link), phase.label
    by_hand = counted_by_hand(table, params)
    assert {key: nbytes for key, nbytes in seen.items() if key[0] in {label for label, _, _ in by_hand}} == by_hand
    left = {label for label, _, _ in seen} - {label for label, _, _ in by_hand}
    assert all(label.startswith(("counts", "control_")) for label in left)  # which do not follow from choices


def on_the_wire(case: Case, topology: Topology) -> tuple[Record, Pairs]:
    """The record of a case, and the bytes that its ranks copied from each other."""
    seen = Pairs()
    measured = play(topology.world_size, lambda real: run_case(case, Wire(real, seen), topology, ONCE))[0]
    assert measured is not None
    return measured.record, seen


def in_ledger(schedules: Sequence[Schedule], ranks: int = RANKS) -> Pairs:
    """The bytes that the ledger counts between every two ranks, without zeros."""
    found = Pairs()
    for schedule in schedules:
        for phase in flatten(schedule.phases):
            if isinstance(phase, AllToAllV | Collective):
                found |= {(phase.label, src, dst): 0 for src, dst in product(range(ranks), repeat=2)}
            for flow in flows(phase, schedule.dtype.itemsize):
                for src, dst, nbytes in zip(*(part.tolist() for part in flow), strict=True):
                    found[phase.label, src, dst] += nbytes
    return found


def counted_by_hand(table: list[list[list[int]]], params: dict[str, Any]) -> Pairs:
    """Bytes of all-to-alls of rows, from the choices alone."""
    form = FORMATS[params.get("format", "bf16")]
    apart = params.get("scales") == "separate"
    out = {"": form.payload_bytes(HIDDEN) if apart else form.row_bytes(HIDDEN)}
    if params["variant"] != "control":
        out["_meta"] = 8 * (1 if params.get("dedup") == "selection" else TOP_K)
    if apart:
        out["_scales"] = form.scale_bytes(HIDDEN)
    found = Pairs()
    for hop, rows in hops_by_hand(table, params).items():
        for (src, dst), number in rows.items():
            found |= {(f"dispatch{hop}{kind}", src, dst): number * nbytes for kind, nbytes in out.items()}
            found[f"combine{hop}", dst, src] = number * 2 * HIDDEN
            if params.get("quad"):
                found[f"combine{hop}_bwd", src, dst] = found[f"dispatch{hop}_bwd", dst, src] = number * 2 * HIDDEN
    return found


def hops_by_hand(table: list[list[list[int]]], params: dict[str, Any]) -> dict[str, dict[tuple[int, int], int]]:
    """Rows from each rank to each, by hop; ranks 0 and 1 are a domain, and so are 2 and 3."""
    rail, last = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    hierarchical = params["variant"] == "hierarchical"
    for src, tokens in enumerate(table):
        for chosen in tokens:
            homes = [expert * RANKS // EXPERTS for expert in chosen]
            for dst in homes if params.get("dedup") == "selection" else set(homes):
                # The proxy has the position in the domain of `dst` that `src` has in its own domain.
                last[dst // 2 * 2 + src % 2 if hierarchical else src, dst] += 1
            rail.update((src, domain * 2 + src % 2) for domain in {home // 2 for home in homes})
    pairs = [(src, dst) for src in range(RANKS) for dst in range(RANKS)]
    if params["variant"] == "padded":
        return {"": dict.fromkeys(pairs, max(last.values()))}
    if hierarchical:
        return {"_rail": {pair: rail[pair] for pair in pairs}, "_domain": {pair: last[pair] for pair in pairs}}
    return {"": {pair: last[pair] for pair in pairs}}


def test_wire_counter_sees_unplanned_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail: a transport that reads 8 bytes too many from the first rank."""

    def greedy(phase: Any, rank: int, party: list[int], sources: Any, itemsize: int) -> Any:
        sources[party[0]][:8].copy()
        return received(phase, rank, party, sources, itemsize)

    case, topology = case_of(routings=1), Topology.single_node(RANKS)
    _, seen = on_the_wire(case, topology)
    assert seen == in_ledger(build_variants(case, topology))
    monkeypatch.setattr(threads, "received", greedy)
    _, excess = on_the_wire(case, topology)
    assert excess == {key: nbytes + 8 * (key[1] == 0) for key, nbytes in seen.items()}


def placements() -> list[Case]:
    """The plan moe-placement with few, narrow tokens."""
    text = (resources.files("ncclbench_patterns") / "plans" / "moe-placement.toml").read_text()
    small = text.replace("tokens = 4096", "tokens = 4, hidden = 32, routings = 1")
    assert small != text
    return [planned.case for planned in parse_plan(small, "moe-placement.toml").cases]


@pytest.mark.exhaustive
def test_placement_plan_on_32_ranks_matches_its_ledger() -> None:
    """All its schedules are built; the cases that are run cover every pair of parameter values."""
    topology = Topology.single_node(32)
    cases = placements()
    assert len(cases) == 3 * 2 * 2 * 2
    chosen = []
    for case in cases:
        schedules, params = build_variants(case, topology), case.params
        crossing = in_ledger(schedules, 32)
        size = int(str(params["placement"]).partition("x")[0])
        hierarchical = params.get("variant") == "hierarchical"
        rows = facts_of(schedules[0])["rows"]["domain_dedup" if hierarchical else "rank_dedup"][0]
        label = "dispatch_rail" if hierarchical else "dispatch"
        assert all(
            crossing[label, src, dst] == rows[src][dst] * facts_of(schedules[0])["row_bytes"]
            for src, dst in product(range(32), repeat=2)
        )
        if hierarchical:  # the second hop stays in a domain, and the first keeps the position in it
            away = [(s, d) for s, d in product(range(32), repeat=2) if s // size != d // size]
            assert not any(crossing["dispatch_domain", s, d] for s, d in away)
            assert not any(crossing["dispatch_rail", s, d] for s, d in away if s % size != d % size)
        if ("routing" in params) ^ hierarchical == (size == 16) and ("format" in params) ^ hierarchical == (size == 8):
            chosen.append(case)
    assert len(chosen) == 6
    for case in chosen:
        record, seen = on_the_wire(case, topology)
        assert (record.status, record.wrong) == ("ok", 0), record.case
        assert seen == in_ledger(build_variants(case, topology), 32)


@pytest.mark.parametrize("params", ALL, ids=named)
def test_recorded_rows_match_the_ledger(params: dict[str, Any]) -> None:
    """The basis is that of the variant: none for padded rows, and by rank for the control."""
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    case = case_of(**{**params, "tokens": "9,0,30,1", "routings": 1})
    first, *_ = schedules = build_variants(case, topology)
    facts = facts_of(first)
    basis, label = ("selection" if params.get("dedup") == "selection" else "rank_dedup"), "dispatch"
    if params["variant"] == "hierarchical":
        basis, label = "domain_dedup", "dispatch_rail"
    row_bytes = SMALL["hidden"] if params.get("scales") == "separate" else facts["row_bytes"]
    ledger = in_ledger(schedules)
    for src, dst in product(range(RANKS), repeat=2):
        rows = facts["padded_to"] if params["variant"] == "padded" else facts["rows"][basis][0][src][dst]
        assert rows * row_bytes == ledger[label, src, dst]
    assert (params["variant"] == "padded") == ("padded_to" in first.facts)


def test_hierarchical_sends_each_token_once_per_domain() -> None:
    topology = Topology.from_hosts(["x", "x", "y", "y"])
    params = {"tokens": "40", "experts": 32, "top_k": 8, "routings": 1}
    flat, rail = (run(case_of(**params, variant=v), 4, topology) for v in ("flat", "hierarchical"))
    facts = plain(flat.facts)[0]
    assert facts["routing_sha256"] == rail.facts[0]["routing_sha256"]
    tokens_to_other_domain = sum(facts["rows"]["domain_dedup"][0][s][d] for s, d in [(0, 2), (1, 3), (2, 0), (3, 1)])
    assert 0 < tokens_to_other_domain <= 160

    def crossing(record: Record, label: str) -> int:
        sent = next(phase.ledger.sent_bytes for phase in record.phases if phase.label == label)
        return sent["same_rail"] + sent["cross_rail"]

    assert crossing(rail, "dispatch_rail") == tokens_to_other_domain * 64
    assert crossing(rail, "dispatch_domain") == 0
    assert crossing(flat, "dispatch") > 1.5 * crossing(rail, "dispatch_rail")


# The splits that reach the host.


class Reading(ThreadTransport):
    """Records the calls that copy counts to the host, and the all-to-all that follows each."""

    def __init__(self, real: ThreadTransport) -> None:
        super().__init__(real.world, real.rank)
        self.read: list[tuple[str, Any, list[int]]] = []

    def compile(self, schedule: Schedule, buffers: Buffers) -> Program:
        program, phases = super().compile(schedule, buffers), flatten(schedule.phases)
        for k, step in enumerate(program.steps):
            if step.label.startswith("splits"):
                moved = next(phase for phase in phases[k:] if isinstance(phase, AllToAllV))
                group, member = (int(index) for index in np.argwhere(moved.groups == self.rank)[0])
                self.read.append((moved.label, step.launch, moved.rows[group, :, member].tolist()))
        return program


@pytest.mark.parametrize(
    ("params", "labels"),
    [({}, ["dispatch"]), ({"dedup": "selection"}, ["dispatch"]),
     ({"variant": "hierarchical"}, ["dispatch_rail", "dispatch_domain"])],
)  # fmt: skip
def test_splits_on_the_host_match_the_compiled_calls(params: dict[str, Any], labels: list[str]) -> None:
    """The calls do not read these splits. They must be equal for the benchmark to represent a real layer."""
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


# Contents of the record.


def test_record_of_a_flat_dispatch() -> None:
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
    facts = plain(record.facts)[0]
    assert facts["max_vio"] > 0.5
    assert facts["max_over_mean_received"] > 1
    assert facts["over_capacity"] > 0
    assert len(facts["routing_sha256"]) == 64
    dispatch = record.phases[3].ledger
    assert dispatch.links["node"].bottleneck_bytes == dispatch.bottleneck_bytes
    bases = [fact["bases"]["rank_dedup"] for fact in plain(record.facts)]
    assert dispatch.bottleneck_bytes == sum(base["bottleneck_bytes"] for base in bases)
    assert dispatch.sent_bytes["node"] == sum(base["remote_bytes"] for base in bases)
    assert record.comparable["deepep_dispatch"].over == "dispatch"
    assert "its own included" in record.comparable["deepep_dispatch"].definition


def test_only_deepep_rates_include_own_rows() -> None:
    record = run(case_of(routings=1), 2)
    rows = np.array(plain(record.facts)[0]["rows"]["rank_dedup"][0])
    assert record.comparable["deepep_dispatch"].bytes == rows.sum(axis=0).max() * 64
    assert plain(record.facts)[0]["bases"]["rank_dedup"]["bottleneck_bytes"] == max(rows[0, 1], rows[1, 0]) * 64


def test_deepep_rates_count_the_rows_moved() -> None:
    record = run(case_of(routings=1, dedup="selection"), 2)
    rows = np.array(plain(record.facts)[0]["rows"]["selection"][0])
    assert record.comparable["deepep_dispatch"].bytes == rows.sum(axis=0).max() * 64


# Experts 2r and 2r + 1 are on rank r; ranks 0 and 1 are a domain, and so are 2 and 3. Rows received from others, by
# rank: once per choice 1, 4, 2, 1; once per rank 1, 2, 2, 1; via domains 1, 2, 2, 2, since rank 3 passes on
# both rows of rank 2.
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
def test_busiest_receiver_is_computed_from_rows_moved(params: dict[str, Any], expected: float, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [json.dumps({"rank": rank, "token": token, "experts": experts}) for rank, token, experts in _TRACE]
    trace.write_text("\n".join(lines))
    case = case_of(experts=8, top_k=2, tokens="", routing=f"trace:{trace}", **params)
    facts = build_variants(case, Topology.from_hosts(["x", "x", "y", "y"]))[0].facts
    assert facts["max_over_mean_received"] == pytest.approx(expected)


def test_padding_is_reported_and_control_moves_equal_bytes() -> None:
    params = {"routing": "zipf:1.5", "routings": 2, "tokens": "50"}
    flat, padded, control = (run(case_of(**params, variant=v), 4) for v in ("flat", "padded", "control"))
    for fact in plain(padded.facts):
        rows = np.array(fact["rows"]["rank_dedup"])
        assert fact["padding_ratio"] == pytest.approx(fact["padded_to"] * 16 / rows.sum())
        assert fact["padded_to"] >= rows.max()
    assert [phase.label for phase in control.phases] == ["dispatch", "combine", "control_dispatch", "control_combine"]
    moved = [sum(p.ledger.sent_bytes.values()) for p in (flat.phases[3], *control.phases[:3:2])]
    assert moved[0] == moved[1] == moved[2]
    busiest = [known(phase.ledger.bottleneck_bytes) for phase in control.phases]
    assert busiest[0] > 1.1 * busiest[2]
    penalty = control.subtotals["comm_only"].time_us.p50 / control.subtotals["control_comm_only"].time_us.p50
    assert control.ratios == {"skew_penalty": pytest.approx(penalty)}
    assert control.variants == 4
    assert len(control.facts) == 2
    assert flat.ratios == {}


@given(st.integers(1, 9), st.integers(0, 400))
def test_equal_splits_differ_by_at_most_one_row(members: int, total: int) -> None:
    matrix: Ints = np.zeros((members, members), np.int64)
    matrix[0, members - 1] = total
    rows = equal_rows(matrix)
    assert rows.sum() == total
    assert rows.max() - rows.min() <= 1
    for axis in (0, 1):
        sums = rows.sum(axis=axis)
        assert sums.max() - sums.min() <= 1
