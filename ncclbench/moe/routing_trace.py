"""Reader of recorded routings: JSON lines or Parquet, one row per token. ``docs/formats.md`` has the columns.

A trace has the experts that every token of every rank chose, in one or more iterations. Rows that no router could
produce are refused: an unknown expert, the same expert twice, another number of choices.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import UsageError
from ncclbench.moe.routing import Router, Routing

Ints = NDArray[np.int64]


# The range of the arrays below.
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class TraceRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token of one rank."""

    rank: Number
    token: Number
    experts: list[Number]
    iteration: Number = 0


def read_trace(path: str, router: Router, ranks: int) -> list[Routing]:
    """The routings in `path`, one per iteration.

    Args:
        path: a file that ends in ``.jsonl`` or ``.parquet``.
        router: the experts, and the number of choices per token.
        ranks: W; a rank that is not in the trace has no tokens.

    Raises:
        UsageError: naming the file and the row that is wrong.
    """
    file = Path(path)
    readers = {".jsonl": _json_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise UsageError(f"the trace {path} must end in .jsonl or .parquet")
    try:
        columns = readers[file.suffix](file)
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from None
    iteration_N, rank_N, token_N, experts_Nk = columns
    if not len(rank_N):
        raise UsageError(f"the trace {path} has no rows")
    _refuse_impossible(path, columns, router, ranks)
    found = []
    for i in range(int(iteration_N.max()) + 1):
        choices = []
        for rank in range(ranks):
            mine = np.flatnonzero((iteration_N == i) & (rank_N == rank))
            mine = mine[np.argsort(token_N[mine], kind="stable")]
            if not np.array_equal(token_N[mine], np.arange(len(mine))):
                raise UsageError(f"the trace {path}: tokens of rank {rank} in iteration {i} are not 0, 1, 2, ...")
            choices.append(experts_Nk[mine])
        if not sum(map(len, choices)):
            raise UsageError(f"the trace {path}: iteration {i} has no tokens; iterations count from 0 without gaps")
        found.append(Routing.from_choices(choices, router))
    return found


Columns = tuple[Ints, Ints, Ints, Ints]


def _refuse_impossible(path: str, columns: Columns, router: Router, ranks: int) -> None:
    iteration_N, rank_N, token_N, experts_Nk = columns

    def refuse(bad_N: NDArray[np.bool_] | np.bool_, what: str) -> None:
        if np.any(bad_N):
            k = int(np.flatnonzero(bad_N)[0])
            where = f"iteration {iteration_N[k]}, rank {rank_N[k]}, token {token_N[k]}"
            raise UsageError(f"the trace {path}: row {k + 1} ({where}) {what}")

    refuse((rank_N < 0) | (rank_N >= ranks), f"names a rank that is not in a job of {ranks}")
    refuse((iteration_N < 0) | (token_N < 0), "counts below 0")
    if experts_Nk.shape[1] != router.top_k:
        raise UsageError(f"the trace {path}: tokens have {experts_Nk.shape[1]} choices, the model {router.top_k}")
    unknown = (experts_Nk < 0) | (experts_Nk >= router.experts)
    refuse(unknown.any(axis=1), f"has an unknown expert: there are 0 to {router.experts - 1}")
    ordered = np.sort(experts_Nk, axis=1)
    refuse((ordered[:, 1:] == ordered[:, :-1]).any(axis=1), "chooses an expert twice")


def _json_rows(file: Path) -> Columns:
    rows = list(_decoded(file))
    return _columns(
        str(file),
        np.array([row.iteration for row in rows], np.int64),
        np.array([row.rank for row in rows], np.int64),
        np.array([row.token for row in rows], np.int64),
        [row.experts for row in rows],
    )


def _decoded(file: Path) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(TraceRow)
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise UsageError(f"the trace {file}: line {number}: {error}") from None


def _parquet_rows(file: Path) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except pa.ArrowException as error:
        raise UsageError(f"cannot read the trace {file}: {error}") from None
    missing = [name for name in ("rank", "token", "experts") if name not in table.column_names]
    if missing:
        raise UsageError(f"the trace {file} has no column {', '.join(missing)}; it needs rank, token and experts")
    try:
        rank_N, token_N = (_whole_numbers(table[name]) for name in ("rank", "token"))
        iteration_N = _whole_numbers(table["iteration"]) if "iteration" in table.column_names else np.zeros_like(rank_N)
        return _columns(str(file), iteration_N, rank_N, token_N, [row or [] for row in table["experts"].to_pylist()])
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise UsageError(f"the trace {file}: columns must be whole numbers, experts lists of them: {error}") from None


def _whole_numbers(column: "object") -> Ints:
    values = np.asarray(column.to_numpy())  # type: ignore[attr-defined]
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"a column of {values.dtype}")
    return values.astype(np.int64)


def _columns(path: str, iteration_N: Ints, rank_N: Ints, token_N: Ints, experts: Sequence[Sequence[int]]) -> Columns:
    lengths = {len(row) for row in experts}
    if len(lengths) > 1:
        raise UsageError(f"the trace {path}: tokens have {sorted(lengths)} choices; all must have the same number")
    width = lengths.pop() if lengths else 0
    return iteration_N, rank_N, token_N, np.array(experts, np.int64).reshape(len(experts), width)
