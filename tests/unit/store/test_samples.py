"""Lazy reading of raw samples: only the requested phase and the needed columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ncclbench.store.run_directory import read_run
from ncclbench.store.samples import seconds_of_ranks
from tests.helpers.cluster_runs import (
    WORLD,
    rich_run,
)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    return rich_run(tmp_path / "rich")


def test_samples_are_read_by_phase(rich: Path) -> None:
    run = read_run(rich)
    record = next(record for record in run.records if record.pattern == "moe_dispatch")
    total, dispatch = (seconds_of_ranks(run, record, phase) for phase in ("total", "dispatch"))
    assert total is not None
    assert dispatch is not None
    assert total.shape == (WORLD, 40)
    np.testing.assert_allclose(dispatch, 0.45 * total)
    assert seconds_of_ranks(run, record, "nothing") is None
    assert record.time_us is not None
    assert np.median(total.max(axis=0)) * 1e6 == pytest.approx(record.time_us.p50)


def test_only_needed_columns_are_read(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    read = pq.ParquetFile.read

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return read(*arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", noted)
    run = read_run(rich)
    assert asked == []  # reading a run does not read samples
    seconds_of_ranks(run, run.records[0])
    assert asked == [["rank", "iteration", "phase", "seconds"]]
