"""NCCL's own lines in the log of another tool: removed from its rows, and read for the path of the data."""

from collections.abc import Collection

from ncclbench.importers.common.log_file import DamageError, Log
from ncclbench.store.records import PathRecord
from ncclbench.transports.cuda.nccl_log import parse_nccl_log


def nccl_path(log: Log) -> PathRecord | None:
    """The path that NCCL's lines state, in the form of a record's `path`; None if there are none."""
    return parse_nccl_log(line.text for line in log.lines if "NCCL " in line.text)


def without_nccl(text: str, hosts: Collection[str], row: int | None) -> str:
    """The part of a line before ``host:pid:tid [device] NCCL ...``; the whole line if it has none.

    NCCL writes to the same stream, so its line may begin in the middle of a row, with no blank between:
    ``float     sum      -1node0:1612:1700 [0] NCCL INFO ...``. Only a host name that the log gives tells where the
    row ends; a guess could turn a 1 into an 11.

    Args:
        text: a line with `` NCCL `` in it.
        hosts: the names of hosts that the log gives.
        row: the line's number if it may be a row's; None if it cannot.

    Raises:
        DamageError: if a row and NCCL's line cannot be separated.
    """
    before = text[: text.index(" NCCL ")]
    place = next((cell for cell in reversed(before.split()) if _is_process(cell)), None)
    if place is None:
        return text
    start = before.rindex(place)
    name = place.rsplit(":", 2)[0]
    host = max((host for host in hosts if name.endswith(host)), key=len, default=None)
    if host is not None:
        return text[: start + len(name) - len(host)]
    head = text[:start]
    like_a_row = row is not None and head.lstrip()[:1].isdecimal()
    if like_a_row and (place[0] in "-0123456789" or place.startswith("N/A")):
        raise DamageError(row or 1, "NCCL's log begins in the middle of this row, and cannot be separated from it")
    return head


def _is_process(cell: str) -> bool:
    """``host:pid:tid``."""
    parts = cell.rsplit(":", 2)
    return len(parts) == 3 and bool(parts[0]) and parts[1].isdecimal() and parts[2].isdecimal()
