"""Start the ranks on this host, pass signals on, and leave none behind.

No other process can take the store's port meanwhile: the parent listens on it and passes the socket to rank 0.
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
from ncclbench.launch.signals import blocked, passing_on, settled
from ncclbench.store.run_writer import what_is_kept

# Ranks end by themselves when one is lost, since rank 0 must first write down why; after that they are ended.
_GRACE_SECONDS = 3.0
# From a signal on: rank 0 collects signs, and stores the record in progress.
_STORE_SECONDS = 8.0
_KILL_SECONDS = 1.0
# From the first rank's end, all being well, to the last one's: they have nothing left to do but to say goodbye.
_END_SECONDS = 60.0
_POLL_SECONDS = 0.05


def start_ranks(nproc: int, arguments: Sequence[str], out: Path) -> Exit:
    """Run ``ncclbench ARGUMENTS`` as `nproc` ranks of one job; returns the most severe of their exit codes.

    Args:
        nproc: how many.
        arguments: without the name of the program.
        out: the run directory that they are going to write.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    told: list[float] = []  # when a signal was passed on

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(time.monotonic())
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with passing_on(pass_on):
        try:
            # A signal meanwhile reaches all ranks, once all are there; they inherit the block, and end it themselves.
            with blocked(), socket.create_server(("127.0.0.1", 0)) as listener:
                for rank in range(nproc):
                    ranks.append(_start(rank, nproc, arguments, listener))
            return _watch(ranks, told, out)
        except OSError as error:
            raise EnvironmentFault(f"could not start rank {len(ranks)}: {error}") from None
        finally:
            settled.set()
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
        start_new_session=True,  # a Ctrl-C on the terminal reaches the ranks once, through us
    )


def _rank_variables(rank: int, nproc: int, port: int) -> Mapping[str, str]:
    variables = {
        **LOCAL.variables(rank, nproc),
        LOCAL_STORE: f"127.0.0.1:{port}",
        LOCAL_PARENT: str(os.getpid()),
    }
    # As torchrun does: one compute thread per rank by default, since all ranks share these cores.
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = "1"
    # All ranks are here, so the host's own name need not resolve to anything.
    if "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "lo" for _, name in socket.if_nameindex()):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables


def _watch(ranks: "list[subprocess.Popen[bytes]]", told: list[float], out: Path) -> Exit:
    deadline: float | None = None
    finished: float | None = None  # when the first had come to its end
    while None in (codes := [rank.poll() for rank in ranks]):
        failed = any(code not in (None, 0) for code in codes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if 0 in codes and finished is None:
            finished = time.monotonic()
        if finished is not None and time.monotonic() > finished + _END_SECONDS:
            break
        if told and deadline is None:  # they end by themselves; one inside a library that heeds nothing does not
            deadline = told[0] + _STORE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    lost = _unsaid(codes := [rank.poll() for rank in ranks], overdue=finished is not None and set(codes) <= {0, None})
    if lost:
        names = ", ".join(f"rank {k} ({how})" for k, how in lost.items())
        print(f"ncclbench: error: lost: {names}{what_is_kept(out)}", file=sys.stderr)
    _end(ranks)
    return worst(rank.returncode for rank in ranks)


def _unsaid(codes: Sequence[int | None], overdue: bool) -> dict[int, str]:
    """The ranks that are gone, and how, if no rank is there that has said so.

    Args:
        codes: what each rank has ended in; None if it has not.
        overdue: all others have come to their end, and those that have not were waited for.
    """
    killed = {k: signal.Signals(-code).name for k, code in enumerate(codes) if code is not None and code < 0}
    hanging = {k: "does not end" for k, code in enumerate(codes) if code is None}
    if overdue:
        return hanging
    speakers = {0, 1}  # rank 0 says what has become of the others, and rank 1 what has become of rank 0
    if speakers & killed.keys() and speakers <= killed.keys() | hanging.keys():
        return killed | hanging
    return killed if Exit.ENVIRONMENT not in codes else {}


def _end(ranks: "list[subprocess.Popen[bytes]]") -> None:
    """No rank outlives us: first asked, then killed."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _KILL_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
