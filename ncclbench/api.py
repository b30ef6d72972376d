"""The public API: what the command line calls, and what a program or a notebook calls.

    import ncclbench

    run = ncclbench.load_run("runs/first")
    run.frame()                                     # a pandas DataFrame, one row per record

    from ncclbench import RunRequest

    done = ncclbench.run(RunRequest(patterns=("all_reduce",), max_bytes="1M", nproc=4))
    done.exit_code, done.load().records

``docs/api.md`` documents it and says what is stable. Every error is an `ncclbench.errors.NcclbenchError`. Importing
this module loads no other package of the product; a function loads what it needs.
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
    """A run directory, read.

    Attributes:
        run: the typed run: manifest, records and events.
    """

    def __init__(self, run: Run) -> None:
        """Wrap a run that was read; see `load_run`."""
        self.run = run

    @property
    def path(self) -> Path:
        """Where the run directory is."""
        return self.run.path

    @property
    def records(self) -> tuple[Record, ...]:
        """The last record of each case in each process start."""
        return self.run.records

    def frame(self) -> pd.DataFrame:
        """One row per record; ``docs/formats.md`` lists the columns, which are those of the CSV and Parquet reports."""
        return frame([self])

    def report(self, fmt: str = "table") -> str | bytes:
        """The run in one of the formats of ``ncclbench list reports``."""
        return report([self], fmt)

    def __repr__(self) -> str:
        """The directory, and how many records there are."""
        return f"LoadedRun({str(self.path)!r}, {len(self.records)} records)"

    def _repr_html_(self) -> str:
        """The summary table, as a notebook shows it."""
        from ncclbench_reports.common.summary_table import summary_html

        return summary_html(self.run)


@dataclass(frozen=True)
class FinishedRun:
    """What `run` came to.

    Attributes:
        exit_code: `Exit.GOOD`, or the most severe of what happened.
        path: the run directory; it need not be there after an error.
    """

    exit_code: Exit
    path: Path

    def load(self) -> LoadedRun:
        """The run directory.

        Raises:
            UsageError: if there is none, because no process start came so far.
        """
        return load_run(self.path)


@dataclass(frozen=True)
class Acceptance:
    """What `accept` came to.

    Attributes:
        exit_code: the verdict's, or that of the measurement if it is more severe.
        path: the run directory; None if nothing was measured.
        document: the verdict; None if this process is not rank 0, or if nothing was measured.
        redacted: the redacted bundle; None if none was asked for.
        not_run: why nothing was measured; None if something was.
    """

    exit_code: Exit
    path: Path | None = None
    document: RunVerdict | None = None
    redacted: Path | None = None
    not_run: str | None = None


def run(request: RunRequest, listener: Listener | None = None) -> FinishedRun:
    """Measure what `request` asks for, and store every sample.

    Started alone, it starts the ranks as processes on this host, or by `request.launcher`. Under a launcher it joins
    the job as one of its ranks. With ``request.progress`` the ranks report on stderr.

    Args:
        request: what to measure.
        listener: told what happens; by default nothing is reported by this process.

    Raises:
        NcclbenchError: if nothing could be started. What fails later is in the exit code and in the run directory.
    """
    from ncclbench.launch.execution import execute
    from ncclbench.launch.listener import QuietListener

    ended = execute(_complete(request), listener or QuietListener())
    return FinishedRun(ended.exit_code, ended.path)


def forecast(request: RunRequest) -> Forecast:
    """The cases of `request`, their memory and a guess of the time; nothing is started.

    Raises:
        NcclbenchError: if the request would be refused.
    """
    from ncclbench.launch.execution import forecast_of

    return forecast_of(_complete(request))


def accept(request: AcceptRequest, listener: Listener | None = None) -> Acceptance:
    """Judge a run by a profile, after measuring it if `request.run` is None; writes the bundle into the run directory.

    Args:
        request: the profile, and what to judge.
        listener: told what happens while it measures; by default nothing is reported by this process.

    Raises:
        NcclbenchError: if the request makes no sense, or nothing could be started.
    """
    request, rules = _with_rules(request)
    if request.run is not None:
        return _judge(request.run, rules, request)
    return _measure_and_judge(rules, request, listener)


def forecast_accept(request: AcceptRequest) -> Forecast:
    """What `accept` would measure; nothing is started.

    Raises:
        NcclbenchError: if the request would be refused.
    """
    request, rules = _with_rules(request)
    if request.run is not None:
        raise UsageError(f"--dry-run is for a new run; {request.run} was measured already")
    return forecast(_measurement(rules, request))


def make_profile(golden: AnyPath, name: str | None = None) -> str:
    """A profile, as TOML, with the figures of a golden run.

    Args:
        golden: its run directory.
        name: of the profile; by default that of the directory.
    """
    from ncclbench.accept.profile_from_run import make_profile as profile_of
    from ncclbench.store.run_directory import read_run

    return profile_of(read_run(Path(golden)), name or Path(golden).name)


def load_run(path: AnyPath) -> LoadedRun:
    """The run in a run directory, whole or cut off.

    Raises:
        UsageError: if it is no run directory, is damaged, or is of a newer schema.
    """
    from ncclbench.store.run_directory import read_run

    return LoadedRun(read_run(Path(path)))


def load_runs(paths: Iterable[AnyPath]) -> list[LoadedRun]:
    """Several runs, in the order of `paths`.

    Raises:
        UsageError: naming each directory that cannot be read, or one that is named twice.
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
    """The runs in one of the formats of ``ncclbench list reports``; bytes where it is no text.

    Raises:
        UsageError: if there is no such format.
    """
    from ncclbench.config.plugins import load

    rendered: str | bytes = load("reports", fmt).render([loaded.run for loaded in runs])
    return rendered


def compare(base: AnyPath, new: AnyPath, *, force: bool = False, margin: float = 0.01) -> Comparison:
    """Two runs, or two directories of runs, case by case.

    Args:
        base: the side that is compared with.
        new: the side that may be slower.
        force: compare although fabric, record version or settings differ.
        margin: smaller changes count as the same.

    Raises:
        UsageError: if a side cannot be read, or if both are unlike or the same.
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
    """What `import_logs` made of the logs: the run directory, and what a user should know of it, in lines."""

    path: Path
    remarks: tuple[str, ...]

    def load(self) -> LoadedRun:
        """The run directory."""
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
    """A run directory of other tools' logs.

    Args:
        logs: the files.
        out: the run directory to make.
        fmt: one of ``ncclbench list importers``; by default what is in each log.
        pattern: what was measured, where the log does not say.
        world_size: how many ranks there were, where the log does not say.
        skip_damaged: leave damaged lines out, and name them, instead of refusing the log.
        command: the user's command line behind ``ncclbench``, for the manifest.

    Raises:
        UsageError: if a log cannot be read, or `out` cannot be used. Nothing is left behind.
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
    """The request, checked, with the command line that repeats it if no user has typed one."""
    import msgspec

    from ncclbench.config.request_json import checked
    from ncclbench.launch.request import rank_arguments

    request = checked(request)
    return request if request.command else msgspec.structs.replace(request, command=tuple(rank_arguments(request)))


def _with_rules(request: AcceptRequest) -> tuple[AcceptRequest, Rules]:
    """The request, checked, and the rules of its profile."""
    from ncclbench.accept.profile import load_profile
    from ncclbench.config.request_json import checked

    request = checked(request)
    if request.force and request.baseline is None:
        raise UsageError("--force goes with --baseline: nothing else is ever forced")
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
    """What the profile asks to measure; its results are the verdict's evidence, and are not printed."""
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
    """Make the process starts, then judge; under a launcher rank 0 judges."""
    import msgspec

    from ncclbench.launch.launcher_detection import is_rank_0
    from ncclbench.launch.preparation import named_after

    name = rules.profile.name
    judging = is_rank_0()
    out = request.out or named_after(name)
    _baseline(request.baseline, out)  # what is wrong with it is said before hours are spent
    code = run(msgspec.structs.replace(_measurement(rules, request), out=out), listener).exit_code
    if not judging:
        return Acceptance(code)
    nothing = f"profile {name}: nothing was measured, since "
    if code is Exit.USAGE:
        return Acceptance(code, not_run=f"{nothing}what was asked for was refused; why stands above")
    if not (out / "manifest.json").exists():
        code = worst([code, Exit.ENVIRONMENT])
        return Acceptance(code, not_run=f"{nothing}no process start came so far as to measure")
    judged = _judge(out, rules, request)
    return Acceptance(worst([code, judged.exit_code]), out, judged.document, judged.redacted)


def _judge(path: Path, rules: Rules, request: AcceptRequest) -> Acceptance:
    from ncclbench.accept.bundle import write_bundle
    from ncclbench.accept.check_context import Subject
    from ncclbench.accept.redacted_bundle import write_redacted_bundle
    from ncclbench.store.run_directory import read_run

    subject = Subject(read_run(path), rules, _baseline(request.baseline, path), request.force)
    document = write_bundle(subject)
    redacted = write_redacted_bundle(subject) if request.redact else None
    return Acceptance(Exit(document.exit_code or 0), path, document, redacted)


def _baseline(path: Path | None, run: Path) -> Run | None:
    """The baseline as a run; the run itself would always agree with itself, and is refused."""
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
