"""``python -m ncclbench``: the same program as the ``ncclbench`` command.

What measures heeds signals before it loads anything: see `ncclbench.launch.signals`.
"""

import os
import signal
import sys

# Commands that start ranks, or are one.
_MEASURING = ("run", "accept")


def main() -> None:
    """Make the process fit for ranks where the command has any, then run the command line."""
    if sys.argv[1:2] and sys.argv[1] in _MEASURING:
        from ncclbench.launch.launcher_detection import under_mpiexec
        from ncclbench.launch.rank_supervisor import supervise
        from ncclbench.launch.signals import Guard

        if under_mpiexec(os.environ):
            supervise()
        Guard(_interrupted).take()
    from ncclbench.cli import main as command_line

    command_line()


def _interrupted(number: signal.Signals) -> None:
    """A signal before any rank is watched: nothing is there to be saved. Rank 0 says so, for all."""
    from ncclbench.errors import Exit
    from ncclbench.launch.launcher_detection import own_rank
    from ncclbench.launch.signals import announce, wait_for_rank_0

    if own_rank() == "0":
        announce(number)
    else:
        wait_for_rank_0()
    os._exit(Exit.ENVIRONMENT)


if __name__ == "__main__":
    main()
