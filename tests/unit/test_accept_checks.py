"""Every check, verdict and exit code, from run directories that were made up for it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from ncclbench.accept.example import H100, Example, ExampleCase, with_warning, write_example
from ncclbench.accept.judge import judge
from ncclbench.accept.outcome import Action, Document, Result, Verdict
from ncclbench.accept.profile import Rules, load_profile, parse_profile
from ncclbench.accept.subject import Subject
from ncclbench.errors import Exit
from ncclbench.registry import load, names
from ncclbench.store.directory import read_run, write_samples
from ncclbench.store.records import Record

pytestmark = pytest.mark.usefixtures("unsynced")

G, M = 1 << 30, 1 << 20
NODE = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=478, group="node")
RAIL = ExampleCase(pattern="send_recv", nbytes=G, bus_gb_per_s=48, group="rail")
WORLD = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=386.6)
HEALTHY = Example(cases=(NODE, RAIL, WORLD))
CHECKS = (
    "baseline", "data", "dispersion", "drift", "fabric", "fleet", "floor", "health", "path", "samples", "skew",
    "starts",
)  # fmt: skip


def example(**changes: Any) -> Example:
    """The healthy run, but for `changes`."""
    return replace(HEALTHY, **changes)


def case(original: ExampleCase, **changes: Any) -> ExampleCase:
    return replace(original, **changes)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("runs") / "healthy", HEALTHY)


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    """A copy of the healthy run, to be damaged."""
    shutil.copytree(healthy, tmp_path / "run")
    return tmp_path / "run"


def verdict_on(path: Path, profile: str | Rules = "h100-hgx-ib", **more: Any) -> Document:
    rules = load_profile(profile) if isinstance(profile, str) else profile
    return judge(Subject(read_run(path), rules, **more))


def made(tmp_path: Path, profile: str | Rules = "h100-hgx-ib", **changes: Any) -> Document:
    return verdict_on(write_example(tmp_path / "made", example(**changes)), profile)


def of(document: Document, check: str, verdict: Verdict | None = None) -> list[Result]:
    return [r for r in document.checks if r.check == check and (verdict is None or r.verdict is verdict)]


def only(document: Document, check: str, verdict: Verdict) -> Result:
    """The one result of the check with this verdict; no other check may fail or be inconclusive."""
    (result,) = of(document, check, verdict)
    others = {r.check for r in document.checks if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)}
    assert others == {check}, [(r.check, r.reason) for r in document.checks if r.check in others]
    return result


def test_the_checks_are_found_by_their_files() -> None:
    assert tuple(names("checks")) == CHECKS
    for name in CHECKS:
        assert load("checks", name).__doc__


def test_a_healthy_run_passes(healthy: Path) -> None:
    document = verdict_on(healthy)
    assert (document.verdict, document.exit_code) == (Verdict.PASS, Exit.GOOD), document.reasons
    assert document.starts == type(document.starts)(declared=3, present=3)
    assert document.stamps == ["synthetic"]
    assert {r.check for r in document.checks} == set(CHECKS)
    assert not [r for r in document.checks if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)]


def test_a_floor_result_holds_its_figure_bound_source_and_records(healthy: Path) -> None:
    results = [r for r in of(verdict_on(healthy), "floor", Verdict.PASS) if r.subject == WORLD.id]
    (entry, *rows) = results[0].evidence
    assert (entry["figure"], entry["tolerance"], entry["basis"]) == (386.6, 0.05, "published")
    assert "coreweave" in entry["source"]
    assert entry["date"]
    assert [row["start"] for row in rows] == [0, 1, 2]
    assert all(row["samples"].endswith(".parquet") and row["low"] < row["figure"] < row["high"] for row in rows)


@pytest.mark.parametrize(("share", "verdict"), [(1.0, Verdict.PASS), (0.96, Verdict.PASS), (0.9, Verdict.FAIL)])
def test_one_op_under_its_floor_fails(share: float, verdict: Verdict, tmp_path: Path) -> None:
    """10% under 386.6 is under the tolerance of 5%; 4% under is within."""
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, bus_gb_per_s=386.6 * share)))
    assert document.verdict is verdict
    if verdict is Verdict.FAIL:
        assert document.exit_code == Exit.FAIL
        failed = only(document, "floor", Verdict.FAIL)
        assert failed.subject == WORLD.id
        assert failed.action is Action.CHECK_SWITCH
        assert "wanted >= 367.3" in failed.reason


def test_one_rail_at_half_speed_among_8_fails_and_is_named(tmp_path: Path) -> None:
    """The average over rails would be 1.125 times the time."""
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


def test_a_rail_just_beyond_the_margin_is_found_though_it_is_above_its_floor(tmp_path: Path) -> None:
    rules = load_profile("h100-hgx-ib")
    fast = case(RAIL, bus_gb_per_s=49.9, slow={5: 1.08})
    document = made(tmp_path, rules, cases=(NODE, fast, WORLD))
    (result,) = of(document, "fleet", Verdict.FAIL)
    assert "rail 5 takes 1.08 times" in result.reason
    assert not of(document, "floor", Verdict.FAIL)


@pytest.mark.parametrize("seed", range(8))
def test_equals_with_noise_raise_no_alarm(seed: int, tmp_path: Path) -> None:
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
def test_what_is_no_outlier_among_equals(slow: dict[int, float], why: str, tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, case(RAIL, bus_gb_per_s=60, slow=slow, noise=1e-4), WORLD))
    (result,) = [r for r in of(document, "fleet") if r.subject.startswith(RAIL.id)]
    assert result.verdict is Verdict.PASS, why


def test_equals_whose_medians_are_hardly_known_give_no_outlier(tmp_path: Path) -> None:
    """All but one show the same to the last digit, so that the MAD is 0; but each is known to 20% only."""

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


def test_a_group_without_a_possible_time_is_inconclusive(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        if record.case != RAIL.id:
            return record
        times = msgspec.structs.replace(record.groups[0].time_us, p50=0.0)
        return msgspec.structs.replace(
            record, groups=[msgspec.structs.replace(record.groups[0], time_us=times), *record.groups[1:]]
        )

    (result,) = of(made(tmp_path, edit=edit), "fleet", Verdict.INCONCLUSIVE)
    assert result.reason == "a group's time is no possible figure"


def test_starts_with_other_groups_are_not_compared(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, groups=record.groups[::-1]) if record.start == 1 else record

    document = made(tmp_path, cases=(case(RAIL, slow={3: 2.0}), WORLD), edit=edit)
    assert [r.verdict for r in of(document, "fleet")] == [Verdict.NOT_RUN]


def test_the_bound_on_an_outlier_grows_with_the_number_of_equals() -> None:
    """Bonferroni: one-sided, 5% for all together."""
    bounds = [load("checks", "fleet").outliers(np.zeros((3, units)), 1.0, 0.05)[2] for units in (1, 8, 2048)]
    assert bounds == pytest.approx([1.645, 2.498, 4.061], abs=1e-3)


def test_two_nodes_are_too_few_to_say_which_is_odd(tmp_path: Path) -> None:
    cases = (case(NODE, slow={1: 1.5}), case(WORLD, bus_gb_per_s=440.6))
    document = made(tmp_path, cases=cases, nodes=2)
    (result,) = of(document, "fleet")
    assert result.verdict is Verdict.NOT_RUN
    assert of(document, "floor", Verdict.FAIL), "the floor of one node finds it all the same"


def test_an_outlier_seen_in_one_start_only_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, case(RAIL, slow={3: 1.2}), WORLD), starts=1)
    assert of(document, "fleet", Verdict.INCONCLUSIVE)
    assert not of(document, "fleet", Verdict.FAIL)


def test_an_outlier_that_moves_on_from_start_to_start_is_noise_and_inconclusive(tmp_path: Path) -> None:
    """Slow in two of three starts: the median over starts is an outlier, and still nobody is failed for it."""

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


def test_flows_with_a_single_peer_do_not_tell_which_end_is_slow(tmp_path: Path) -> None:
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
    """Rank 0 .. n-1, each to the next three; `times_us` is how long the sender takes."""
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
    rows = [row for row in slow.evidence if row.get("rank") == 5]
    assert [row["start"] for row in rows] == [0, 1, 2]
    assert all(set(row["us_a_megabyte_by_peer"]) == {"6", "7", "8"} for row in rows)
    assert all((tmp_path / "made" / row["samples"]).is_file() for row in rows)


def test_wrong_data_in_one_case_outweigh_everything(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, wrong=7, bus_gb_per_s=200)))
    assert (document.verdict, document.exit_code) == (Verdict.FAIL, Exit.WRONG_DATA)
    (result,) = of(document, "data", Verdict.FAIL)
    assert result.subject == WORLD.id
    assert result.action is Action.ISOLATE
    assert result.evidence[0]["wrong_ranks"] == [0]


@pytest.mark.parametrize("change", [{"status": "ok", "wrong": 3}, {"status": "wrong", "wrong": None}])
def test_wrong_data_are_wrong_by_their_status_and_by_their_number(change: dict[str, Any], tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, **change) if (record.start, record.case) == (1, WORLD.id) else record

    document = made(tmp_path, edit=edit)
    assert document.exit_code == Exit.WRONG_DATA
    assert [r.subject for r in of(document, "data", Verdict.FAIL)] == [WORLD.id]


def test_data_that_nobody_checked_are_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: msgspec.structs.replace(record, wrong=None))
    assert document.exit_code == Exit.INCONCLUSIVE
    assert len(of(document, "data", Verdict.INCONCLUSIVE)) == 3


def test_sockets_where_verbs_were_wanted_fail(tmp_path: Path) -> None:
    document = made(tmp_path, links=("NET/Socket", "P2P/CUMEM"))
    assert document.exit_code == Exit.FAIL
    failed = of(document, "path", Verdict.FAIL)
    assert len(failed) == 3
    assert "NET/Socket" in failed[0].reason
    assert failed[0].evidence[0]["path"]["links"] == ["NET/Socket", "P2P/CUMEM"]


@pytest.mark.parametrize(
    ("path", "verdict", "words"),
    [
        (None, Verdict.INCONCLUSIVE, "unverified"),
        ({"links": ["P2P/CUMEM"]}, Verdict.INCONCLUSIVE, "none of NET/IB*"),
        ({"links": ["NET/IB"], "gdr": False}, Verdict.FAIL, "GDRDMA"),
        ({"links": ["NET/IB"], "proof": "contradicted"}, Verdict.FAIL, "contradict"),
        ({"links": ["NET/IB"], "network": "Socket"}, Verdict.FAIL, "NET/Socket"),
    ],
)
def test_paths(path: dict[str, Any] | None, verdict: Verdict, words: str, tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: msgspec.structs.replace(record, path=path))
    (result,) = [r for r in of(document, "path", verdict) if r.subject == WORLD.id]
    assert words in result.reason
    assert document.verdict is verdict


def test_inside_of_a_node_too_a_path_that_nobody_recorded_is_unverified(tmp_path: Path) -> None:
    document = made(tmp_path, nodes=1, cases=(NODE,), edit=lambda r: msgspec.structs.replace(r, path=None))
    assert "no link was recorded" in only(document, "path", Verdict.INCONCLUSIVE).reason


def test_a_path_must_be_proven_where_the_profile_says_so(healthy: Path) -> None:
    text = load_profile("h100-hgx-ib").text.replace("gdr = true", "gdr = true\nproof = true")
    document = verdict_on(healthy, parse_profile(text, "p"))
    assert len(of(document, "path", Verdict.INCONCLUSIVE)) == 3


@pytest.mark.parametrize(
    ("warning", "verdict", "action"),
    [
        ("hardware thermal slowdown", Verdict.FAIL, Action.RESEAT_OR_REBOOT),
        ("software power cap", Verdict.INCONCLUSIVE, Action.MONITOR),
        ("ECC uncorrected errors rose by 2", Verdict.FAIL, Action.ISOLATE),
        ("NVLink 7 CRC flit errors rose by 12", Verdict.FAIL, Action.RESEAT_OR_REBOOT),
        ("something new", Verdict.INCONCLUSIVE, Action.MONITOR),
    ],
)
def test_a_gpu_that_throttles_or_errs_is_named(warning: str, verdict: Verdict, action: Action, tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: with_warning(record, 13, warning))
    result = only(document, "health", verdict)
    assert result.action is action
    assert "rank 13" in result.reason
    assert result.evidence[0]["warning"] == warning
    assert document.verdict is verdict


def test_a_profile_may_say_otherwise_what_a_warning_means(tmp_path: Path) -> None:
    text = load_profile("h100-hgx-ib").text
    text += '[[health]]\nmatch = "software power cap"\nverdict = "FAIL"\naction = "ISOLATE"\n'
    document = made(
        tmp_path, parse_profile(text, "p"), edit=lambda record: with_warning(record, 1, "software power cap")
    )
    assert only(document, "health", Verdict.FAIL).action is Action.ISOLATE


def test_gpus_that_nobody_looked_at_are_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: msgspec.structs.replace(record, gpus=[]))
    assert only(document, "health", Verdict.INCONCLUSIVE).subject == "gpu"


def test_a_nic_that_counts_errors_is_named(tmp_path: Path) -> None:
    def edit(moved: list[dict[str, Any]]) -> Callable[[Record], Record]:
        return lambda r: msgspec.structs.replace(r, path={**(r.path or {}), "counters": {"moved": moved}})

    down = {"rank": 4, "port": "mlx5_4:1", "counter": "link_downed", "by": 1}
    crowded = {"rank": 5, "port": "mlx5_5:1", "counter": "np_cnp_sent", "by": 900}
    result = only(made(tmp_path, edit=edit([down, crowded])), "health", Verdict.FAIL)
    assert result.subject == "nic: link_downed"
    assert result.action is Action.CHECK_CABLE
    assert (result.evidence[0]["device"], result.evidence[0]["warning"]) == ("mlx5_4:1", "link_downed rose by 1")
    quiet = verdict_on(write_example(tmp_path / "quiet", example(edit=edit([]))))
    assert [r.verdict for r in of(quiet, "health") if r.subject == "nic"] == [Verdict.PASS]
    busy = verdict_on(write_example(tmp_path / "busy", example(edit=edit([crowded]))))
    assert busy.verdict is Verdict.PASS, "congestion is no fault of a NIC"
    odd = {**crowded, "counter": "rx_discards_phy"}
    discards = verdict_on(write_example(tmp_path / "odd", example(edit=edit([odd]))))
    assert only(discards, "health", Verdict.INCONCLUSIVE).action is Action.MONITOR


@pytest.mark.parametrize(
    ("view", "subject"),
    [
        ({"versions": {"nccl": "2.27.3"}}, "version nccl"),
        ({"variables": {"NCCL_IB_GID_INDEX": "0"}}, "setting NCCL_IB_GID_INDEX"),
        ({"variables": {"NCCL_ALGO": "Ring"}}, "setting NCCL_ALGO"),
    ],
)
def test_what_differs_on_one_rank_fails_and_names_it(view: dict[str, Any], subject: str, tmp_path: Path) -> None:
    result = only(made(tmp_path, software={9: view}), "drift", Verdict.FAIL)
    assert result.subject == subject
    assert "on rank 9" in result.reason
    assert result.action is Action.ISOLATE


def test_what_a_rank_is_told_of_its_own_devices_may_differ(tmp_path: Path) -> None:
    views = {rank: {"variables": {"UCX_NET_DEVICES": f"mlx5_{rank}:1"}} for rank in range(8)}
    assert made(tmp_path, software=views).verdict is Verdict.PASS


def test_versions_of_rank_0_alone_do_not_show_that_all_ranks_agree(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["software"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "only rank 0" in only(verdict_on(run), "drift", Verdict.INCONCLUSIVE).reason


def test_other_software_in_a_later_start_fails(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    third = [k for k, line in enumerate(lines) if json.loads(line)["kind"] == "start"][2]
    lines[third] = lines[third].replace(b'"nccl":"2.28.9"', b'"nccl":"2.30.1"')
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    result = only(verdict_on(run), "drift", Verdict.FAIL)
    assert result.subject == "process starts"
    assert "start 2" in result.reason
    assert "nccl 2.30.1 instead of 2.28.9" in result.reason


def test_what_may_differ_between_ranks_may_differ_between_starts(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    third = [k for k, line in enumerate(lines) if json.loads(line)["kind"] == "start"][2]
    event = json.loads(lines[third])
    event["software"][0]["variables"]["UCX_NET_DEVICES"] = "mlx5_7:1"
    lines[third] = json.dumps(event).encode()
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert of(verdict_on(run), "drift", Verdict.FAIL) == []


@pytest.mark.parametrize(
    ("wanted", "verdict"),
    [
        ('[wanted.versions]\nnccl = { version = ">=2.28" }', Verdict.PASS),
        ('[wanted.versions]\nnccl = { version = ">=2.29,<3" }', Verdict.FAIL),
        ('[wanted.versions]\nfirmware = "28.42"', Verdict.INCONCLUSIVE),
        ("[wanted.variables]\nNCCL_IB_DISABLE = { present = false }", Verdict.PASS),
        ('[wanted.variables]\nNCCL_IB_GID_INDEX = { none_of = ["3"] }', Verdict.FAIL),
        ("[wanted.variables]\nNCCL_CROSS_NIC = 0", Verdict.FAIL),
    ],
)
def test_wanted_versions_and_settings(wanted: str, verdict: Verdict, healthy: Path) -> None:
    text = load_profile("h100-hgx-ib").text
    document = verdict_on(healthy, parse_profile(text + "\n" + wanted + "\n", "p"))
    assert document.verdict is verdict


def test_three_samples_are_too_few(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, samples=3)))
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE)
    (floor,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "too few samples to judge: 3, needs 6" in floor.reason


def test_a_profile_may_ask_for_more_samples(healthy: Path) -> None:
    text = load_profile("h100-hgx-ib").text + "\n[limits]\nmin_samples = 61\n"
    document = verdict_on(healthy, parse_profile(text, "p"))
    for check in ("floor", "dispersion"):
        results = of(document, check, Verdict.INCONCLUSIVE)
        assert [r.subject for r in results] == [NODE.id, RAIL.id, WORLD.id]
        assert all("60, needs 61" in r.reason for r in results)


def test_three_bad_samples_do_not_fail_a_rack_either(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, samples=3, bus_gb_per_s=100)))
    assert document.verdict is Verdict.INCONCLUSIVE


def test_a_profile_may_ask_for_more_samples_of_a_p99(tmp_path: Path) -> None:
    text = load_profile("h100-hgx-ib").text + (
        '\n[limits]\np99_samples = 601\n[[floor]]\nwhere = { pattern = "all_reduce", bytes = "8G", nodes = 8 }\n'
        'metric = "time_us.p99"\nat_most = 1.0\ntolerance = 0.0\nbasis = "measured"\nsource = "s"\ndate = "d"\n'
    )
    document = made(tmp_path, parse_profile(text, "p"), cases=(NODE, case(WORLD, samples=600)))
    (result,) = [r for r in of(document, "floor") if r.subject == WORLD.id and "p99" in r.reason]
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "600, needs 601" in result.reason


@pytest.mark.parametrize(("samples", "judged"), [(60, False), (298, False), (299, True), (600, True)])
def test_p99_is_not_judged_from_too_few_samples(samples: int, judged: bool, tmp_path: Path) -> None:
    floor = (
        '\n[[floor]]\nwhere = { pattern = "all_reduce", bytes = "8G", nodes = 8 }\nmetric = "time_us.p99"\n'
        'at_most = 1000.0\ntolerance = 0.0\nbasis = "measured"\nsource = "s"\ndate = "d"\n'
    )
    rules = parse_profile(load_profile("h100-hgx-ib").text + floor, "p")
    document = made(tmp_path, rules, cases=(NODE, RAIL, case(WORLD, samples=samples)))
    (result,) = [r for r in of(document, "floor") if r.subject == WORLD.id and "p99" in r.reason]
    assert result.verdict is (Verdict.FAIL if judged and samples == 600 else Verdict.INCONCLUSIVE)
    assert ("too few samples" in result.reason) is not (samples == 600)


def test_noise_is_inconclusive_and_says_so(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, noise=0.4, samples=12)))
    (result,) = of(document, "dispersion", Verdict.INCONCLUSIVE)
    assert result.subject == WORLD.id
    assert "too noisy" in result.reason
    assert document.verdict is not Verdict.PASS


def test_a_long_tail_is_inconclusive(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        assert record.time_us is not None
        tail = msgspec.structs.replace(record.time_us, p95=3 * record.time_us.p50)
        return msgspec.structs.replace(record, time_us=tail) if record.case == RAIL.id else record

    assert "long tail" in only(made(tmp_path, edit=edit), "dispersion", Verdict.INCONCLUSIVE).reason


def scaled(record: Record, factor: float) -> Record:
    """The record as if everything had taken `factor` times as long; its samples no longer agree."""
    assert record.time_us is not None
    assert record.bus_gb_per_s is not None
    times = {
        name: value * factor if name not in ("n", "cv") and value is not None else value
        for name, value in msgspec.structs.asdict(record.time_us).items()
    }
    summary = msgspec.convert(times, type(record.time_us))
    return msgspec.structs.replace(record, time_us=summary, bus_gb_per_s=record.bus_gb_per_s / factor, groups=[])


def test_starts_that_lie_apart_are_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 0.9) if (r.start, r.case) == (2, WORLD.id) else r)
    (result,) = of(document, "starts", Verdict.INCONCLUSIVE)
    assert result.subject == WORLD.id
    assert re.search(r"1\d\.\d% apart", result.reason)
    assert "limit 5.0%" in result.reason


def test_one_bad_start_of_three_is_not_outvoted(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 1.2) if (r.start, r.case) == (1, WORLD.id) else r)
    (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "2 of 3 starts are clearly good, 1 clearly bad" in result.reason


def test_arrival_skew_names_who_comes_last(tmp_path: Path) -> None:
    path = write_example(tmp_path / "made", HEALTHY)
    run = read_run(path)
    lines = []
    for record in run.records:
        if record.case == WORLD.id:
            assert record.time_us is not None
            assert record.samples is not None
            seconds = np.full((64, record.time_us.n, 1), record.time_us.p50 / 1e6)
            seconds[17] /= 10
            write_samples(path / record.samples, ["total"], seconds)
            skew = msgspec.convert({"p50": 1.5 * record.time_us.p50, "max": 1e9}, type(record.skew_us))
            record = msgspec.structs.replace(record, skew_us=skew)
        lines.append(msgspec.json.encode(record))
    (path / "results.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (result,) = of(verdict_on(path), "skew", Verdict.INCONCLUSIVE)
    assert "150.0% of the time" in result.reason
    assert "rank 17 has the shortest durations" in result.reason


def test_a_profile_for_another_fabric_never_fails_a_run(tmp_path: Path) -> None:
    slow = (case(NODE, bus_gb_per_s=100), case(WORLD, bus_gb_per_s=100))
    for change in ({"gpu": "NVIDIA GB300"}, {"transport": "mpi"}, {"gpu": None, "transport": "gloo"}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        document = verdict_on(write_example(folder, example(cases=slow, **change)))
        assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE)
        assert of(document, "fabric", Verdict.INCONCLUSIVE)
        assert [r.verdict for r in of(document, "floor")] == [Verdict.NOT_RUN]
        assert [r.verdict for r in of(document, "path")] == [Verdict.NOT_RUN]


def test_roce_is_not_judged_by_infiniband_figures(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, path={**(record.path or {}), "link_layer": ["RoCE"]})

    document = made(tmp_path, edit=edit)
    assert "NICs speak RoCE" in of(document, "fabric", Verdict.INCONCLUSIVE)[0].reason


def test_a_rack_whose_domains_are_only_assumed_is_not_taken_for_several_racks(tmp_path: Path) -> None:
    """18 trays without a topology file look like 18 domains, for which a far lower figure would do."""
    cases = (case(WORLD, bus_gb_per_s=300, samples=12),)
    tray = {"cases": cases, "gpu": "NVIDIA GB300", "nodes": 18, "ranks_per_node": 4}
    document = made(tmp_path, "gb300-nvl72", **tray)
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "domains of 64 to 72" in of(document, "fabric")[0].reason
    assert verdict_on(write_example(tmp_path / "told", example(**tray, domain_nodes=18)), "gb300-nvl72").exit_code == 1


def test_gpus_without_a_name_are_inconclusive(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    for rank in manifest["ranks"]:
        del rank["device"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "does not say which GPUs" in only(verdict_on(run), "fabric", Verdict.INCONCLUSIVE).reason


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (ExampleCase(pattern="reduce_scatter", nbytes=8 * G, bus_gb_per_s=400), "no entry for reduce_scatter of 8G"),
        (
            ExampleCase(pattern="all_reduce", nbytes=3 * G, bus_gb_per_s=400),
            "the nearest is: all_reduce, group world, bytes 4G",
        ),
    ],
)
def test_no_entry_says_which_and_what_was_nearest(odd: ExampleCase, words: str, tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, WORLD, odd))
    result = only(document, "floor", Verdict.INCONCLUSIVE)
    assert words in result.reason
    assert "nearest is" in result.reason


def test_an_interval_that_straddles_the_floor_is_inconclusive(tmp_path: Path) -> None:
    at_the_floor = case(WORLD, bus_gb_per_s=386.6 * 0.95, noise=0.02)
    (result,) = of(made(tmp_path, cases=(NODE, RAIL, at_the_floor)), "floor", Verdict.INCONCLUSIVE)
    assert "0 of 3 starts are clearly good" in result.reason
    assert all(row["low"] < 386.6 * 0.95 for row in result.evidence if "low" in row)


def test_a_time_whose_interval_straddles_the_ceiling_is_inconclusive(tmp_path: Path) -> None:
    """19.2 us, and half as much again."""
    rate = 128 * 2 * 7 / 8 / (19.2e-6 * 1.5) / 1e9
    small = ExampleCase(pattern="all_reduce", nbytes=128, bus_gb_per_s=rate, noise=0.02, group="node")
    document = made(tmp_path, cases=(NODE, small), nodes=1)
    (result,) = [r for r in of(document, "floor") if r.subject == small.id]
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "0 of 3 starts are clearly good" in result.reason


def test_two_bad_starts_of_three_fail(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda r: scaled(r, 1.2) if r.start > 0 and r.case == WORLD.id else r)
    assert [r.subject for r in of(document, "floor", Verdict.FAIL)] == [WORLD.id]


def test_a_rate_that_is_no_figure_is_inconclusive(tmp_path: Path) -> None:
    for number, rate in enumerate((-400.0, 0.0)):

        def edit(record: Record, rate: float = rate) -> Record:
            return msgspec.structs.replace(record, bus_gb_per_s=rate) if record.case == WORLD.id else record

        document = verdict_on(write_example(tmp_path / str(number), example(edit=edit)))
        (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
        assert "no possible figure" in result.reason
        assert not of(document, "floor", Verdict.FAIL)


def test_an_assumed_figure_that_is_missed_is_inconclusive_and_never_fails(tmp_path: Path) -> None:
    slow = (NODE, RAIL, case(WORLD, bus_gb_per_s=100))
    document = made(tmp_path, nodes=4, cases=slow)
    (result,) = of(document, "floor", Verdict.INCONCLUSIVE)
    assert "assumed" in result.reason
    assert document.verdict is Verdict.INCONCLUSIVE


def test_assumed_figures_alone_cannot_pass_a_run(tmp_path: Path) -> None:
    document = made(tmp_path, "b200-hgx", gpu="NVIDIA B200", nodes=1, cases=(case(WORLD, bus_gb_per_s=800),))
    assert of(document, "floor", Verdict.PASS), "the figure is met"
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "no figure was held against a published or measured one" in document.reasons


def test_a_required_entry_that_nothing_measured_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(RAIL, NODE))
    assert document.verdict is Verdict.INCONCLUSIVE
    (missing,) = [r for r in of(document, "floor", Verdict.NOT_RUN) if r.required]
    assert "nodes 8" in missing.subject


def test_between_bad_and_good_is_to_be_watched(tmp_path: Path) -> None:
    rack = {"gpu": "NVIDIA GB300", "nodes": 36, "ranks_per_node": 4, "domain_nodes": 18}
    inside = ExampleCase(pattern="all_reduce", nbytes=8 * G, bus_gb_per_s=890, group="domain", samples=12)
    for number, (figure, verdict) in enumerate(((220, Verdict.PASS), (180, Verdict.INCONCLUSIVE), (140, Verdict.FAIL))):
        cases = (inside, case(WORLD, bus_gb_per_s=figure, samples=12))
        document = verdict_on(write_example(tmp_path / str(number), example(**rack, cases=cases)), "gb300-nvl72")
        assert document.verdict is verdict, document.reasons


def test_an_empty_run_is_not_run_and_the_environments_fault(tmp_path: Path) -> None:
    path = write_example(tmp_path / "made", example(made=0))
    document = verdict_on(path)
    assert (document.verdict, document.exit_code) == (Verdict.NOT_RUN, Exit.INCONCLUSIVE)
    assert "no case was measured" in document.reasons
    assert document.starts.present == 0


def test_a_run_of_skipped_cases_only_measured_nothing(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, status="skipped", reason="needs GPUs", time_us=None, gpus=[], groups=[])

    document = made(tmp_path, edit=edit)
    assert (document.verdict, document.exit_code) == (Verdict.NOT_RUN, Exit.INCONCLUSIVE)


def test_a_start_that_is_still_to_be_made_is_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, made=2)
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.INCONCLUSIVE)
    assert (document.starts.declared, document.starts.present) == (3, 2)
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.subject == "start 2"]
    assert "not been made yet" in result.reason


def test_a_plan_of_one_start_is_no_verdict_on_performance(tmp_path: Path) -> None:
    document = made(tmp_path, starts=1)
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "declares 1 process start" in of(document, "starts", Verdict.INCONCLUSIVE)[0].reason
    floors = of(document, "floor", Verdict.INCONCLUSIVE)
    assert [r.subject for r in floors] == [NODE.id, RAIL.id, WORLD.id]
    assert all("measured in 1 process start, needs 3" in r.reason for r in floors)


def test_a_killed_start_is_the_environments_fault(run: Path) -> None:
    """SIGKILL in the middle of the last start: half of the last line of results, no end."""
    results = (run / "results.jsonl").read_bytes()
    (run / "results.jsonl").write_bytes(results[: len(results) - 200])
    lines = (run / "events.jsonl").read_bytes().splitlines()[:-2]
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    document = verdict_on(run)
    assert (document.verdict, document.exit_code) == (Verdict.INCONCLUSIVE, Exit.ENVIRONMENT)
    assert document.starts.present == 2
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.cause]
    assert "was cut off: 1 case missing" in result.reason


def failed_third(record: Record) -> Record:
    if (record.start, record.case) != (2, WORLD.id):
        return record
    return msgspec.structs.replace(
        record, status="failed", reason="rank 5 died", ranks=[5], time_us=None, skew_us=None, groups=[], gpus=[]
    )


def test_a_lost_rank_is_the_environments_fault_and_is_named(tmp_path: Path) -> None:
    document = made(tmp_path, edit=failed_third)
    assert document.exit_code == Exit.ENVIRONMENT
    (result,) = [r for r in of(document, "starts", Verdict.INCONCLUSIVE) if r.cause]
    assert result.action is Action.ISOLATE
    assert "rank 5 died" in result.reason


def test_a_start_that_lost_a_rank_counts_even_if_it_was_resumed(run: Path) -> None:
    from ncclbench.store.directory import RunWriter

    RunWriter(run).event("lost", start=1, ranks=[5], reason="rank 5 died")
    document = verdict_on(run)
    assert document.verdict is Verdict.INCONCLUSIVE
    assert "a start that failed counts" in only(document, "starts", Verdict.INCONCLUSIVE).reason


def test_an_interruption_by_the_user_counts_for_nothing(run: Path) -> None:
    from ncclbench.store.directory import RunWriter

    RunWriter(run).event("lost", start=1, ranks=[], reason="interrupted by SIGINT")
    assert verdict_on(run).verdict is Verdict.PASS


def test_starts_in_the_same_processes_are_none(run: Path) -> None:
    text = (run / "events.jsonl").read_text()
    pids = [json.loads(line)["pids"] for line in text.splitlines() if '"kind":"start"' in line]
    text = text.replace(json.dumps(pids[2], separators=(",", ":")), json.dumps(pids[0], separators=(",", ":")))
    (run / "events.jsonl").write_text(text)
    assert "the very processes of start 0" in only(verdict_on(run), "starts", Verdict.INCONCLUSIVE).reason


def test_containers_that_number_their_processes_alike_are_starts_of_their_own(run: Path) -> None:
    text = (run / "events.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for number, event in enumerate(event for event in lines if event["kind"] == "start"):
        event["pids"], event["process"] = [7] * 64, f"mark {number}"
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    assert verdict_on(run).verdict is Verdict.PASS


BAD_SAMPLES = {
    "NaN": np.nan,
    "infinite": np.inf,
    "negative": -1e-3,
    "zero": 0.0,
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_impossible_samples_are_inconclusive_and_named(what: str, run: Path) -> None:
    """Another program's file may hold anything; ours leaves out what was not measured."""
    samples = read_run(run).records[0].samples
    assert samples is not None
    table = pq.read_table(run / samples)
    seconds = table.column("seconds").to_numpy().copy()
    seconds[7 * 60 + 11] = BAD_SAMPLES[what]
    pq.write_table(table.set_column(3, "seconds", pa.array(seconds, from_pandas=False)), run / samples)
    (result,) = of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)
    assert f"1 {what} samples, the first of rank 7 in iteration 11" in result.reason


def _damage_samples(run: Path, damage: Callable[[NDArray[np.float64]], None]) -> None:
    from ncclbench.accept.samples import read_total

    record = read_run(run).records[0]
    assert record.samples is not None
    seconds = read_total(run / record.samples)[:, :, None].copy()
    damage(seconds)
    write_samples(run / record.samples, ["total"], seconds)


def test_samples_that_say_something_else_than_their_record(run: Path) -> None:
    def damage(seconds: NDArray[np.float64]) -> None:
        seconds *= 1.01

    _damage_samples(run, damage)
    assert "its samples say" in of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)[0].reason


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no, not really PAR1"])
def test_samples_that_are_gone_or_no_parquet(content: bytes | None, run: Path) -> None:
    samples = read_run(run).records[0].samples
    assert samples is not None
    if content is None:
        (run / samples).unlink()
    else:
        (run / samples).write_bytes(content)
    assert "no readable samples" in of(verdict_on(run), "samples", Verdict.INCONCLUSIVE)[0].reason


def test_a_baseline_of_the_same_kind_is_compared(healthy: Path, tmp_path: Path) -> None:
    base = read_run(healthy)
    slower = (case(NODE, bus_gb_per_s=478 * 0.97), RAIL, case(WORLD, bus_gb_per_s=386.6 * 0.9))
    document = verdict_on(write_example(tmp_path / "made", example(cases=slower)), baseline=base)
    (result,) = of(document, "baseline", Verdict.FAIL)
    assert result.subject == WORLD.id
    assert "11.1% slower" in result.reason
    assert {row["run"] for row in result.evidence} == {"baseline", "this"}
    assert len(of(document, "baseline", Verdict.PASS)) == 2


@pytest.mark.parametrize(
    ("base", "now", "words"),
    [
        ({"starts": 1}, {}, "only 1 process start compared, needs 3"),
        ({}, {"noise": 0.3}, "the spans of the starts overlap"),
        ({"samples": 3}, {}, "too few samples to compare"),
    ],
)
def test_a_baseline_that_tells_too_little_fails_nobody(
    base: dict[str, Any], now: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """20% slower than it, each time."""
    usual = case(WORLD, bus_gb_per_s=480, samples=base.get("samples", 60))
    before = write_example(tmp_path / "before", example(cases=(usual,), starts=base.get("starts", 3)))
    after = write_example(tmp_path / "after", example(cases=(case(WORLD, bus_gb_per_s=400, **now),), seed=2))
    (result,) = of(verdict_on(after, baseline=read_run(before)), "baseline", Verdict.INCONCLUSIVE)
    assert words in result.reason
    sure = write_example(tmp_path / "sure", example(cases=(case(WORLD, bus_gb_per_s=480),)))
    quiet = write_example(tmp_path / "quiet", example(cases=(case(WORLD, bus_gb_per_s=400),)))
    assert of(verdict_on(quiet, baseline=read_run(sure)), "baseline", Verdict.FAIL), "which would fail otherwise"


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "cupy_nccl"},
        {"nodes": 4},
        {"software": {0: {"versions": {"nccl": "2.27.3"}}}},
        {"gpu": "NVIDIA H100 80GB HBM3e"},
        {"domain_nodes": 2},
    ],
)
def test_an_unlike_baseline_is_refused_unless_forced(change: dict[str, Any], healthy: Path, tmp_path: Path) -> None:
    base = read_run(write_example(tmp_path / "base", example(**change)))
    refused = verdict_on(healthy, baseline=base)
    assert "not compared with base" in only(refused, "baseline", Verdict.INCONCLUSIVE).reason
    assert "forced" not in refused.stamps
    forced = verdict_on(healthy, baseline=base, forced=True)
    assert "forced" in forced.stamps
    assert not of(forced, "baseline", Verdict.INCONCLUSIVE)


def test_a_case_that_only_one_of_the_runs_has(healthy: Path, tmp_path: Path) -> None:
    base = read_run(write_example(tmp_path / "base", example(cases=(NODE, RAIL))))
    document = verdict_on(healthy, baseline=base)
    assert "has no such case" in of(document, "baseline", Verdict.INCONCLUSIVE)[0].reason
    other = verdict_on(base.path, baseline=read_run(healthy))
    assert of(other, "baseline", Verdict.NOT_RUN)[0].required


def test_a_check_that_breaks_makes_the_verdict_inconclusive(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_subject: Subject) -> list[Result]:
        raise RuntimeError("who wrote\nthis?")

    monkeypatch.setattr(load("checks", "skew"), "check", broken)
    document = verdict_on(healthy)
    assert document.exit_code == Exit.INCONCLUSIVE
    assert (
        only(document, "skew", Verdict.INCONCLUSIVE).reason == "the check itself failed: RuntimeError: who wrote this?"
    )


def test_the_gpu_of_the_examples_is_the_profiles() -> None:
    assert H100 == "NVIDIA H100 80GB HBM3"


def test_noise_matters_where_an_entry_judges_what_an_exemption_would_let_pass(tmp_path: Path) -> None:
    """128 bytes are too small to tell a rate, but their time is published."""
    rate = 128 * 2 * 7 / 8 / 10e-6 / 1e9
    small = ExampleCase(pattern="all_reduce", nbytes=128, bus_gb_per_s=rate, noise=0.4, samples=12, group="node")
    document = made(tmp_path, cases=(NODE, small), nodes=1)
    assert [r.subject for r in of(document, "dispersion", Verdict.INCONCLUSIVE)] == [small.id]


def test_noise_does_not_matter_where_speed_is_not_judged(tmp_path: Path) -> None:
    small = ExampleCase(pattern="all_reduce", nbytes=M, bus_gb_per_s=40, noise=0.4, samples=12)
    document = made(tmp_path, cases=(NODE, RAIL, WORLD, small))
    verdicts = {(r.check, r.verdict) for r in document.checks if r.subject == small.id}
    assert {check for check, verdict in verdicts if verdict is Verdict.NOT_RUN} == {
        "dispersion", "floor", "skew", "starts",
    }  # fmt: skip
    assert document.verdict is Verdict.PASS
