"""Outliers among equal rails, ranks and NICs, and the cases in which they cannot be identified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ncclbench.accept.profile import load_profile
from ncclbench.config.plugins import load
from ncclbench.errors import Exit
from ncclbench.store.records import Record
from ncclbench.store.verdict import Action, Verdict
from tests.helpers.acceptance import NODE, RAIL, WORLD, M, case, made, of
from tests.helpers.stored import plain

pytestmark = pytest.mark.usefixtures("unsynced")


def test_rail_at_half_speed_among_8_fails_and_is_named(tmp_path: Path) -> None:
    """The average time over rails is only 1.125 times the usual time."""
    document = made(tmp_path, cases=(NODE, case(RAIL, slow={3: 2.0}), WORLD))
    assert (document.verdict, document.exit_code) == (Verdict.FAIL, Exit.FAIL)
    (fleet,) = of(document, "fleet", Verdict.FAIL)
    assert fleet.subject == f"{RAIL.id}: rail 3"
    assert fleet.action is Action.CHECK_SWITCH
    rows = [row for row in fleet.evidence if "ranks" in row]
    assert [row["start"] for row in rows] == [0, 1, 2]
    assert all(row["ranks"] == [3 + 8 * node for node in range(8)] for row in rows)
    (floor,) = of(document, "floor", Verdict.FAIL)
    assert "rail 3" in floor.reason


def test_rail_beyond_the_margin_is_found_above_its_floor(tmp_path: Path) -> None:
    rules = load_profile("h100-hgx-ib")
    fast = case(RAIL, bus_gb_per_s=49.9, slow={5: 1.08})
    document = made(tmp_path, rules, cases=(NODE, fast, WORLD))
    (result,) = of(document, "fleet", Verdict.FAIL)
    assert "rail 5 takes 1.08 times" in result.reason
    assert not of(document, "floor", Verdict.FAIL)


@pytest.mark.parametrize("seed", range(8))
def test_equal_units_with_noise_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, case(RAIL, noise=0.03), WORLD), seed=seed)
    assert not of(document, "fleet", Verdict.FAIL)


SPREAD = {0: 1.0, 1: 1.06, 2: 0.94, 3: 1.12, 4: 0.9, 5: 1.08, 6: 0.93, 7: 1.0}


@pytest.mark.parametrize(
    ("slow", "why"),
    [
        ({3: 1.03}, "certain, and within the margin"),
        (SPREAD, "beyond the margin, and no further than equals lie apart"),
        ({3: 0.6}, "faster than its equals"),
    ],
)
def test_units_that_are_no_outliers(slow: dict[int, float], why: str, tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, case(RAIL, bus_gb_per_s=60, slow=slow, noise=1e-4), WORLD))
    (result,) = [r for r in of(document, "fleet") if r.subject.startswith(RAIL.id)]
    assert result.verdict is Verdict.PASS, why


def test_uncertain_medians_give_no_outlier(tmp_path: Path) -> None:
    """All but one median are equal, so the MAD is 0, but each interval is 20% wide on each side."""

    def edit(record: Record) -> Record:
        groups = []
        for index, group in enumerate(record.groups):
            p50 = 1000.0 * (1.08 if index == 3 else 1.0)
            times = msgspec.structs.replace(group.time_us, p50=p50, p50_lo=0.8 * p50, p50_hi=1.2 * p50)
            groups.append(msgspec.structs.replace(group, time_us=times))
        return msgspec.structs.replace(record, groups=groups)

    document = made(tmp_path, edit=edit)
    assert not of(document, "fleet", Verdict.FAIL)
    assert not of(document, "fleet", Verdict.INCONCLUSIVE)


def test_group_with_an_impossible_time_is_inconclusive(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        if record.case != RAIL.id:
            return record
        times = msgspec.structs.replace(record.groups[0].time_us, p50=0.0)
        return msgspec.structs.replace(
            record, groups=[msgspec.structs.replace(record.groups[0], time_us=times), *record.groups[1:]]
        )

    (result,) = of(made(tmp_path, edit=edit), "fleet", Verdict.INCONCLUSIVE)
    assert result.reason == "a group's time is no possible figure"


def test_starts_with_different_groups_are_not_compared(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, groups=record.groups[::-1]) if record.start == 1 else record

    document = made(tmp_path, cases=(case(RAIL, slow={3: 2.0}), WORLD), edit=edit)
    assert [r.verdict for r in of(document, "fleet")] == [Verdict.NOT_RUN]


def test_bound_on_z_grows_with_the_number_of_units() -> None:
    """Bonferroni: one-sided, 5% for all units together."""
    bounds = [load("checks", "fleet").outliers(np.zeros((3, units)), 1.0, 0.05)[2] for units in (1, 8, 2048)]
    assert bounds == pytest.approx([1.645, 2.498, 4.061], abs=1e-3)


def test_two_nodes_are_too_few_to_compare(tmp_path: Path) -> None:
    cases = (case(NODE, slow={1: 1.5}), case(WORLD, bus_gb_per_s=440.6))
    document = made(tmp_path, cases=cases, nodes=2)
    (result,) = of(document, "fleet")
    assert result.verdict is Verdict.NOT_RUN
    assert of(document, "floor", Verdict.FAIL), "the floor of one node finds it all the same"


def test_outlier_in_a_single_start_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, case(RAIL, slow={3: 1.2}), WORLD), starts=1)
    assert of(document, "fleet", Verdict.INCONCLUSIVE)
    assert not of(document, "fleet", Verdict.FAIL)


def test_outlier_that_moves_between_starts_is_inconclusive(tmp_path: Path) -> None:
    """Slow in two of three starts: the median over starts is an outlier, but no rail fails."""

    def edit(record: Record) -> Record:
        if record.case != RAIL.id or record.start == 1:
            return record
        slow = record.groups[3]
        times = msgspec.structs.replace(slow.time_us, p50=1.5 * slow.time_us.p50)
        groups = [*record.groups[:3], msgspec.structs.replace(slow, time_us=times), *record.groups[4:]]
        return msgspec.structs.replace(record, groups=groups)

    document = made(tmp_path, edit=edit)
    (result,) = of(document, "fleet", Verdict.INCONCLUSIVE)
    assert "rail 3 takes 1.50 times" in result.reason
    assert result.reason.endswith("but in 2 of 3 starts only")
    assert not of(document, "fleet", Verdict.FAIL)


def test_flows_with_a_single_peer_are_not_compared(tmp_path: Path) -> None:
    ring = {
        "src": list(range(16)), "dst": [(rank + 1) % 16 for rank in range(16)], "nbytes": [M] * 16,
        "p50_us": [20.0 if rank != 5 else 40.0 for rank in range(16)],
    }  # fmt: skip

    def edit(record: Record) -> Record:
        phase = {"label": "round", "ledger": {}, "flows": ring}
        return msgspec.convert({**msgspec.to_builtins(record), "phases": [phase]}, Record)

    document = made(tmp_path, nodes=2, cases=(NODE, case(WORLD, bus_gb_per_s=440.6)), edit=edit)
    assert [r.verdict for r in of(document, "fleet")] == [Verdict.NOT_RUN]


def flows(times_us: list[float]) -> dict[str, Any]:
    """Flows from each of n ranks to the next three; `times_us` holds the time of each sender."""
    n = len(times_us)
    pairs = [(rank, (rank + step) % n) for rank in range(n) for step in (1, 2, 3)]
    return {
        "src": [src for src, _ in pairs],
        "dst": [dst for _, dst in pairs],
        "nbytes": [M] * len(pairs),
        "p50_us": [times_us[src] for src, _ in pairs],
    }


def test_flows_name_the_slow_side_of_a_rank(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        phase = {"label": "round", "ledger": {}, "flows": flows([20.0 if rank != 5 else 40.0 for rank in range(16)])}
        return msgspec.convert({**msgspec.to_builtins(record), "phases": [phase]}, Record)

    document = made(tmp_path, nodes=2, cases=(NODE, case(WORLD, bus_gb_per_s=440.6)), edit=edit)
    named = {r.subject.rpartition(": ")[2] for r in of(document, "fleet", Verdict.FAIL)}
    assert named == {"send side of rank 5 (n0000, rail 5)"}
    (slow,) = of(document, "fleet", Verdict.FAIL)[:1]
    rows = [row for row in plain(slow.evidence) if row.get("rank") == 5]
    assert [row["start"] for row in rows] == [0, 1, 2]
    assert all(set(row["us_a_megabyte_by_peer"]) == {"6", "7", "8"} for row in rows)
    assert all((tmp_path / "made" / row["samples"]).is_file() for row in rows)
