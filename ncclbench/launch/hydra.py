"""MPICH's process manager, told to end a job whose ranks have not met.

torchrun and Open MPI end a job with the first rank that ends in an error. Hydra does not where that rank ends before
MPI_Init: the others wait for it there, for ever. Its proxy on each node understands PMI-1, in which MPI_Abort itself
says that a job is over and what it ends in, on a descriptor that every rank is handed. MPI_Abort cannot be called for
that: it needs MPI_Init, which waits for all ranks.
"""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

# mpiexec passes on what ranks print, but not what it has not read when it ends the job.
_DRAIN_SECONDS = 1.0


def descriptor(environ: Mapping[str, str]) -> int | None:
    """Where Hydra listens to this rank; None where another launcher has started it, or MPI has the descriptor now."""
    text = environ.get("PMI_FD", "")
    ours = "MPI_LOCALRANKID" in environ and "LOCAL_WORLD_SIZE" not in environ and "mpi4py.MPI" not in sys.modules
    return int(text) if ours and text.isdecimal() else None


def end_job(code: int, environ: Mapping[str, str] = os.environ) -> None:
    """End the job with `code` for all its ranks, after what this one has said; nothing where Hydra does not listen."""
    connection = descriptor(environ)
    if connection is None or not code:
        return
    time.sleep(_DRAIN_SECONDS)
    with suppress(OSError):
        os.write(connection, f"cmd=init pmi_version=1 pmi_subversion=1\ncmd=abort exitcode={int(code)}\n".encode())
