"""Every error the product raises, and the exit code each one ends in.

    NcclbenchError
    ├── UsageError            2  what was asked for makes no sense; nothing was started
    │   └── TooLarge             it does not fit into memory
    ├── Unable                -  a case cannot run here; it becomes a `skipped` record, never a failure
    └── EnvironmentFault      3  the surroundings failed: could not start, lost rank, timeout
        ├── TransportError       a foreign library's error, translated once, with the rank and the operation
        └── RankLost             one or more ranks died or went silent

An error message is one line: what was wrong, where, and what to do.
"""

from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes. `worst` orders them: their numbers are not their severity."""

    GOOD = 0
    FAIL = 1
    USAGE = 2
    ENVIRONMENT = 3
    WRONG_DATA = 4
    INCONCLUSIVE = 5


# 2 stands apart: a usage error ends a program before there is anything to compare it with.
_SEVERITY = (Exit.GOOD, Exit.INCONCLUSIVE, Exit.FAIL, Exit.ENVIRONMENT, Exit.WRONG_DATA, Exit.USAGE)


def worst(codes: Iterable[int]) -> Exit:
    """The most severe of `codes`; a code that is none of ours (a signal, say) counts as `ENVIRONMENT`."""
    known = {int(code) for code in _SEVERITY}
    ours = [Exit(code) if code in known else Exit.ENVIRONMENT for code in codes]
    return max(ours, key=_SEVERITY.index, default=Exit.GOOD)


class NcclbenchError(Exception):
    """Base of all errors that a user is shown as one line."""

    exit_code: Exit = Exit.ENVIRONMENT


class UsageError(NcclbenchError, ValueError):
    """What was asked for makes no sense, and nothing was started."""

    exit_code = Exit.USAGE


class TooLarge(UsageError):
    """A case does not fit into the memory that is there; it is refused, never made smaller."""


class Unable(NcclbenchError):
    """A case cannot run here, for the reason given. Unable is not failed: it becomes a `skipped` record."""


class EnvironmentFault(NcclbenchError):
    """The surroundings failed: a library is missing, a rank did not start, a disk is full."""


class TransportError(EnvironmentFault):
    """An error of torch, MPI or NCCL, translated at the seam."""


class RankLost(EnvironmentFault):
    """One or more ranks died or went silent in the middle of a run."""
