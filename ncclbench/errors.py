"""All errors that ncclbench raises, and their exit codes.

    NcclbenchError
    ├── UsageError            2  the request is invalid; nothing was started
    │   └── TooLarge             a case does not fit into memory
    ├── Unable                -  a case cannot run here; it becomes a `skipped` record, never a failure
    └── EnvironmentFault      3  the environment failed: could not start, lost rank, timeout
        ├── TransportError       an error of another library, with the rank and the operation
        └── RankLost             one or more ranks died or stopped responding

An error message is one line: what is wrong, where, and what to do.
"""

from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes; `worst` orders them by severity, which is not the order of their numbers."""

    GOOD = 0
    FAIL = 1
    USAGE = 2
    ENVIRONMENT = 3
    WRONG_DATA = 4
    INCONCLUSIVE = 5


# The position of USAGE has no effect: a usage error ends a program before other exit codes exist.
_SEVERITY = (Exit.GOOD, Exit.INCONCLUSIVE, Exit.FAIL, Exit.ENVIRONMENT, Exit.WRONG_DATA, Exit.USAGE)


def worst(codes: Iterable[int]) -> Exit:
    """The most severe of `codes`; an unknown code, such as a signal's, counts as `ENVIRONMENT`."""
    known = {int(code) for code in _SEVERITY}
    ours = [Exit(code) if code in known else Exit.ENVIRONMENT for code in codes]
    return max(ours, key=_SEVERITY.index, default=Exit.GOOD)


class NcclbenchError(Exception):
    """Base of all errors; the user sees each as one line."""

    exit_code: Exit = Exit.ENVIRONMENT


class UsageError(NcclbenchError, ValueError):
    """The request is invalid, and nothing was started."""

    exit_code = Exit.USAGE


class TooLarge(UsageError):
    """A case does not fit into the available memory; it is refused and never reduced."""


class Unable(NcclbenchError):
    """A case cannot run here, for the given reason; it becomes a `skipped` record, not a failed one."""


class EnvironmentFault(NcclbenchError):
    """The environment failed: a library is missing, a rank did not start, a disk is full."""


class TransportError(EnvironmentFault):
    """An error of torch, MPI or NCCL, translated where the library is called."""


class RankLost(EnvironmentFault):
    """One or more ranks died or stopped responding during a run."""
