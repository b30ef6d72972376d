"""Residuals of ranks and NICs."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ncclbench.analysis.residuals import case_flows, lateness, nic_residuals, percent, rank_residuals
from ncclbench.store.records import FlowTimes
from ncclbench.store.run_directory import read_run
from ncclbench.store.run_writer import RunWriter
from ncclbench_reports.html_page.endpoint_names import EndpointNames
from ncclbench_reports.html_page.flow_heatmaps import nics_of
from tests.helpers.cluster_runs import SLOW_RANK, WORLD, cluster_manifest, collective, flows
from tests.helpers.stored import known, like


def test_lateness_is_the_difference_to_the_longest_duration() -> None:
    seconds_RN = np.array([[10e-6, 10e-6], [10e-6, 12e-6], [4e-6, 4e-6]])
    np.testing.assert_allclose(lateness(seconds_RN) * 1e6, [1, 0, 7])


def test_slow_rank_has_the_largest_residual(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    record, seconds_RN = collective(1 << 20)
    seconds_RN[SLOW_RANK] *= 1.5
    writer.append(record, ["total"], seconds_RN[:, :, None])
    run = read_run(tmp_path / "run")
    found = rank_residuals(run, known(run.topology).rails)
    assert int(np.argmax(found.residual_R)) == SLOW_RANK
    assert percent(float(found.residual_R[SLOW_RANK])) == pytest.approx(50, abs=5)


def test_flows_without_a_time_have_no_rate() -> None:
    found = case_flows(flows(1 << 20), WORLD)
    assert found is not None
    assert len(found.src_F) == 24
    assert found.gb_per_s_F[0] == pytest.approx((1 << 20) / 100.2 / 1e3)
    assert np.isnan(found.gb_per_s_F[-1])


def test_slow_nic_is_named(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", cluster_manifest())
    writer.append(flows())
    run = read_run(tmp_path / "run")
    nics = nic_residuals(run, *nics_of(EndpointNames.of(run)))
    slow = min(nics, key=lambda nic: nic.send)
    assert slow.name == "n1 rail 1 rail1"
    assert percent(slow.send) == pytest.approx(-50, abs=2)
    assert abs(percent(slow.receive)) < 2
    assert slow.peers == 4
    assert all(abs(percent(nic.send)) < 2 for nic in nics if nic is not slow)


@pytest.mark.parametrize("flows_field", [{"src": [0]}, {"src": [99], "dst": [0], "nbytes": [1], "p50_us": [1]}, {}])
def test_damaged_flows_are_ignored(flows_field: dict[str, Any]) -> None:
    record = flows()
    phase = msgspec.structs.replace(record.phases[0], flows=msgspec.convert(flows_field, FlowTimes))
    assert case_flows(like(record, phases=[phase]), WORLD) is None
