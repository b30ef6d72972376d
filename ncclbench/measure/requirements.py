"""What a case needs of the way its process was started: settings that NCCL reads once and keeps.

A case whose process was started otherwise is skipped, and the reason is the command that starts it right: measuring
it anyway would give a figure for a path that was not taken.
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from ncclbench.errors import Unable
from ncclbench.schedule.case import Case, Needs
from ncclbench.store.records import Record
from ncclbench.transports.base import Transport, all_gather_text
from ncclbench.transports.capabilities import Capabilities

# How the reason begins, wherever it stands: such a case is not finished for another start.
WRONG_START = "NCCL reads its settings once"
# What NCCL does where a variable is not set; source: its documentation of environment variables.
_UNSET_MEANS = {"NCCL_PXN_DISABLE": "0", "NCCL_P2P_PXN_LEVEL": "2", "NCCL_CROSS_NIC": "2"}


def check_needs(
    needs: Needs | None,
    case: Case,
    transport: Transport,
    environ: Mapping[str, str] = os.environ,
    command: Sequence[str] = (),
) -> None:
    """Nothing, if every rank was started as the case's pattern needs it; all ranks call it.

    Raises:
        Unable: on every rank, with the reason of the first that was not.
    """
    if needs is None:
        return
    mine = why_not(case, needs, transport.capabilities, environ, command)
    for rank, reason in enumerate(all_gather_text(transport.control, mine)):
        if reason:
            raise Unable(reason if rank == 0 else f"rank {rank}: {reason}")


def why_not(
    case: Case, needs: Needs, transport: Capabilities, environ: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """Why a process cannot measure the case; "" if it can, as without NICs, where no path is taken at all."""
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
    """Whether a case was skipped because of the way its process was started: another start may measure it."""
    return record.status == "skipped" and WRONG_START in (record.reason or "")


def _command(case: Case, arguments: Sequence[str]) -> str:
    """This command, for a run directory of its own."""
    kept: list[str] = []
    drop = False
    for word in arguments:
        if not drop and word not in ("-o", "--out", "--resume"):
            kept.append(word)
        drop = word in ("-o", "--out")
    return shlex.join(["ncclbench", *(kept or ["run", case.pattern])])
