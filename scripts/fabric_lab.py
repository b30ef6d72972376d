#!/usr/bin/env python3
"""A rail-optimized fabric with real TCP packets, in network namespaces of this machine. See docs/lab.md.

    sudo scripts/fabric_lab.py up --nodes 3 --rails 2 --nic-rate 100mbit --spine-rate 100mbit
    sudo scripts/fabric_lab.py topology > lab.toml
    sudo scripts/fabric_lab.py exec -- .venv/bin/python -m ncclbench run send_recv -b 1M -e 1M --transport gloo
    sudo scripts/fabric_lab.py fault --nic n1:r0 --rate 50%
    sudo scripts/fabric_lab.py heal
    sudo scripts/fabric_lab.py down

Exit codes: 0 good, 2 usage error, 3 environment (no root, no iproute2). `exec` ends with the most severe code of its
ranks.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a script, Python searches its folder and not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from scripts.lab import execute, faults, kernel
from scripts.lab.plan import Lab, LabError, bits_per_s, usage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute one command; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        if (reason := kernel.unable()) is not None:
            raise LabError(reason)
        signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: a partly made lab is removed
        return int(given.carry_out(given) or 0)
    except LabError as error:
        print(f"fabric_lab: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("fabric_lab: interrupted", file=sys.stderr)
        return 3


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _up(given: argparse.Namespace) -> None:
    nic_rate = bits_per_s(given.nic_rate)
    lab = Lab(
        prefix=given.prefix,
        nodes=given.nodes,
        rails=given.rails,
        planes=given.planes,
        sites=given.sites,
        spines=given.spines,
        nic_rate=nic_rate,
        # By default the spine carries all NICs of a leaf at the same time.
        spine_rate=bits_per_s(given.spine_rate) if given.spine_rate else nic_rate * given.nodes,
        site_rate=bits_per_s(given.site_rate) if given.site_rate else None,
        mtu=given.mtu,
    )
    kernel.make(lab)
    print(f"lab {lab.prefix}: {lab.nodes} nodes x {lab.rails} rails, NICs {_rate(nic_rate)}, {_spines(lab)}")


def _spines(lab: Lab) -> str:
    number = lab.sites * lab.spines
    return f"{number} spine{'s' if number > 1 else ''} with ports of {_rate(lab.spine_rate)}"


def _rate(bits: float) -> str:
    return f"{bits / 1e6:g} Mbit/s"


def _fault(given: argparse.Namespace) -> None:
    lab, on = kernel.load(given.prefix)
    where = next(name for name in faults.WHERE if getattr(given, name) is not None)
    kind = next(name for name in faults.KINDS if getattr(given, name))
    value = "" if kind == "down" else getattr(given, kind)
    ways = [given.only] if given.only else ["send", "receive"]
    faults.inject(lab, on, where, getattr(given, where), kind, value, ways)
    print(f"fault: {faults.described(where, getattr(given, where), kind, value, ways)}; `heal` removes it")


def _heal(given: argparse.Namespace) -> None:
    lab, on = kernel.load(given.prefix)
    faults.heal(lab, on)
    print(f"healed: {len(on)} fault{'' if len(on) == 1 else 's'}")


def _exec(given: argparse.Namespace) -> int:
    lab, _ = kernel.load(given.prefix)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        raise usage("nothing to run: exec -- COMMAND")
    if given.on and given.mpi:
        raise usage("--on runs one process, --mpi all of them: leave one out")
    if given.on:
        return execute.run_one(lab, lab.gpu(given.on), command)
    if not 0 <= given.plane < lab.planes:
        raise usage(f"--plane is 0 to {lab.planes - 1} in this lab, got {given.plane}")
    return (
        execute.run_mpi(lab, command, given.port)
        if given.mpi
        else execute.run_ranks(lab, command, given.port, given.plane)
    )


def _status(given: argparse.Namespace) -> None:
    lab, on = kernel.load(given.prefix)
    state: dict[str, Any] = {
        "lab": json.loads(lab.as_json()),
        "faults": on,
        "namespaces": kernel.spaces_of(lab.prefix),
        "processes": sorted(kernel.processes_of(lab.prefix)),
        "counters": faults.counters(lab),
    }
    if given.json:
        print(json.dumps(state))
        return
    print(f"lab {lab.prefix}: {lab.nodes} nodes x {lab.rails} rails x {lab.planes} planes, {lab.sites} sites")
    print(f"NICs {_rate(lab.nic_rate)}, {_spines(lab)}, MTU {lab.mtu}")
    print(f"{len(state['namespaces'])} namespaces, {len(state['processes'])} processes")
    for fault in on:
        print("fault:", faults.described(*(fault[key] for key in ("where", "name", "kind", "value", "ways"))))
    for name, values in state["counters"].items():
        print(f"  {name:8} sent {values['tx_bytes']:>13,} B  received {values['rx_bytes']:>13,} B")


def _topology(given: argparse.Namespace) -> None:
    print(kernel.load(given.prefix)[0].topology(), end="")


def _down(given: argparse.Namespace) -> None:
    removed = kernel.remove(given.prefix)
    print(f"removed: {len(removed)} namespaces of {given.prefix}" if removed else f"no lab {given.prefix} was up")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabric_lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", default="ncclab", help="prefix of its namespaces' names (default: ncclab)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _up_parser(commands.add_parser("up", help="make a lab"))
    _fault_parser(commands.add_parser("fault", help="inject a fault; faults add up until `heal`"))
    _exec_parser(commands.add_parser("exec", help="run a command in every namespace, as the ranks of one job"))
    status = commands.add_parser("status", help="show the lab, its faults, and the bytes of each NIC")
    status.add_argument("--json", action="store_true")
    status.set_defaults(carry_out=_status)
    for name, carry_out, words in (
        ("heal", _heal, "remove all faults"),
        ("topology", _topology, "print the topology file of this lab (TOML)"),
        ("down", _down, "end all processes in the lab and remove it"),
    ):
        commands.add_parser(name, help=words).set_defaults(carry_out=carry_out)
    return parser


def _up_parser(parser: argparse.ArgumentParser) -> None:
    for name, default, words in (
        ("nodes", 3, "hosts, each an NVLink domain"),
        ("rails", 2, "GPUs and NICs per node"),
        ("planes", 1, "ports per NIC, each with its own leaf"),
        ("sites", 1, "data centers; each has a block of consecutive nodes"),
        ("spines", 1, "spines per site; ECMP distributes flows over them"),
        ("mtu", 9000, "IP bytes per packet"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: {default})")
    parser.add_argument("--nic-rate", default="100mbit", help="rate of each NIC, each way (default: 100mbit)")
    parser.add_argument("--spine-rate", help="rate of each port between leaf and spine (default: nodes x NIC rate)")
    parser.add_argument("--site-rate", help="rate of each spine's cable to other sites (default: not shaped)")
    parser.set_defaults(carry_out=_up)


def _fault_parser(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    for name, metavar, words in (
        ("nic", "n1:r0[:p0]", "one NIC, or one plane of it"),
        ("node", "n1", "all NICs of a node"),
        ("uplink", "leaf0[:spine0]", "the cables from a leaf to its spines"),
        ("spine", "spine0", "all ports of a spine"),
        ("nvlink", "n1", "the NVLink of a node"),
        ("site", "a[:spine0]", "the cables from a site to the others"),
    ):
        where.add_argument(f"--{name}", metavar=metavar, help=words)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--rate", metavar="50%|30mbit", help="limit the rate")
    kind.add_argument("--loss", metavar="1%", help="drop packets at random")
    kind.add_argument("--delay", metavar="20ms", help="delay packets, each way")
    kind.add_argument("--down", action="store_true", help="take the link down")
    parser.add_argument(
        "--only", choices=("send", "receive"), help="one direction of --rate or --loss, as seen from the NIC"
    )
    parser.set_defaults(carry_out=_fault)


def _exec_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on", metavar="n1:r0", help="run in this namespace only, without rank variables")
    parser.add_argument("--mpi", action="store_true", help="run under mpiexec (Open MPI or MPICH)")
    parser.add_argument("--plane", type=int, default=0, help="plane that gloo uses (default: 0); MPI uses all")
    parser.add_argument("--port", type=int, default=29500, help="port of the rendezvous (default: 29500)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    parser.set_defaults(carry_out=_exec)


if __name__ == "__main__":
    sys.exit(main())
