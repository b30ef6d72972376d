"""Raw samples as Parquet: rank int32, iteration int32, phase dictionary<string>, seconds float64.

Samples are read lazily: one case and one phase at a time, and only the needed columns. 16 million samples are 20 files
of 0.8 million rows. Each file becomes one array of ranks by iterations, which is freed before the next file is read.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import NcclbenchError, UsageError
from ncclbench.store.files import is_regular, sync_folder
from ncclbench.store.records import Record
from ncclbench.store.run_directory import Run

if TYPE_CHECKING:  # importing it takes a tenth of a second
    import pyarrow as pa

Floats = NDArray[np.float64]
N = TypeVar("N", np.int32, np.float64)


def is_whole(path: Path) -> bool:
    """Whether a samples file exists and ends with Parquet's last four bytes; `verify` checks the content."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read() == b"PAR1"
    except OSError:
        return False


class UnreadableSamples(UsageError):
    """A samples file is no Parquet file, or lacks a column; the message has the reason without the file's name."""


def phase_columns(path: Path, phase: str) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats] | None:
    """Rank, iteration and seconds of each sample of a phase, in the order of the file; None without that phase.

    Raises:
        UsageError: if it is no regular file.
        EnvironmentFault: if its state cannot be read.
        UnreadableSamples: if it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_regular(path)
    try:
        # Without memory mapping, pre-buffering and threads, so that the peak memory is that of one case.
        with pq.ParquetFile(path) as file:
            table = file.read(columns=["rank", "iteration", "phase", "seconds"], use_threads=False)
        labels = table.column("phase").combine_chunks().dictionary_encode()
        names = labels.dictionary.to_pylist()
        if phase not in names:
            return None
        chosen = _values(labels.indices, np.int32) == names.index(phase)
        rank_N = _values(table.column("rank").combine_chunks().cast(pa.int32()), np.int32)[chosen]
        iteration_N = _values(table.column("iteration").combine_chunks().cast(pa.int32()), np.int32)[chosen]
        seconds_N = _values(table.column("seconds").combine_chunks().cast(pa.float64()), np.float64)[chosen]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise UnreadableSamples(str(error).splitlines()[0]) from None
    return rank_N, iteration_N, seconds_N


def _values(array: "pa.Array[pa.Scalar[pa.DataType]]", kind: type[N]) -> NDArray[N]:
    """The numbers of an Arrow array without a copy, -1 for null; `Array.to_numpy` would import pandas."""
    there, data = array.buffers()
    values = np.frombuffer(memoryview(data) if data else b"", kind)[array.offset : array.offset + len(array)]
    if there is None or not array.null_count:
        return values
    bits = np.unpackbits(np.frombuffer(memoryview(there), np.uint8), bitorder="little")
    return np.where(bits[array.offset : array.offset + len(array)], values, kind(-1))


def seconds_of_ranks(run: Run, record: Record, phase: str = "total") -> Floats | None:
    """Durations of one phase, shape (R, N), in seconds; NaN if a rank lacks an iteration.

    None if the record has no samples, or none of that phase.

    Raises:
        UsageError: if the file is missing, outside the run directory, or damaged; the message names it.
    """
    if record.samples is None:
        return None
    path = samples_file(run, record.samples)
    try:
        columns = phase_columns(path, phase)
    except UnreadableSamples as error:
        raise UsageError(f"samples of {record.case}: cannot read {path}: {error}") from None
    except NcclbenchError as error:  # as for a damaged file, so that the rest of the run can be shown
        raise UsageError(f"samples of {record.case}: {error}") from None
    return None if columns is None else _as_grid(*columns, record, path)


def _as_grid(
    rank_N: NDArray[np.int32], iteration_N: NDArray[np.int32], seconds_N: Floats, record: Record, path: Path
) -> Floats:
    if not len(rank_N):
        raise UsageError(f"samples of {record.case}: {path} is empty")
    ranks, iterations = int(rank_N.max()) + 1, int(iteration_N.max()) + 1
    too_many = record.world_size is not None and ranks > record.world_size  # a log may lack the number of ranks
    if rank_N.min() < 0 or iteration_N.min() < 0 or too_many:
        raise UsageError(f"samples of {record.case}: {path} names a rank or iteration that there cannot be")
    # An iteration index beyond the number of rows is refused, so that the grid has at most ranks times rows.
    if iterations > len(rank_N):
        raise UsageError(f"samples of {record.case}: {path} has an iteration {iterations - 1} in {len(rank_N)} rows")
    grid = np.full((ranks, iterations), np.nan)
    grid[rank_N, iteration_N] = seconds_N
    return grid


def samples_file(run: Run, name: str) -> Path:
    """The path of the samples file `name` of the run.

    Raises:
        UsageError: if it lies outside the run directory.
    """
    path = run.path / name
    if not path.resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{run.path}: a record names samples outside the run directory: {name}")
    return path


def write_samples(
    path: Path, labels: list[str], seconds_RNK: NDArray[np.float64], ranks_R: NDArray[np.int32] | None = None
) -> None:
    """Write raw samples as Parquet; NaN is left out.

    Args:
        path: path of the file.
        labels: the phase of each column.
        seconds_RNK: durations, shape (R, N, columns).
        ranks_R: the rank of each row; 0 to R - 1 if None. -1 is stored as null: a log may not state the rank.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ranks, samples, columns = seconds_RNK.shape
    ends = np.cumsum([0, *(len(label.encode()) for label in labels)], dtype=np.int32)
    names = pa.Array.from_buffers(
        pa.string(), len(labels), [None, pa.py_buffer(ends.data), pa.py_buffer("".join(labels).encode())]
    )
    phase = np.tile(np.arange(columns, dtype=np.int32), ranks * samples)
    known = np.arange(ranks, dtype=np.int32) if ranks_R is None else ranks_R
    rank = np.repeat(known, samples * columns)
    iteration = np.tile(np.repeat(np.arange(samples, dtype=np.int32), columns), ranks)
    seconds = np.ascontiguousarray(seconds_RNK).ravel()
    there = ~np.isnan(seconds)  # an iteration may lack a phase
    table = pa.table(
        {
            "rank": _int32(rank[there]),
            "iteration": _int32(iteration[there]),
            "phase": pa.DictionaryArray.from_arrays(_int32(phase[there]), names),
            "seconds": _float64(seconds[there]),
        }
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file is useless, and the event log may need its space
        raise
    sync_folder(path.parent)


def _int32(values: NDArray[np.int32]) -> "pa.Array[pa.Scalar[pa.lib.Int32Type]]":
    """An Arrow array without a copy, in which -1 is null; `pyarrow.array` would import pandas."""
    import pyarrow as pa

    there = None if (values >= 0).all() else pa.py_buffer(np.packbits(values >= 0, bitorder="little").data)
    return pa.Int32Array.from_buffers(pa.int32(), len(values), [there, pa.py_buffer(values.data)])


def _float64(values: Floats) -> "pa.Array[pa.Scalar[pa.lib.Float64Type]]":
    import pyarrow as pa

    return pa.DoubleArray.from_buffers(pa.float64(), len(values), [None, pa.py_buffer(values.data)])
