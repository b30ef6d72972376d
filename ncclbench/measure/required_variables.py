"""The variables that a case needs at process start, since NCCL reads its settings once.

If the process has other values, the case is skipped, and the reason names the right command. A measurement would give
a figure for a path that the data did not take.
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from ncclbench.errors import Unable
from ncclbench.schedule.case import Case, Needs
from ncclbench.store.records import Record
from ncclbench.transports.base import Transport, all_gather_text
from ncclbench.transports.capabilities import Capabilities

# The begin of the reason. A case that was skipped for it is not finished: another process start may measure it.
WRONG_START = "NCCL reads its settings once"
# NCCL's defaults for variables that are not set; source: its documentation of environment variables.
_UNSET_MEANS = {"NCCL_PXN_DISABLE": "0", "NCCL_P2P_PXN_LEVEL": "2", "NCCL_CROSS_NIC": "2"}


def check_needs(
    needs: Needs | None,
    case: Case,
    transport: Transport,
    environ: Mapping[str, str] = os.environ,
    command: Sequence[str] = (),
) -> None:
    """Refuse the case unless every rank has the variables that the pattern needs; all ranks call it.

    Raises:
        Unable: on every rank, with the reason of the first rank that has other variables.
    """
    if needs is None:
        return
    reason_here = why_not(case, needs, transport.capabilities, environ, command)
    for rank, reason in enumerate(all_gather_text(transport.control, reason_here)):
        if reason:
            raise Unable(reason if rank == 0 else f"rank {rank}: {reason}")


def why_not(
    case: Case, needs: Needs, transport: Capabilities, environ: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """Why a process cannot measure the case; "" if it can. Without NICs there is no path, so it always can."""
    if not transport.uses_nics:
        return ""
    if not transport.reads_nccl_settings:
        what, name = needs.only_nccl, transport.name
        return f"{case.pattern}: {what} is a path that only NCCL takes; {name} always goes straight" if what else ""
    wrong = {
        name: value for name, value in needs.variables.items() if environ.get(name, _UNSET_MEANS.get(name)) != value
    }
    if not wrong:
        return ""
    found = ", ".join(f"{name} is {environ.get(name, 'not set')}" for name in wrong)
    settings = " ".join(f"{name}={value}" for name, value in needs.variables.items())
    shown = _command(case, arguments)
    return f"{WRONG_START}, as a process starts, and {found}; start again with: {settings} {shown}"


def wrongly_started(record: Record) -> bool:
    """Whether a case was skipped for the variables of its process; another start may measure it."""
    return record.status == "skipped" and WRONG_START in (record.reason or "")


def _command(case: Case, arguments: Sequence[str]) -> str:
    """The user's command without its run directory, so that it starts another run."""
    kept: list[str] = []
    drop = False
    for word in arguments:
        if not drop and word not in ("-o", "--out", "--resume"):
            kept.append(word)
        drop = word in ("-o", "--out")
    return shlex.join(["ncclbench", *(kept or ["run", case.pattern])])
