"""The public API, for programs, notebooks and the command line.

    import ncclbench

    run = ncclbench.load_run("runs/first")
    run.frame()                                     # a pandas DataFrame, one row per record

    from ncclbench import RunRequest

    done = ncclbench.run(RunRequest(patterns=("all_reduce",), max_bytes="1M", nproc=4))
    done.exit_code, done.load().records

``docs/api.md`` documents the API and its stability. Every error is an `ncclbench.errors.NcclbenchError`. Importing this
module imports no other package of ncclbench; each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ncclbench.errors import Exit, UsageError, worst

if TYPE_CHECKING:
    import pandas as pd

    from ncclbench.accept.profile import Rules
    from ncclbench.accept.request import AcceptRequest
    from ncclbench.analysis.comparison import Comparison
    from ncclbench.launch.listener import Listener
    from ncclbench.launch.request import RunRequest
    from ncclbench.measure.dry_run import Forecast
    from ncclbench.store.records import Record
    from ncclbench.store.run_directory import Run
    from ncclbench.store.verdict import RunVerdict

AnyPath = str | Path


class LoadedRun:
    """The contents of a run directory.

    Attributes:
        run: manifest, records and events.
    """

    def __init__(self, run: Run) -> None:
        """Wrap a run; `load_run` reads one."""
        self.run = run

    @property
    def path(self) -> Path:
        """The path of the run directory."""
        return self.run.path

    @property
    def records(self) -> tuple[Record, ...]:
        """The last record of each case in each process start."""
        return self.run.records

    def frame(self) -> pd.DataFrame:
        """One row per record, with the columns of the CSV and Parquet reports; see ``docs/formats.md``."""
        return frame([self])

    def report(self, fmt: str = "table") -> str | bytes:
        """Render the run in a format of ``ncclbench list reports``."""
        return report([self], fmt)

    def __repr__(self) -> str:
        """The path and the number of records."""
        return f"LoadedRun({str(self.path)!r}, {len(self.records)} records)"

    def _repr_html_(self) -> str:
        """The summary table for a notebook."""
        from ncclbench_reports.common.notebook_summary import summary_html

        return summary_html(self.run)


@dataclass(frozen=True)
class FinishedRun:
    """The result of `run`.

    Attributes:
        exit_code: `Exit.GOOD`, or the most severe exit code of all ranks and process starts.
        path: the run directory; it may not exist after an error.
    """

    exit_code: Exit
    path: Path

    def load(self) -> LoadedRun:
        """Read the run directory.

        Raises:
            UsageError: if there is none, because every process start failed earlier.
        """
        return load_run(self.path)


@dataclass(frozen=True)
class Acceptance:
    """The result of `accept`.

    Attributes:
        exit_code: the exit code of the verdict, or of the measurement if that is more severe.
        path: the run directory; None if nothing was measured.
        document: the verdict; None if this process is not rank 0, or if nothing was measured.
        redacted: the redacted bundle; None if it was not requested.
        not_run: why nothing was measured; None if there is a measurement.
    """

    exit_code: Exit
    path: Path | None = None
    document: RunVerdict | None = None
    redacted: Path | None = None
    not_run: str | None = None


def run(request: RunRequest, listener: Listener | None = None) -> FinishedRun:
    """Measure the cases of `request`, and store every sample.

    Without a launcher, this starts the ranks as processes on this host, or by `request.launcher`. Under a launcher,
    this process becomes one of the ranks. With ``request.progress`` the ranks print progress on stderr.

    Args:
        request: what to measure.
        listener: receives the events of this process; by default they are ignored.

    Raises:
        NcclbenchError: if nothing could be started. Later failures are in the exit code and in the run directory.
    """
    from ncclbench.launch.execution import execute
    from ncclbench.launch.listener import QuietListener

    ended = execute(_complete(request), listener or QuietListener())
    return FinishedRun(ended.exit_code, ended.path)


def forecast(request: RunRequest) -> Forecast:
    """Estimate the memory and time of the cases of `request`; nothing is started.

    Raises:
        NcclbenchError: if the request would be refused.
    """
    from ncclbench.launch.execution import forecast_of

    return forecast_of(_complete(request))


def accept(request: AcceptRequest, listener: Listener | None = None) -> Acceptance:
    """Judge a run by a profile, and write the bundle into the run directory; measure first if `request.run` is None.

    Args:
        request: the profile and the run, or how to measure one.
        listener: receives the events of the measurement; by default they are ignored.

    Raises:
        NcclbenchError: if the request is invalid, or nothing could be started.
    """
    request, rules = _with_rules(request)
    if request.run is not None:
        return _judge(request.run, rules, request)
    return _measure_and_judge(rules, request, listener)


def forecast_accept(request: AcceptRequest) -> Forecast:
    """Estimate the memory and time of the cases that `accept` would measure; nothing is started.

    Raises:
        NcclbenchError: if the request would be refused.
    """
    request, rules = _with_rules(request)
    if request.run is not None:
        raise UsageError(f"--dry-run is for a new run; {request.run} was measured already")
    return forecast(_measurement(rules, request))


def make_profile(golden: AnyPath, name: str | None = None) -> str:
    """Make a profile, as TOML, from the figures of a golden run.

    Args:
        golden: the run directory of the golden run.
        name: name of the profile; by default the name of the directory.
    """
    from ncclbench.accept.profile_from_run import make_profile as profile_of
    from ncclbench.store.run_directory import read_run

    return profile_of(read_run(Path(golden)), name or Path(golden).name)


def load_run(path: AnyPath) -> LoadedRun:
    """Read a run directory, finished or interrupted.

    Raises:
        UsageError: if the path is not a run directory, is damaged, or has a newer schema.
    """
    from ncclbench.store.run_directory import read_run

    return LoadedRun(read_run(Path(path)))


def load_runs(paths: Iterable[AnyPath]) -> list[LoadedRun]:
    """Read several run directories, in the order of `paths`.

    Raises:
        UsageError: naming each directory that cannot be read, or one that is given twice.
    """
    from ncclbench.store.run_directory import read_runs

    wanted = [Path(path) for path in paths]
    seen: set[Path] = set()
    for path in wanted:
        if path.resolve() in seen:
            raise UsageError(f"{path} is named twice: a run counts once")
        seen.add(path.resolve())
    return [LoadedRun(run) for run in read_runs(wanted)]


def frame(runs: Sequence[LoadedRun]) -> pd.DataFrame:
    """One row per record of all `runs`; the column `run` names the directory."""
    from ncclbench_reports.common.record_rows import flat_frame

    return flat_frame([loaded.run for loaded in runs])


def report(runs: Sequence[LoadedRun], fmt: str = "table") -> str | bytes:
    """Render the runs in a format of ``ncclbench list reports``; the result of a binary format is bytes.

    Raises:
        UsageError: if there is no such format.
    """
    from ncclbench.config.plugins import load

    rendered: str | bytes = load("reports", fmt).render([loaded.run for loaded in runs])
    return rendered


def compare(base: AnyPath, new: AnyPath, *, force: bool = False, margin: float = 0.01) -> Comparison:
    """Compare two runs, or two directories of runs, case by case.

    Args:
        base: the reference.
        new: the side that may be slower.
        force: compare even if fabric, record version or settings differ.
        margin: relative change below which a case counts as equal.

    Raises:
        UsageError: if a side cannot be read, or if the sides are unlike or identical.
    """
    from ncclbench.analysis.comparison import compare as compare_sides
    from ncclbench.analysis.run_sets import read_side

    base, new = Path(base), Path(new)
    if not 0 <= margin < 1:
        raise UsageError(f"--margin must be from 0 to below 1, got {margin:g}")
    if base.resolve() == new.resolve():
        raise UsageError(f"BASE and NEW are both {base}")
    return compare_sides(read_side(base), read_side(new), force=force, margin=margin)


@dataclass(frozen=True)
class ImportedRun:
    """The result of `import_logs`: the path of the run directory, and remarks for the user, one per line."""

    path: Path
    remarks: tuple[str, ...]

    def load(self) -> LoadedRun:
        """Read the run directory."""
        return load_run(self.path)


def import_logs(
    logs: Iterable[AnyPath],
    out: AnyPath,
    *,
    fmt: str | None = None,
    pattern: str | None = None,
    world_size: int | None = None,
    skip_damaged: bool = False,
    command: Sequence[str] = (),
) -> ImportedRun:
    """Convert logs of other tools to a run directory.

    Args:
        logs: the log files.
        out: the run directory to write.
        fmt: a format of ``ncclbench list importers``; by default it is detected in each log.
        pattern: the pattern, if the log does not name it.
        world_size: the number of ranks, if the log does not state it.
        skip_damaged: skip and report damaged lines instead of refusing the log.
        command: the user's command line after ``ncclbench``, for the manifest.

    Raises:
        UsageError: if a log cannot be read, or `out` cannot be used. Then nothing is written.
    """
    from ncclbench.config.plugins import names
    from ncclbench.config.refusals import unknown
    from ncclbench.importers.common.import_logs import import_logs as write_imported
    from ncclbench.importers.common.imported_cases import Stated
    from ncclbench.importers.common.log_file import Log
    from ncclbench.importers.common.nccl_tests_tables import PATTERNS

    known = sorted({*names("patterns"), *PATTERNS.values()})
    if pattern is not None and pattern not in known:
        raise UsageError(f"--pattern: {unknown('pattern', pattern, known)}")
    stated = Stated(pattern=pattern, world_size=world_size, skip_damaged=skip_damaged)
    opened = [Log.open(Path(path)) for path in logs]
    remarks = write_imported(opened, Path(out), stated, fmt, list(command) or ["import"])
    return ImportedRun(Path(out), tuple(remarks))


def _complete(request: RunRequest) -> RunRequest:
    """Check the request, and add a command line that repeats it if there is none."""
    import msgspec

    from ncclbench.config.request_json import checked
    from ncclbench.launch.request import rank_arguments

    request = checked(request)
    return request if request.command else msgspec.structs.replace(request, command=tuple(rank_arguments(request)))


def _with_rules(request: AcceptRequest) -> tuple[AcceptRequest, Rules]:
    """Check the request, and load the rules of its profile."""
    from ncclbench.accept.profile import load_profile
    from ncclbench.config.request_json import checked

    request = checked(request)
    if request.force and request.baseline is None:
        raise UsageError("--force goes with --baseline: it forces only that comparison")
    rules = load_profile(request.profile)
    for value, flag in (
        (request.plan, "--plan"),
        (request.out, "--out"),
        (request.nproc, "--nproc"),
        (request.topology, "--topology"),
        (request.launcher, "--launcher"),
        (request.resume, "--resume"),
    ):
        if value and request.run is not None:
            raise UsageError(f"{flag} is for a new run; {request.run} was measured already")
    return request, rules


def _measurement(rules: Rules, request: AcceptRequest) -> RunRequest:
    """The measurement that the profile requires; its results are not printed."""
    from ncclbench.launch.request import RunRequest

    by_profile = str(rules.profile.fabric.transports[0])
    return RunRequest(
        plan=request.plan or str(rules.profile.plan),
        transport=by_profile if request.transport == "auto" else request.transport,
        nproc=request.nproc,
        topology=request.topology,
        out=request.out,
        launcher=request.launcher,
        resume=request.resume,
        progress=request.progress,
        command=request.command,
    )


def _measure_and_judge(rules: Rules, request: AcceptRequest, listener: Listener | None) -> Acceptance:
    """Make the process starts, then judge the run; under a launcher only rank 0 judges."""
    import msgspec

    from ncclbench.launch.launcher_detection import is_rank_0
    from ncclbench.launch.preparation import default_run_directory

    name = rules.profile.name
    judging = is_rank_0()
    out = request.out or default_run_directory(name)
    _baseline(request.baseline, out)  # refuse an invalid baseline before hours of measurement
    code = run(msgspec.structs.replace(_measurement(rules, request), out=out), listener).exit_code
    if not judging:
        return Acceptance(code)
    nothing = f"profile {name}: nothing was measured, since "
    if code is Exit.USAGE:
        return Acceptance(code, not_run=f"{nothing}the request was refused; see the error above")
    if not (out / "manifest.json").exists():
        code = worst([code, Exit.ENVIRONMENT])
        return Acceptance(code, not_run=f"{nothing}no process start began to measure")
    judged = _judge(out, rules, request)
    return Acceptance(worst([code, judged.exit_code]), out, judged.document, judged.redacted)


def _judge(path: Path, rules: Rules, request: AcceptRequest) -> Acceptance:
    from ncclbench.accept.bundle import write_bundle
    from ncclbench.accept.check_context import CheckContext
    from ncclbench.accept.redacted_bundle import write_redacted_bundle
    from ncclbench.store.run_directory import read_run

    subject = CheckContext(read_run(path), rules, _baseline(request.baseline, path), request.force)
    document = write_bundle(subject)
    redacted = write_redacted_bundle(subject) if request.redact else None
    return Acceptance(Exit(document.exit_code or 0), path, document, redacted)


def _baseline(path: Path | None, run: Path) -> Run | None:
    """Read the baseline; refuse the run itself, which always agrees with itself."""
    from ncclbench.store.run_directory import read_run

    if path is None:
        return None
    base = read_run(path)
    same_file = path.resolve() == run.resolve()
    copied = (run / "manifest.json").exists() and _same_records(path, run)
    if same_file or copied:
        raise UsageError(f"--baseline {path} is the run itself, which proves nothing; name an earlier run")
    return base


def _same_records(one: Path, other: Path) -> bool:
    files = [path / "results.jsonl" for path in (one, other)]
    return all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes() != b""
