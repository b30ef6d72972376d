"""Recorders of prepared runs, and a listener that stores what it receives."""

from pathlib import Path
from typing import Any

from ncclbench.errors import Exit
from ncclbench.launch.listener import Listener
from ncclbench.launch.preparation import PreparedRun
from ncclbench.launch.recorder import RunRecorder
from ncclbench.launch.request import RunRequest
from ncclbench.measure.case import Measurement
from ncclbench.plan.plan import Plan, parse_plan
from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record, Status
from tests.helpers.stored import manifest, record

PLAN = parse_plan('name = "p"\n[[case]]\npattern = "all_reduce"\nbytes = ["1K", "2K"]\n', "plan")


class RememberingListener:
    """Stores what a listener receives."""

    def __init__(self) -> None:
        self.run: Path | None = None
        self.records: list[Record] = []
        self.warnings: list[str] = []
        self.code: Exit | None = None
        self.error: str | None = None

    def noted(self, text: str) -> None: ...

    def started(self, run: Path, cases: int, finished: int, world_size: int, transport: str) -> None: ...

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def began(self, number: int, case: str) -> None: ...

    def finished(self, record: Record) -> None: ...

    def ended(self, run: Path | None, records: list[Record], code: Exit, error: str | None) -> None:
        self.run, self.records, self.code, self.error = run, records, code, error

    def summed_up(self, run: Path, records: list[Record], code: Exit, error: str | None) -> None: ...


def prepared_run(
    out: Path,
    listener: Listener,
    *,
    plan: Plan = PLAN,
    transport: str = "gloo",
    start: int | None = None,
    resume: bool = False,
    one_of_several: bool = False,
) -> PreparedRun:
    request = RunRequest(resume=resume, one_of_several=one_of_several)
    return PreparedRun(request=request, plan=plan, transport=transport, out=out, listener=listener, start=start)


def planned_manifest(**fields: Any) -> Manifest:
    """The manifest of a run of `PLAN`."""
    return manifest(**{"plan": PLAN.as_record()} | fields)


def opened(path: Path, *, resume: bool = False) -> tuple[RunRecorder, RememberingListener]:
    listener = RememberingListener()
    recorder = RunRecorder(prepared_run(path, listener, resume=resume))
    recorder.open(planned_manifest())
    return recorder, listener


def measured(number: int, status: Status = "ok") -> Measurement:
    case = PLAN.cases[number].case
    return Measurement(record(nbytes=case.nbytes, case=case.id, status=status))
