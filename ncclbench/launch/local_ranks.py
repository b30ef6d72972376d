"""Start the ranks on this host, forward signals to them, and end every rank that is left.

The parent listens on the store's port and passes the socket to rank 0, so no other process can take the port.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from ncclbench.errors import EnvironmentFault, Exit, worst
from ncclbench.launch.launcher_detection import LOCAL, LOCAL_PARENT, LOCAL_STORE, LOCAL_STORE_FD
from ncclbench.launch.signals import blocked, forwarding_signals, outcome_known
from ncclbench.store.run_writer import what_is_kept

# After a lost rank the others end by themselves, because rank 0 stores the reason first. Then they are killed.
_GRACE_SECONDS = 3.0
# After a signal: rank 0 collects reports and stores the record in progress.
_STORE_SECONDS = 8.0
KILL_SECONDS = 1.0
# From the first rank that ends well to the last: the ranks only say goodbye to the watchdog.
END_SECONDS = 60.0
_POLL_SECONDS = 0.05


def start_ranks(nproc: int, arguments: Sequence[str], out: Path) -> Exit:
    """Run ``ncclbench ARGUMENTS`` as `nproc` ranks of one job, and return the most severe of their exit codes.

    Args:
        nproc: number of ranks.
        arguments: the arguments behind the program's name.
        out: the run directory that the ranks write.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    forwarded_at: list[float] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded_at.append(time.monotonic())
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with forwarding_signals(forward):
        try:
            # A signal that arrives now is forwarded once all ranks are started; each rank unblocks signals itself.
            with blocked(), socket.create_server(("127.0.0.1", 0)) as listener:
                for rank in range(nproc):
                    ranks.append(_start(rank, nproc, arguments, listener))
            return wait_for_ranks(ranks, forwarded_at, out)
        except OSError as error:
            raise EnvironmentFault(f"could not start rank {len(ranks)}: {error}") from None
        finally:
            outcome_known.set()
            _end(ranks)


def _start(rank: int, nproc: int, arguments: Sequence[str], listener: socket.socket) -> "subprocess.Popen[bytes]":
    environ = {**os.environ, **_rank_variables(rank, nproc, listener.getsockname()[1])}
    handed_over: tuple[int, ...] = ()
    if rank == 0:
        environ[LOCAL_STORE_FD] = str(listener.fileno())
        handed_over = (listener.fileno(),)
    return subprocess.Popen(
        [sys.executable, "-m", "ncclbench", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        pass_fds=handed_over,
        start_new_session=True,  # a Ctrl-C on the terminal reaches the ranks once, through this process
    )


def _rank_variables(rank: int, nproc: int, port: int) -> Mapping[str, str]:
    variables = {
        **LOCAL.variables(rank, nproc),
        LOCAL_STORE: f"127.0.0.1:{port}",
        LOCAL_PARENT: str(os.getpid()),
    }
    # Like torchrun: one compute thread per rank by default, because all ranks share these cores.
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = "1"
    # All ranks are on this host, so the host's name need not resolve.
    if "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "lo" for _, name in socket.if_nameindex()):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables


def wait_for_ranks(ranks: "list[subprocess.Popen[bytes]]", forwarded_at: list[float], out: Path) -> Exit:
    """Wait until all ranks have ended, stop those that do not end, and report the losses that no rank reported."""
    deadline: float | None = None
    finished: float | None = None  # when the first rank had ended well
    while None in (codes := [rank.poll() for rank in ranks]):
        failed = any(code not in (None, 0) for code in codes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if 0 in codes and finished is None:
            finished = time.monotonic()
        if finished is not None and time.monotonic() > finished + END_SECONDS:
            break
        if forwarded_at and deadline is None:  # a rank inside a library may not react to the signal
            deadline = forwarded_at[0] + _STORE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    lost = unreported_losses(
        codes := [rank.poll() for rank in ranks], overdue=finished is not None and set(codes) <= {0, None}
    )
    if lost:
        names = ", ".join(f"rank {k} ({how})" for k, how in lost.items())
        print(f"ncclbench: error: lost: {names}{what_is_kept(out)}", file=sys.stderr)
    _end(ranks)
    return worst(rank.returncode for rank in ranks)


def unreported_losses(codes: Sequence[int | None], overdue: bool) -> dict[int, str]:
    """The lost ranks that no rank has reported, each with what happened to it.

    Args:
        codes: each rank's exit code; None if it has not ended.
        overdue: the other ranks ended well long ago, and the rest are still running.
    """
    killed = {k: signal.Signals(-code).name for k, code in enumerate(codes) if code is not None and code < 0}
    hanging = {k: "does not end" for k, code in enumerate(codes) if code is None}
    if overdue:
        return hanging
    reporters = {0, 1}  # rank 0 reports the other ranks, and rank 1 reports rank 0
    if reporters & killed.keys() and reporters <= killed.keys() | hanging.keys():
        return killed | hanging
    return killed if Exit.ENVIRONMENT not in codes else {}


def _end(ranks: "list[subprocess.Popen[bytes]]") -> None:
    """End all ranks, with SIGTERM first and then with SIGKILL."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
