"""``python -m ncclbench``: the same program as the ``ncclbench`` command.

Commands that measure handle signals before they load anything: see `ncclbench.launch.signals`.
"""

import os
import signal
import sys

# Commands that start ranks or run as a rank.
_MEASURING = ("run", "accept")


def main() -> None:
    """Set up signals and, under mpiexec, the supervisor for commands that measure; then run the command line."""
    if sys.argv[1:2] and sys.argv[1] in _MEASURING:
        from ncclbench.launch.launcher_detection import under_mpiexec
        from ncclbench.launch.rank_supervisor import supervise
        from ncclbench.launch.signals import SignalThread

        if under_mpiexec(os.environ):
            supervise()
        SignalThread(_interrupted).install()
    from ncclbench.cli import main as command_line

    command_line()


def _interrupted(number: signal.Signals) -> None:
    """End the process; no watchdog runs yet, so there is nothing to save. Only rank 0 reports the signal."""
    from ncclbench.errors import Exit
    from ncclbench.launch.launcher_detection import own_rank
    from ncclbench.launch.signals import report_interruption, wait_for_rank_0

    if own_rank() == "0":
        report_interruption(number)
    else:
        wait_for_rank_0()
    os._exit(Exit.ENVIRONMENT)


if __name__ == "__main__":
    main()
