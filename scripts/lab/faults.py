"""Inject faults into a lab and heal them: ports that are slow, lose packets, delay them, or are down.

A fault is on a *cable*: a port of a switch and the device at its other end. `send` is the direction from the far end
(for example a GPU) into the switch, `receive` the other one, both as seen from the far end.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lab.kernel import Batches, in_space, route_rails, run, save, shape, token_bucket, turns
from scripts.lab.plan import Lab, LabError, bits_per_s, usage

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("rate", "loss", "delay", "down")
WHERE = ("nic", "node", "uplink", "spine", "nvlink", "site")
_RELAY = Path(__file__).with_name("relay.py")
_RELAY_SECONDS = 10.0


@dataclass(frozen=True)
class Cable:
    """A cable that can have a fault.

    Attributes:
        port: the end at the switch.
        space: the namespace of the far end.
        device: the name of the far end there.
        switch: the bridge that `port` belongs to.
        rate: in bit/s, as configured; None if it is not shaped.
        uplink: whether the far end is a spine.
    """

    port: str
    space: str
    device: str
    switch: str
    rate: float | None
    uplink: bool = False


def cables(lab: Lab, where: str, name: str) -> list[Cable]:
    """The cables that a fault concerns: those of the part `name`, which is of kind `where` (one of `WHERE`).

    Raises:
        LabError: if there is no such part.
    """
    if where in ("uplink", "spine"):
        ups = lab.uplinks_named(name) if where == "uplink" else lab.uplinks_of_spine(name)
        return [Cable(up.port, lab.spine_space(up.spine), up.far, up.leaf.name, lab.spine_rate, True) for up in ups]
    if where == "site":
        return [
            Cable(c.port, lab.spine_space(c.spine), "wan", c.switch, lab.site_rate) for c in lab.site_cables_named(name)
        ]
    if where == "nvlink":
        node = lab.node(name)
        return [
            Cable(f"{gpu.name}nv", lab.gpu_space(gpu), "nvl", f"nvs{node}", None)
            for gpu in lab.gpus()
            if gpu.node == node
        ]
    if where == "node":
        node = lab.node(name)
        nics = [nic for nic in lab.nics() if nic.gpu.node == node]
    else:
        nics = lab.nics_named(name)
    return [Cable(nic.port, lab.gpu_space(nic.gpu), nic.device, nic.leaf.name, lab.nic_rate) for nic in nics]


def inject(
    lab: Lab,
    faults: Sequence[dict[str, Any]],
    where: str,
    name: str,
    kind: str,
    value: str = "",
    ways: Sequence[str] = ("send", "receive"),
) -> list[dict[str, Any]]:
    """Add one fault to the lab; returns all active faults.

    Args:
        lab: the lab.
        faults: the active ones.
        where: one of `WHERE`.
        name: of the part, in the user's notation.
        kind: one of `KINDS`.
        value: ``50%`` or ``30mbit``, ``1%``, ``20ms``; nothing for ``down``.
        ways: the directions of a rate or a loss.

    Raises:
        LabError: if the fault is invalid, or the kernel refuses it.
    """
    found = cables(lab, where, name)
    apply = {"rate": _slow, "loss": _lose, "delay": _delay, "down": _cut}[kind]
    if kind in ("delay", "down") and len(ways) != 2:
        raise usage(f"--{kind} is for a whole cable: leave --only out")
    _check(found, kind, value)
    fault = {"where": where, "name": name, "kind": kind, "value": value, "ways": list(ways)}
    fault["ports"] = [cable.port for cable in found]
    clash = {port for other in faults if other["kind"] == kind == "delay" for port in other["ports"]}
    if clash & set(fault["ports"]):
        raise usage(f"{where} {name} is delayed already: heal first")
    # Stored before it is applied: a partly applied fault must be healed too.
    save(lab, [*faults, fault])
    for cable in found:
        apply(lab, cable, value, ways)
    now = [*faults, fault]
    if kind == "down":
        _reroute(lab, now)
    return now


def _check(found: Sequence[Cable], kind: str, value: str) -> None:
    """Refuse an invalid value before anything is applied."""
    if kind == "rate":
        if found[0].rate is None and value.strip().endswith("%"):
            what = "NVLink" if found[0].device == "nvl" else "cable between sites"
            raise usage(f"the {what} has no rate of its own: give one such as --rate 200mbit")
        bits_per_s(value, found[0].rate)
    elif kind == "loss":
        percent(value)
    elif kind == "delay":
        duration(value)


def heal(lab: Lab, faults: Sequence[dict[str, Any]]) -> None:
    """Remove all faults; every port is as configured."""
    for fault in faults:
        for cable in cables(lab, fault["where"], fault["name"]):
            _mend(lab, cable, fault["kind"])
    shape(lab)
    save(lab, [])
    if any(fault["kind"] == "down" for fault in faults):
        _reroute(lab, [])


def _slow(lab: Lab, cable: Cable, value: str, ways: Sequence[str]) -> None:
    line_rate = bits_per_s(value, cable.rate)
    ends = {"send": (cable.space, cable.device), "receive": (lab.switches, cable.port)}
    batch = Batches()
    for space, device in (ends[way] for way in ways):
        if cable.uplink:
            batch.add("tc", space, *turns(lab, device, line_rate))
        else:
            batch.add("tc", space, token_bucket(device, line_rate, lab.mtu))
    batch.carry_out()


def _lose(lab: Lab, cable: Cable, value: str, ways: Sequence[str]) -> None:
    """Drop packets independently at random, with a filter of four instructions of classic BPF.

    The kernel needs no netem, which small kernels leave out. The filter loads a random word (an ancillary load at
    -0x1000 + 56). Below the threshold it returns 2, which drops the packet, otherwise -1, which accepts it.
    """
    share = percent(value)
    threshold = min(int(share * 2**32), 2**32 - 1)
    program = f"4,32 0 0 {2**32 - 0x1000 + 56},53 1 0 {threshold},6 0 0 2,6 0 0 {2**32 - 1}"
    # Packets that enter the switch at this port were sent by the far end.
    hooks = [hook for way, hook in (("send", "ingress"), ("receive", "egress")) if way in ways]
    lines = [f"filter replace dev {cable.port} {hook} pref 1 handle 1 bpf da bytecode '{program}'" for hook in hooks]
    with contextlib.suppress(LabError):  # it exists because of another fault
        run(["tc", "-n", lab.switches, "qdisc", "add", "dev", cable.port, "clsact"])
    run(["tc", "-n", lab.switches, "-batch", "-"], lines)


def _cut(lab: Lab, cable: Cable, _value: str, _ways: Sequence[str]) -> None:
    run(["ip", "-n", lab.switches, "link", "set", cable.port, "down"])


def _delay(lab: Lab, cable: Cable, value: str, _ways: Sequence[str]) -> None:
    """Put the relay between the port and its switch: port - bridge d:PORT - tap - relay - tap - switch."""
    seconds = duration(value)
    near, far, between = _delay_names(cable)
    process = subprocess.Popen(
        ["ip", "netns", "exec", lab.switches, sys.executable, "-S", str(_RELAY), near, far, f"{seconds:g}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it outlives this command and is found by its namespace
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise LabError("the relay that delays packets did not start: it needs /dev/net/tun")
    process.stdout.close()
    lines = [
        f"link add {between} mtu {lab.mtu} type bridge mcast_snooping 0 stp_state 0",
        f"link set {between} up",
        *(f"link set {tap} mtu {lab.mtu} up" for tap in (near, far)),
        f"link set {near} master {between}",
        f"link set {far} master {cable.switch}",
        f"link set {cable.port} master {between}",
    ]
    run(["ip", "-n", lab.switches, "-batch", "-"], lines)
    process.returncode = 0  # it continues to run; Python would warn about that


def _delay_names(cable: Cable) -> tuple[str, str, str]:
    return f"{cable.port}-a", f"{cable.port}-b", f"{cable.port}-d"


def _mend(lab: Lab, cable: Cable, kind: str) -> None:
    if kind == "down":
        run(["ip", "-n", lab.switches, "link", "set", cable.port, "up"])
    elif kind == "loss":
        with contextlib.suppress(LabError):  # healed already: two faults can be on one port
            run(["tc", "-n", lab.switches, "qdisc", "del", "dev", cable.port, "clsact"])
    elif kind == "delay":
        _mend_delay(lab, cable)
    elif cable.rate is None:  # `shape` restores the rate of the others
        for space, device in ((cable.space, cable.device), (lab.switches, cable.port)):
            with contextlib.suppress(LabError):
                run(["tc", "-n", space, "qdisc", "del", "dev", device, "root"])


def _mend_delay(lab: Lab, cable: Cable) -> None:
    near, _far, between = _delay_names(cable)
    run(["ip", "-n", lab.switches, "link", "set", cable.port, "master", cable.switch])
    for process in _relays(lab, near):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + _RELAY_SECONDS
    while _relays(lab, near) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(LabError):
        run(["ip", "-n", lab.switches, "link", "del", between])


def _relays(lab: Lab, near: str) -> list[int]:
    """Process ids of the relay that holds the tap `near`."""
    found = []
    for process in run(["ip", "netns", "pids", lab.switches]).split():
        with contextlib.suppress(OSError):
            if near.encode() in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0"):
                found.append(int(process))
    return found


def _reroute(lab: Lab, faults: Sequence[dict[str, Any]]) -> None:
    """Withdraw routes over uplinks that are down, as a routing protocol does. No route uses a NIC that is down."""
    dead = {port for fault in faults if fault["kind"] == "down" for port in fault["ports"]}
    if lab.spines > 1:
        route_rails(lab, dead)


def described(where: str, name: str, kind: str, value: str, ways: Sequence[str]) -> str:
    """Text of a fault, for the user."""
    way = f" ({ways[0]} only)" if len(ways) == 1 else ""
    return f"{where} {name} {kind}{' ' + value if value else ''}{way}"


def percent(text: str) -> float:
    """``1%`` as 0.01.

    Raises:
        LabError: if it is not a percentage above 0 and at most 100.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if not found or not 0 < float(found[1]) <= 100:
        raise usage(f"a loss is like 1%, above 0% and at most 100%, and not {text!r}")
    return float(found[1]) / 100


def duration(text: str) -> float:
    """``20ms`` or ``0.02s``, in seconds.

    Raises:
        LabError: if it is not a duration above 0 and at most 5 s.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|us)", text.strip())
    seconds = float(found[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2]] if found else 0.0
    if not 0 < seconds <= 5:
        raise usage(f"a delay is like 20ms, above 0 and at most 5s, and not {text!r}")
    return seconds


def counters(lab: Lab) -> dict[str, dict[str, int]]:
    """Bytes and packets of every NIC since the lab was made, as its GPU counts them."""
    found: dict[str, dict[str, int]] = {}
    for nic in lab.nics():
        folder = f"/sys/class/net/{nic.device}/statistics"
        names = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")
        values = in_space(lab.gpu_space(nic.gpu), ["cat", *(f"{folder}/{name}" for name in names)]).split()
        found[f"n{nic.gpu.node}:r{nic.gpu.rail}" + (f":p{nic.leaf.plane}" if lab.planes > 1 else "")] = dict(
            zip(names, map(int, values), strict=True)
        )
    return found
