"""Make a lab's namespaces, cables, bridges and routes, and remove every trace of them.

The kernel itself is the state: namespaces whose names begin with the lab's prefix, and the processes in them. Beside
them there is one folder under /run with what was asked for and which faults are on. So `remove` works also after
whoever made the lab was killed half way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lab.plan import CONTROL_NET, HEAD_ADDRESS, Lab, LabError, Leaf, Nic, wan_cable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

_STATE = Path("/run/ncclbench-lab")
_SPACES = Path("/run/netns")
# A port's queue holds whole messages: the fabrics that are played lose nothing by themselves.
_QUEUE_BYTES = 1 << 23
_TERM_SECONDS, _KILL_SECONDS = 3.0, 5.0

# In every namespace. One congestion control everywhere, since the machine's own default may be any. Windows that stay
# open between messages, and nothing remembered of a peer, so that a fault that is healed leaves no trace. Buffers that
# hold whole messages, so that the kernel moves them while the ranks wait for a core: there are more ranks than cores.
# Retransmissions at least every second (since Linux 6.15), so that connections go on soon after a link is back. And no
# IPv6, whose own messages would be counted.
_SYSCTLS = {
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv4/tcp_congestion_control": "cubic",
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv4/tcp_no_metrics_save": "1",
    "ipv4/tcp_rmem": "4096 4194304 8388608",
    "ipv4/tcp_wmem": "4096 4194304 8388608",
    "ipv4/tcp_rto_max_ms": "1000",
    "ipv4/fib_multipath_hash_policy": "1",
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
}


def unable() -> str | None:
    """Why there can be no lab on this machine, or None if there can."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"the fabric lab needs {' and '.join(missing)}: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "the fabric lab makes network namespaces, which needs root: start it with sudo"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"the fabric lab may not make namespaces here ({probe.stderr.strip()}): it needs CAP_SYS_ADMIN"
    return None


def run(arguments: Sequence[str], lines: Iterable[str] | None = None) -> str:
    """Run a command, with `lines` as its input; returns what it printed.

    Raises:
        LabError: with the first line of what it complained about.
    """
    text = None if lines is None else "\n".join(lines) + "\n"
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
        raise LabError(f"{' '.join(arguments[:8])}: {'; '.join(said[:2])}")
    return done.stdout


def in_space(space: str, arguments: Sequence[str], lines: Iterable[str] | None = None) -> str:
    """`run` inside a namespace, where /sys shows its own devices."""
    return run(["ip", "netns", "exec", space, *arguments], lines)


class Batches:
    """Lines for ``ip -batch`` and ``tc -batch``, collected by namespace and carried out together."""

    def __init__(self) -> None:
        """Nothing is collected yet."""
        self._lines: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, tool: str, space: str, *lines: str) -> None:
        """Collect `lines` of `tool` (``ip`` or ``tc``) for a namespace."""
        self._lines[tool, space] += lines

    def carry_out(self) -> None:
        """All of it, and forget it."""
        collected, self._lines = self._lines, defaultdict(list)
        for (tool, space), lines in collected.items():
            run([tool, "-n", space, "-batch", "-"], lines)


# Making it.


def make(lab: Lab) -> None:
    """Make the lab; if anything fails, or Ctrl-C comes, nothing of it is left.

    Raises:
        LabError: if it is there already, or the kernel refuses something.
    """
    if spaces_of(lab.prefix) or state_folder(lab.prefix).exists():
        raise LabError(f"a lab {lab.prefix!r} is there already: take it down first, or give another --prefix")
    try:
        state_folder(lab.prefix).mkdir(parents=True)
        save(lab, [])
        _make_spaces(lab)
        _make_cables(lab)
        _configure_gpus(lab)
        _configure_spines(lab)
        _add_turns(lab)
        shape(lab)
    except BaseException:
        remove(lab.prefix)
        raise


def _make_spaces(lab: Lab) -> None:
    for space in lab.spaces():
        run(["ip", "netns", "add", space])
        settings = dict(_SYSCTLS)
        if space == lab.wan or "-spine" in space:
            settings["ipv4/ip_forward"] = "1"
        # A kernel without IPv6 lacks those; the loop goes on.
        script = [f"echo {value} 2>/dev/null >/proc/sys/net/{name}" for name, value in settings.items()]
        in_space(space, ["sh"], [*script, "ip link set lo up"])


def _make_cables(lab: Lab) -> None:
    """All bridges, and all cables; one end of a cable is among the switches, or routes between the sites."""
    batch, far_ends = Batches(), Batches()  # a cable is there before its far end is set up
    switches = [leaf.name for leaf in lab.leaves()] + [f"nvs{node}" for node in range(lab.nodes)] + ["control"]
    switches += [cable.switch for cable in lab.site_cables()]
    for name in switches:
        batch.add("ip", lab.switches, f"link add {name} mtu {lab.mtu} type bridge mcast_snooping 0 stp_state 0")
        batch.add("ip", lab.switches, f"link set {name} up")
    for port, space, device, switch in _cables(lab):
        _cable(lab, batch, far_ends, lab.switches, port, space, device)
        batch.add("ip", lab.switches, f"link set {port} master {switch}")
    batch.carry_out()
    far_ends.carry_out()


def _cables(lab: Lab) -> Iterator[tuple[str, str, str, str]]:
    """Every cable that ends at a switch: its port there, the far end's namespace and device, and the switch."""
    for nic in lab.nics():
        yield nic.port, lab.gpu_space(nic.gpu), nic.device, nic.leaf.name
    for gpu in lab.gpus():
        yield f"{gpu.name}nv", lab.gpu_space(gpu), "nvl", f"nvs{gpu.node}"
        yield f"{gpu.name}ctl", lab.gpu_space(gpu), "ctl", "control"
    yield "head", lab.head, "ctl", "control"
    for up in lab.uplinks():
        yield up.port, lab.spine_space(up.spine), up.far, up.leaf.name
    for site in lab.site_cables():
        yield site.port, lab.spine_space(site.spine), "wan", site.switch
        yield f"{site.port}w", lab.wan, site.port, site.switch


def _cable(lab: Lab, batch: Batches, far_ends: Batches, near: str, port: str, far: str, device: str) -> None:
    """A pair of veth devices. gso_max_segs 1: what is counted, shaped and dropped are packets as a wire has them."""
    size = f"mtu {lab.mtu} gso_max_segs 1"
    batch.add("ip", near, f"link add {port} {size} type veth peer name {device} netns {far}")
    batch.add("ip", near, f"link set {port} up")
    far_ends.add("ip", far, f"link set {device} {size} up")


def _configure_gpus(lab: Lab) -> None:
    batch = Batches()
    nics = lab.nics()
    for gpu in lab.gpus():
        space = lab.gpu_space(gpu)
        batch.add("ip", space, f"address add {gpu.control_address}/17 dev ctl", "route add default dev ctl")
        own = {nic.leaf.plane: nic for nic in nics if nic.gpu == gpu}
        for nic in own.values():
            batch.add("ip", space, f"address add {nic.address}/24 dev {nic.device}")
        for nic in nics:
            if nic.gpu.node == gpu.node and nic.gpu != gpu:  # same node: over its NVLink switch
                batch.add("ip", space, f"route add {nic.address}/32 dev nvl src {own[nic.leaf.plane].address}")
    width = CONTROL_NET.partition("/")[2]
    batch.add("ip", lab.head, f"address add {HEAD_ADDRESS}/{width} dev ctl")
    batch.carry_out()
    route_rails(lab, ())


def route_rails(lab: Lab, dead: Collection[str]) -> None:
    """Routes of all NICs to the leaves they are not on, over all spines that both leaves can use.

    Args:
        lab: the lab.
        dead: ports of uplinks that are down; a fabric's routing protocol withdraws what led over them.
    """
    batch = Batches()
    alive = {(up.leaf.index, up.spine) for up in lab.uplinks() if up.port not in dead}
    for nic in lab.nics():
        for leaf in lab.leaves():
            if leaf.plane == nic.leaf.plane and leaf != nic.leaf:
                hops = _next_hops(lab, nic, leaf, alive)
                batch.add(
                    "ip", lab.gpu_space(nic.gpu), f"route replace {leaf.subnet} src {nic.address} {' '.join(hops)}"
                )
    batch.carry_out()


def _next_hops(lab: Lab, nic: Nic, leaf: Leaf, alive: Collection[tuple[int, int]]) -> list[str]:
    mine = range(nic.leaf.site * lab.spines, (nic.leaf.site + 1) * lab.spines)
    usable = [spine for spine in mine if (nic.leaf.index, spine) in alive]
    if leaf.site == nic.leaf.site:
        usable = [spine for spine in usable if (leaf.index, spine) in alive]
    # With no way left the old one stays: packets are lost there, as in a fabric that is cut.
    return [f"nexthop via {nic.leaf.gateway(s % lab.spines)} dev {nic.device}" for s in usable or mine]


def _configure_spines(lab: Lab) -> None:
    batch = Batches()
    for up in lab.uplinks():
        address = up.leaf.gateway(up.spine % lab.spines)
        batch.add("ip", lab.spine_space(up.spine), f"address add {address}/24 dev {up.far}")
    if lab.sites > 1:
        for spine in range(lab.sites * lab.spines):
            near, far = wan_cable(spine)
            space = lab.spine_space(spine)
            batch.add("ip", space, f"address add {near}/30 dev wan", f"route add default via {far}")
            batch.add("ip", lab.wan, f"address add {far}/30 dev s{spine}")
        for leaf in lab.leaves():
            spines = range(leaf.site * lab.spines, (leaf.site + 1) * lab.spines)
            hops = " ".join(f"nexthop via {wan_cable(spine)[0]}" for spine in spines)
            batch.add("ip", lab.wan, f"route add {leaf.subnet} {hops}")
    batch.carry_out()


def _add_turns(lab: Lab) -> None:
    """On both ends of every uplink, what comes from different inputs leaves in turns, as from a switch's crossbar."""
    batch = Batches()
    for space, device, sources in _uplink_ends(lab):
        batch.add("tc", space, f"qdisc add dev {device} root handle 1: htb default 10")
        for k, source in enumerate(sources):
            batch.add(
                "tc",
                space,
                f"filter add dev {device} parent 1: protocol ip prio 1 u32 match ip src {source} flowid 1:{0x11 + k:x}",
            )
    batch.carry_out()


def _uplink_ends(lab: Lab) -> Iterator[tuple[str, str, list[str]]]:
    """Both ends of every uplink: namespace, device, and the sources of its inputs."""
    leaves, nics = lab.leaves(), lab.nics()
    for up in lab.uplinks():
        yield lab.switches, up.port, [f"{nic.address}/32" for nic in nics if nic.leaf == up.leaf]
        yield lab.spine_space(up.spine), up.far, [leaf.subnet for leaf in leaves if leaf != up.leaf]


def shape(lab: Lab) -> None:
    """Every port at its own rate: NICs, uplinks, and the cables between sites."""
    batch = Batches()
    for nic in lab.nics():
        batch.add("tc", lab.gpu_space(nic.gpu), token_bucket(nic.device, lab.nic_rate, lab.mtu))
        batch.add("tc", lab.switches, token_bucket(nic.port, lab.nic_rate, lab.mtu))
    for space, device, _sources in _uplink_ends(lab):
        batch.add("tc", space, *turns(lab, device, lab.spine_rate))
    if lab.site_rate is not None:
        for site in lab.site_cables():
            batch.add("tc", lab.switches, token_bucket(site.port, lab.site_rate, lab.mtu))
            batch.add("tc", lab.spine_space(site.spine), token_bucket("wan", lab.site_rate, lab.mtu))
    batch.carry_out()


def token_bucket(device: str, rate: float, mtu: int) -> str:
    """The line for ``tc -batch`` that shapes what leaves by `device`, first in first out."""
    return f"qdisc replace dev {device} root tbf rate {rate:.0f}bit burst {_burst(rate, mtu)} limit {_QUEUE_BYTES}"


def turns(lab: Lab, device: str, rate: float) -> list[str]:
    """The lines that give the uplink end `device` its rate, shared evenly by the inputs that have something to send.

    Without this the FIFO's share of a TCP flow would be chance, for longer than a message lasts.
    """
    sources = next(found for _, name, found in _uplink_ends(lab) if name == device)
    burst = _burst(rate, lab.mtu)
    each = f"ceil {rate:.0f}bit burst {burst} cburst {burst} quantum {lab.mtu + 14}"
    lines = [f"class replace dev {device} parent 1: classid 1:1 htb rate {rate:.0f}bit {each}"]
    share = max(rate / (len(sources) + 1), 8e3)
    for k in range(len(sources) + 1):  # the first is everything else: ARP, and what comes from other sites
        lines.append(f"class replace dev {device} parent 1:1 classid 1:{0x10 + k:x} htb rate {share:.0f}bit {each}")
    return lines


def _burst(rate: float, mtu: int) -> int:
    """A bucket holds two packets, since what it holds passes at full speed and would make short messages look fast."""
    return max(2 * (mtu + 14), int(rate / 8 * 1e-4))


# What is there, and its end.


def state_folder(prefix: str) -> Path:
    """Where a lab's own record of itself is."""
    return _STATE / prefix


def save(lab: Lab, faults: Sequence[dict[str, Any]]) -> None:
    """Keep what was asked for, and which faults are on."""
    target = state_folder(lab.prefix) / "lab.json"
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps({"lab": json.loads(lab.as_json()), "faults": list(faults)}))
    scratch.replace(target)


def load(prefix: str) -> tuple[Lab, list[dict[str, Any]]]:
    """The lab of a prefix, and the faults that are on.

    Raises:
        LabError: if there is none.
    """
    try:
        kept = json.loads((state_folder(prefix) / "lab.json").read_text())
    except (OSError, ValueError):
        raise LabError(f"no lab {prefix!r} is up: make one with `fabric_lab.py --prefix {prefix} up`") from None
    return Lab.from_json(json.dumps(kept["lab"])), kept["faults"]


def spaces_of(prefix: str) -> list[str]:
    """The namespaces of a prefix that are there, and of no longer prefix that begins alike."""
    ours = re.compile(rf"{re.escape(prefix)}-(n\d+r\d+|spine\d+|switches|head|wan)")
    return sorted(path.name for path in _SPACES.glob(f"{prefix}-*") if ours.fullmatch(path.name))


def processes_of(prefix: str) -> set[int]:
    """Ids of all processes in a lab's namespaces."""
    found: set[int] = set()
    for space in spaces_of(prefix):
        with contextlib.suppress(LabError):  # gone meanwhile
            found |= {int(line) for line in run(["ip", "netns", "pids", space]).split()}
    return found - {os.getpid()}


def remove(prefix: str) -> list[str]:
    """End what runs in a lab, and remove it; returns the namespaces that were there."""
    spaces = spaces_of(prefix)
    for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        for process in processes_of(prefix):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while processes_of(prefix) and time.monotonic() < deadline:
            time.sleep(0.05)
    for space in spaces:
        run(["ip", "netns", "delete", space])
    shutil.rmtree(state_folder(prefix), ignore_errors=True)
    with contextlib.suppress(OSError):  # another lab is there
        _STATE.rmdir()
    return spaces
