"""`RunRecorder` writes the run directory: records, events, and the end of the run."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ncclbench.errors import EnvironmentFault, Exit, worst
from ncclbench.launch.preparation import PreparedRun
from ncclbench.launch.process_starts import refuse_without_first
from ncclbench.launch.watchdog.attribution import Fault
from ncclbench.measure.case import Measurement
from ncclbench.measure.record import base_record
from ncclbench.measure.required_variables import wrongly_started
from ncclbench.plan.plan import PlannedCase
from ncclbench.store.events import utc_now
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record
from ncclbench.store.run_directory import FINISHED, read_run
from ncclbench.store.run_writer import RunWriter, what_is_kept
from ncclbench.store.samples import is_whole

# Identifies this process; in containers the process ids can repeat in every process start.
_PROCESS = uuid.uuid4().hex
_EXIT_OF_STATUS = {"wrong": Exit.WRONG_DATA, "failed": Exit.ENVIRONMENT, "timeout": Exit.ENVIRONMENT}


def _nothing_measured(records: list[Record]) -> str | None:
    """The reason if all cases were skipped; None otherwise."""
    if any(record.status != "skipped" for record in records):
        return None
    return f"nothing was measured: all {len(records)} cases were skipped, the first because {records[0].reason}"


class RunRecorder:
    """Writes the run directory on rank 0, and knows the case in progress.

    The measuring thread and the watchdog's thread both use it. After the end of the run nothing is written.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        """Prepare a recorder; `open` opens the run directory."""
        self.prepared = prepared
        self.out = prepared.out
        self.writer: RunWriter | None = None
        self.records: list[Record] = []
        self.world_size = 0
        self.staged: bool | None = None
        self.start = prepared.start or 0
        self._current: PlannedCase | None = None
        self._started = utc_now()
        self._ended = False
        self._end_reported = threading.Event()
        self._code = Exit.ENVIRONMENT
        # The measuring thread writes results and the watchdog's thread writes faults; only one may end the run.
        self._lock = threading.RLock()

    def open(self, manifest: Manifest) -> set[str]:
        """Open the run directory, and return the ids of the cases that this process start does not measure."""
        prepared, request = self.prepared, self.prepared.request
        self._note_header(manifest)
        begun_before = self.start > 0 and not (request.one_of_several and not (self.out / "manifest.json").exists())
        if request.resume or begun_before:
            refuse_without_first(self.out, 0 if request.resume else self.start)
            self.writer = RunWriter.resume(self.out, manifest)
            run = read_run(self.out)
            if prepared.start is None:
                self.start = run.open_start if run.open_start is not None else prepared.plan.process_starts - 1
            self.records = [r for r in run.records if r.status in FINISHED and not wrongly_started(r)]
        else:
            self.writer, run = RunWriter.create(self.out, manifest), None
        finished = {record.case for record in self.records if record.start == self.start}
        elsewhere = prepared.plan.elsewhere(self.start)
        begun = run is not None and any(event.kind == "start" and event.start == self.start for event in run.events)
        self.writer.event(
            "resume" if begun else "start",
            start=self.start,
            **({"mode": self.mode} if self.mode else {}),
            finished=len(finished),
            command=list(request.command),
            pids=[rank.pid for rank in manifest.ranks],
            process=_PROCESS,
            software=manifest.software,
        )
        if run is not None:
            self._warn_of_lost_samples()
        prepared.listener.started(
            self.out, len(prepared.plan.cases) - len(elsewhere), len(finished), self.world_size, str(manifest.transport)
        )
        return finished | elsewhere

    @property
    def mode(self) -> str | None:
        """The mode of this process start."""
        mode = self.prepared.plan.mode_of(self.start)
        return mode.name if mode else None

    def _note_header(self, manifest: Manifest) -> None:
        """Keep the fields of the manifest that the record of an unfinished case repeats."""
        self.world_size = manifest.world_size or 0
        self.staged = manifest.provenance.staged

    def _warn_of_lost_samples(self) -> None:
        """Warn if samples of finished cases are lost or cut; the cases stay finished."""
        lost = [r.case for r in self.records if r.samples and not is_whole(self.out / r.samples)]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            text = (
                f"the samples of {lost[0]}{more} are missing from {self.out}, or cut; the records are kept without them"
            )
            self.prepared.listener.warned(text)
            assert self.writer is not None
            self.writer.event("warning", text=text, cases=lost)

    def begin(self, number: int, planned: PlannedCase) -> None:
        """Store that a case begins."""
        with self._writing() as writer:
            self._current, self._started = planned, utc_now()
            writer.event("case", case=planned.case.id, start=self.start)
        self.prepared.listener.began(number, planned.case.id)

    def finish(self, measured: Measurement) -> None:
        """Store the samples of a finished case, then its record."""
        samples = measured.samples
        labels, seconds = (samples.labels, samples.seconds_RNK) if samples else (None, None)
        with self._writing() as writer:
            record = writer.append(self._of_this_start(measured.record), labels, seconds)
            self._current = None
            self.records.append(record)
        self.prepared.listener.finished(record)

    def _of_this_start(self, record: Record) -> Record:
        return msgspec.structs.replace(record, start=self.start, mode=self.mode)

    def end(self) -> Exit:
        """End the run after its last case, and return the exit code."""
        code = worst(_EXIT_OF_STATUS.get(record.status, Exit.GOOD) for record in self.records)
        more_to_come = self.prepared.plan.modes and self.start + 1 < self.prepared.plan.process_starts
        error = None if more_to_come else _nothing_measured(self.records)
        code = Exit.INCONCLUSIVE if error else code
        with self._writing() as writer:
            writer.event("end", start=self.start, exit_code=int(code))
            self._ended, self._code = True, code
        try:
            self.prepared.listener.ended(self.out, self.records, code, error)
        finally:
            self._end_reported.set()
        return code

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, with or without a fault."""
        return self._ended

    @contextmanager
    def _writing(self) -> Iterator[RunWriter]:
        """Yield the writer to one thread at a time. After the end of the run, block until the process ends."""
        with self._lock:
            if not self._ended:
                assert self.writer is not None
                yield self.writer
                return
        threading.Event().wait()

    def fault(self, fault: Fault) -> Exit:
        """End the run with a fault: store the case in progress as failed, and keep the finished cases.

        Returns:
            The exit code. Wrong data found earlier are more severe than the fault. If the run had already ended, its
            own exit code, after that has been reported.
        """
        with self._lock:
            ended, self._ended = self._ended, True
        if ended:
            self._end_reported.wait()
            return self._code
        try:
            return self._close(fault)
        finally:
            self._end_reported.set()

    def _close(self, fault: Fault) -> Exit:
        case = f"{self._current.case.id}: " if self._current else ""
        self._code = worst([Exit.ENVIRONMENT, *(_EXIT_OF_STATUS.get(r.status, Exit.GOOD) for r in self.records)])
        message = f"{case}{fault.reason}{what_is_kept(self.out)}"
        try:
            if self.writer is not None:
                self._store(self.writer, fault)
        except EnvironmentFault as error:  # on a full disk the last event is lost, but not the message
            message += "" if "could not store" in fault.reason else f"; and then: {error}"
        self.prepared.listener.ended(self.out if self.writer else None, self.records, self._code, message)
        return self._code

    def _store(self, writer: RunWriter, fault: Fault) -> None:
        """Store the record in progress, the fault and the end."""
        if self._current is not None:
            base = base_record(
                self._current.case, self.prepared.transport, self.world_size, self._started, fault.status, fault.reason
            )
            record = msgspec.structs.replace(self._of_this_start(base), ranks=list(fault.ranks), staged=self.staged)
            writer.append(record)
            self.records.append(record)
        writer.event("lost", start=self.start, ranks=list(fault.ranks), reason=fault.reason)
        writer.event("end", start=self.start, exit_code=int(self._code))

    def take_over(self, number: int) -> None:
        """On rank 1, after rank 0 died: open the existing run directory, if this rank can see it."""
        if not (self.out / "manifest.json").exists():
            return
        run = read_run(self.out)
        if run.events and run.events[-1].kind == "end":  # rank 0 stored the end before it died
            code = run.events[-1].exit_code
            self._ended, self._code = True, worst([Exit.ENVIRONMENT if code is None else code])
            self._end_reported.set()
            return
        self._note_header(run.manifest)
        self.writer = RunWriter(self.out)
        self.records = list(run.records)
        self.start = max((event.start for event in run.events), default=0)
        if 0 <= number < len(self.prepared.plan.cases):
            self._current = self.prepared.plan.cases[number]
