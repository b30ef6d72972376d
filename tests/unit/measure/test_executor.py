"""Executors: threads by a supported call, and one without ranks that is a single file, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ncclbench.cli.list_ import command as list_command
from ncclbench.cli.run import command as run_command
from ncclbench.config.plugins import load
from ncclbench.measure.executor import ThreadExecutor
from ncclbench.plan.plan import Settings
from ncclbench.schedule import Case
from ncclbench.store.run_directory import read_run
from ncclbench.topology import Topology
from ncclbench.transports.capabilities import Capabilities, Hosting, capabilities_of
from tests.helpers.acceptance import verdict_on
from tests.helpers.third_party import install

SIZES = ("-b", "1K", "-e", "4K", "-f", "4")


@pytest.fixture
def toy(site: Path) -> Callable[..., Result]:
    """The command `run --transport toy`, where that is installed."""
    install(site, "[ncclbench.transports]\ntoy = tests.helpers.toy_transport\n")

    def run(*arguments: object) -> Result:
        given = [str(one) for one in (*arguments, "--transport", "toy", "--nproc", 8)]
        return CliRunner().invoke(run_command, given)

    return run


def test_threads_execute_a_case() -> None:
    case, settings = Case(pattern="all_reduce", nbytes=64), Settings(iterations=6, warmup=1)
    measured = ThreadExecutor(4).execute(case, Topology.single_node(4), settings)
    assert measured is not None
    assert (measured.record.status, measured.record.transport, measured.record.world_size) == ("ok", "threads", 4)


def test_thread_rank_calls_on_start_with_its_number() -> None:
    told: list[int] = []
    settings = Settings(iterations=6, warmup=1, check=False)
    executor = ThreadExecutor(3, on_start=told.append)
    executor.execute(Case(pattern="all_reduce", nbytes=64), Topology.single_node(3), settings)
    assert sorted(told) == [0, 1, 2]


def test_a_model_makes_a_run_directory_like_any_other(toy: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = toy("all_reduce", "broadcast", *SIZES, "-o", out)
    assert done.exit_code == 0, done.output
    run = read_run(out)
    assert [(r.pattern, r.status, r.transport, r.world_size) for r in run.records] == [
        ("all_reduce", "ok", "toy", 8),
        ("all_reduce", "ok", "toy", 8),
        ("broadcast", "skipped", "toy", 8),
        ("broadcast", "skipped", "toy", 8),
    ]
    first = run.records[0]
    assert first.time_us is not None
    assert first.time_us.p50 == pytest.approx(2 * 7 / 8 * 1024 * 1e-3)  # a ring's bytes, at a nanosecond each
    assert first.samples is not None
    assert (out / first.samples).exists()
    assert [event.kind for event in run.events][-1] == "end"


def test_a_modelled_run_is_stamped_wherever_it_is_shown(toy: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = toy("all_reduce", *SIZES, "-o", out)
    assert "simulated" in done.output  # the table
    run = read_run(out)
    assert run.is_simulated
    assert "simulated" in load("reports", "html").render([run])
    assert "simulated" in verdict_on(out).stamps


def test_a_modelled_run_is_resumed(toy: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy("all_reduce", *SIZES, "-o", out).exit_code == 0
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(lines[0])
    done = toy("all_reduce", *SIZES, "-o", out, "--resume")
    assert done.exit_code == 0, done.output
    assert len(read_run(out).records) == 2


def test_a_dry_run_and_the_list_know_a_model(toy: Callable[..., Result]) -> None:
    done = toy("all_reduce", *SIZES, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert (answer["transport"], answer["world_size"], len(answer["cases"])) == ("toy", 8, 2)
    listed = CliRunner().invoke(list_command, ["transports"]).output
    assert "toy        A transport without ranks, in one file" in listed


@pytest.mark.usefixtures("toy")
def test_thousands_of_ranks_are_modelled(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        run_command,
        ["all_reduce", *SIZES, "-n", "6", "--transport", "toy", "--nproc", "4096", "-o", str(tmp_path / "run")],
    )
    assert done.exit_code == 0, done.output
    assert read_run(tmp_path / "run").records[0].world_size == 4096


def test_a_module_that_declares_nothing_has_the_defaults(site: Path) -> None:
    install(site, "[ncclbench.transports]\nplain = outsider_plain\n", outsider_plain="def open_transport(*_): ...\n")
    found = capabilities_of("plain")
    assert found == Capabilities(name="plain", import_libraries=found.import_libraries)
    assert found.hosting is Hosting.PROCESSES
