"""Verdicts and exit codes of data, paths, health, software, fabric and skew, from synthetic runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ncclbench.accept.check_context import CheckContext
from ncclbench.accept.example_runs import H100, with_warning, write_example
from ncclbench.accept.profile import load_profile, parse_profile
from ncclbench.config.plugins import load, names
from ncclbench.errors import Exit
from ncclbench.store.gpu_warnings import gpu_warnings
from ncclbench.store.records import GpuState, PathCounters, Record
from ncclbench.store.run_directory import read_run
from ncclbench.store.samples import write_samples
from ncclbench.store.verdict import Action, CheckResult, Verdict
from tests.helpers.acceptance import HEALTHY, NODE, RAIL, WORLD, case, example, made, of, only, verdict_on
from tests.helpers.stored import known, like, plain

pytestmark = pytest.mark.usefixtures("unsynced")
CHECKS = (
    "baseline", "data", "dispersion", "drift", "fabric", "fleet", "floor", "health", "path", "samples", "skew",
    "starts",
)  # fmt: skip


def test_checks_are_found_by_module_name() -> None:
    assert tuple(names("checks")) == CHECKS
    for name in CHECKS:
        assert load("checks", name).__doc__


def test_healthy_run_passes(healthy: Path) -> None:
    document = verdict_on(healthy)
    assert (document.verdict, document.exit_code) == (Verdict.PASS, Exit.GOOD), document.reasons
    assert document.starts == type(document.starts)(declared=3, present=3)
    assert document.stamps == ["synthetic"]
    assert {r.check for r in document.checks} == set(CHECKS)
    assert not [r for r in document.checks if r.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)]


def test_wrong_data_in_one_case_decide_the_verdict(tmp_path: Path) -> None:
    document = made(tmp_path, cases=(NODE, RAIL, case(WORLD, wrong=7, bus_gb_per_s=200)))
    assert (document.verdict, document.exit_code) == (Verdict.FAIL, Exit.WRONG_DATA)
    (result,) = of(document, "data", Verdict.FAIL)
    assert result.subject == WORLD.id
    assert result.action is Action.ISOLATE
    assert result.evidence[0]["wrong_ranks"] == [0]


@pytest.mark.parametrize("change", [{"status": "ok", "wrong": 3}, {"status": "wrong", "wrong": None}])
def test_wrong_data_by_status_or_by_count(change: dict[str, Any], tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        return msgspec.structs.replace(record, **change) if (record.start, record.case) == (1, WORLD.id) else record

    document = made(tmp_path, edit=edit)
    assert document.exit_code == Exit.WRONG_DATA
    assert [r.subject for r in of(document, "data", Verdict.FAIL)] == [WORLD.id]


def test_unchecked_data_are_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: msgspec.structs.replace(record, wrong=None))
    assert document.exit_code == Exit.INCONCLUSIVE
    assert len(of(document, "data", Verdict.INCONCLUSIVE)) == 3


def test_sockets_instead_of_verbs_fail(tmp_path: Path) -> None:
    document = made(tmp_path, links=("NET/Socket", "P2P/CUMEM"))
    assert document.exit_code == Exit.FAIL
    failed = of(document, "path", Verdict.FAIL)
    assert len(failed) == 3
    assert "NET/Socket" in failed[0].reason
    assert plain(failed[0].evidence)[0]["path"]["links"] == ["NET/Socket", "P2P/CUMEM"]


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


def test_unrecorded_path_inside_a_node_is_unverified(tmp_path: Path) -> None:
    document = made(tmp_path, nodes=1, cases=(NODE,), edit=lambda r: msgspec.structs.replace(r, path=None))
    assert "no link was recorded" in only(document, "path", Verdict.INCONCLUSIVE).reason


def test_profile_can_require_a_proven_path(healthy: Path) -> None:
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
def test_gpu_with_throttling_or_errors_is_named(warning: str, verdict: Verdict, action: Action, tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: with_warning(record, 13, warning))
    result = only(document, "health", verdict)
    assert result.action is action
    assert "rank 13" in result.reason
    assert result.evidence[0]["warning"] == warning
    assert document.verdict is verdict


@pytest.mark.parametrize(("each", "verdict"), [(300, Verdict.PASS), (600, Verdict.FAIL)])
def test_checksum_errors_are_summed_over_a_start(each: int, verdict: Verdict, tmp_path: Path) -> None:
    """Each case takes 5 s and has too few errors for its own warning: 60 and 120 per second."""
    counted = dict[tuple[int, int | None], int]()

    def edit(record: Record) -> Record:
        gpus = []
        for gpu in record.gpus:
            done = counted.get((record.start, gpu.rank), 0)
            counted[record.start, gpu.rank] = done + 1
            more = each if gpu.rank == 6 else 3
            before, after = (
                GpuState(clock_seconds=5.0 * n, errors={"NVLink 4 CRC data errors": more * n}) for n in (done, done + 1)
            )
            gpus.append(like(gpu, before=before, after=after, warnings=gpu_warnings(before, after)))
        return msgspec.structs.replace(record, gpus=gpus)

    document = made(tmp_path, edit=edit)
    assert min(counted.values()) > 2
    (result,) = [r for r in of(document, "health") if r.subject.startswith("gpu")]
    assert result.verdict is verdict
    if verdict is Verdict.FAIL:
        assert "NVLink CRC data errors on rank 6" in result.reason
        assert "link 4" in plain(result.evidence)[0]["warning"]


def test_checksum_errors_over_cases_and_within_a_case_are_both_named(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        gpus = []
        for gpu in record.gpus:
            before, after = (
                GpuState(clock_seconds=at, errors={"NVLink 4 CRC data errors": errors})
                for at, errors in ((0.0, 0), (2.0, {2: 5000, 6: 900}.get(known(gpu.rank), 0)))
            )
            gpus.append(like(gpu, before=before, after=after, warnings=gpu_warnings(before, after)))
        return msgspec.structs.replace(record, gpus=gpus)

    assert "on ranks 2, 6," in only(made(tmp_path, edit=edit), "health", Verdict.FAIL).reason


def test_invalid_gpu_state_hides_no_other_warning(tmp_path: Path) -> None:
    def edit(record: Record) -> Record:
        odd = GpuState(errors={"NVLink 0 CRC errors": None})
        gpus = [like(gpu, after=odd) if gpu.rank == 0 else gpu for gpu in record.gpus]
        return with_warning(msgspec.structs.replace(record, gpus=gpus), 1, "ECC uncorrected errors rose by 3")

    result = only(made(tmp_path, edit=edit), "health", Verdict.FAIL)
    assert "rank 1" in result.reason


def test_profile_overrides_the_verdict_of_a_warning(tmp_path: Path) -> None:
    text = load_profile("h100-hgx-ib").text
    text += '[[health]]\nmatch = "software power cap"\nverdict = "FAIL"\naction = "ISOLATE"\n'
    document = made(
        tmp_path, parse_profile(text, "p"), edit=lambda record: with_warning(record, 1, "software power cap")
    )
    assert only(document, "health", Verdict.FAIL).action is Action.ISOLATE


def test_missing_gpu_states_are_inconclusive(tmp_path: Path) -> None:
    document = made(tmp_path, edit=lambda record: msgspec.structs.replace(record, gpus=[]))
    assert only(document, "health", Verdict.INCONCLUSIVE).subject == "gpu"


def test_nic_with_errors_is_named(tmp_path: Path) -> None:
    def edit(moved: list[dict[str, Any]]) -> Callable[[Record], Record]:
        return lambda r: like(r, path=like(known(r.path), counters=msgspec.convert({"moved": moved}, PathCounters)))

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
def test_software_that_differs_on_one_rank_fails(view: dict[str, Any], subject: str, tmp_path: Path) -> None:
    result = only(made(tmp_path, software={9: view}), "drift", Verdict.FAIL)
    assert result.subject == subject
    assert "on rank 9" in result.reason
    assert result.action is Action.ISOLATE


def test_variables_of_host_and_devices_may_differ(tmp_path: Path) -> None:
    views = {
        rank: {"variables": {"UCX_NET_DEVICES": f"mlx5_{rank}:1", "NCCL_HOSTID": f"n0-{rank}"}} for rank in range(8)
    }
    assert made(tmp_path, software=views).verdict is Verdict.PASS


def test_versions_of_rank_0_alone_are_inconclusive(run: Path) -> None:
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


def test_allowed_variables_may_differ_between_starts(run: Path) -> None:
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


def test_arrival_skew_names_the_last_rank(tmp_path: Path) -> None:
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


def test_profile_of_another_fabric_never_fails_a_run(tmp_path: Path) -> None:
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
        return like(record, path=like(known(record.path), link_layer=["RoCE"]))

    document = made(tmp_path, edit=edit)
    assert "NICs speak RoCE" in of(document, "fabric", Verdict.INCONCLUSIVE)[0].reason


def test_rack_with_assumed_domains_is_not_judged_as_several(tmp_path: Path) -> None:
    """Without a topology file, 18 trays look like 18 domains, which have a much lower floor."""
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


def test_check_that_raises_makes_the_verdict_inconclusive(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_subject: CheckContext) -> list[CheckResult]:
        raise RuntimeError("bad\ninput")

    monkeypatch.setattr(load("checks", "skew"), "check", broken)
    document = verdict_on(healthy)
    assert document.exit_code == Exit.INCONCLUSIVE
    assert only(document, "skew", Verdict.INCONCLUSIVE).reason == "the check itself failed: RuntimeError: bad input"


def test_example_gpu_matches_the_profile() -> None:
    assert H100 == "NVIDIA H100 80GB HBM3"
