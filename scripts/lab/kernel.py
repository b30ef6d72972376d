"""Make a lab's namespaces, cables, bridges and routes, and remove all of them.

The kernel holds the state: namespaces with the lab's prefix, and the processes in them. In addition, one folder under
/run has the configuration and the active faults. So `remove` also works after the process that made the lab was killed.
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
# A port's queue holds whole messages: the emulated fabric itself loses nothing.
_QUEUE_BYTES = 1 << 23
_TERM_SECONDS, _KILL_SECONDS = 3.0, 5.0

# Settings of every namespace:
# - the same congestion control everywhere, because the machine's default varies;
# - windows stay open between messages, and no metrics of a peer are kept, so a healed fault has no effect;
# - buffers hold whole messages, so the kernel moves them while ranks wait for a core (there are more ranks than cores);
# - retransmissions at least every second (since Linux 6.15), so connections continue soon after a link is up again;
# - no IPv6, because its own messages would be counted.
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
    """The reason why this machine cannot have a lab, or None."""
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
    """Run a command with `lines` as its input; returns its stdout.

    Raises:
        LabError: with the first lines of its error message.
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
    """Lines for ``ip -batch`` and ``tc -batch``, collected per namespace and executed together."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, tool: str, space: str, *lines: str) -> None:
        """Collect `lines` of `tool` (``ip`` or ``tc``) for a namespace."""
        self._lines[tool, space] += lines

    def carry_out(self) -> None:
        """Execute all lines and clear them."""
        collected, self._lines = self._lines, defaultdict(list)
        for (tool, space), lines in collected.items():
            run([tool, "-n", space, "-batch", "-"], lines)


# Making it.


def make(lab: Lab) -> None:
    """Make the lab; on a failure or Ctrl-C, remove all of it.

    Raises:
        LabError: if it exists already, or the kernel refuses something.
    """
    if spaces_of(lab.prefix) or state_folder(lab.prefix).exists():
        raise LabError(f"a lab {lab.prefix!r} already exists: take it down first, or give another --prefix")
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
        # A kernel without IPv6 lacks those files; the script continues.
        script = [f"echo {value} 2>/dev/null >/proc/sys/net/{name}" for name, value in settings.items()]
        in_space(space, ["sh"], [*script, "ip link set lo up"])


def _make_cables(lab: Lab) -> None:
    """Make all bridges and cables. One end of a cable is at a switch, or routes between the sites."""
    batch, far_ends = Batches(), Batches()  # a cable must exist before its far end is set up
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
    """Every cable that ends at a switch: its port there, namespace and device of the far end, and the switch."""
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
    """Add a pair of veth devices. With gso_max_segs 1, single packets are counted, shaped and dropped, as on a wire."""
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
    """Set the routes of all NICs to all other leaves, over all spines that both leaves can use.

    Args:
        lab: the lab.
        dead: ports of uplinks that are down; a routing protocol withdraws the routes over them.
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
    # Without any usable spine the old route stays: packets are lost there, as in a partitioned fabric.
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
    """Serve the inputs of both ends of every uplink in turn, as a switch's crossbar does."""
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
    """Set the rate of every port: NICs, uplinks, and the cables between sites."""
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
    """The line for ``tc -batch`` that shapes the output of `device`, first in first out."""
    return f"qdisc replace dev {device} root tbf rate {rate:.0f}bit burst {_burst(rate, mtu)} limit {_QUEUE_BYTES}"


def turns(lab: Lab, device: str, rate: float) -> list[str]:
    """The lines that set the rate of the uplink end `device`, shared evenly by its active inputs.

    With a FIFO, the share of a TCP flow would be random for longer than a message lasts.
    """
    sources = next(found for _, name, found in _uplink_ends(lab) if name == device)
    burst = _burst(rate, lab.mtu)
    each = f"ceil {rate:.0f}bit burst {burst} cburst {burst} quantum {lab.mtu + 14}"
    lines = [f"class replace dev {device} parent 1: classid 1:1 htb rate {rate:.0f}bit {each}"]
    share = max(rate / (len(sources) + 1), 8e3)
    for k in range(len(sources) + 1):  # the first is for everything else: ARP, and packets from other sites
        lines.append(f"class replace dev {device} parent 1:1 classid 1:{0x10 + k:x} htb rate {share:.0f}bit {each}")
    return lines


def _burst(rate: float, mtu: int) -> int:
    """Size of the bucket: two packets. Its content passes at full speed; with more, short messages look fast."""
    return max(2 * (mtu + 14), int(rate / 8 * 1e-4))


# Look-up and removal.


def state_folder(prefix: str) -> Path:
    """The folder of a lab's stored state."""
    return _STATE / prefix


def save(lab: Lab, faults: Sequence[dict[str, Any]]) -> None:
    """Store the configuration and the active faults."""
    target = state_folder(lab.prefix) / "lab.json"
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps({"lab": json.loads(lab.as_json()), "faults": list(faults)}))
    scratch.replace(target)


def load(prefix: str) -> tuple[Lab, list[dict[str, Any]]]:
    """The lab of a prefix, and its active faults.

    Raises:
        LabError: if there is none.
    """
    try:
        kept = json.loads((state_folder(prefix) / "lab.json").read_text())
    except (OSError, ValueError):
        raise LabError(f"no lab {prefix!r} is up: make one with `fabric_lab.py --prefix {prefix} up`") from None
    return Lab.from_json(json.dumps(kept["lab"])), kept["faults"]


def spaces_of(prefix: str) -> list[str]:
    """The existing namespaces of a prefix, without those of a longer prefix that begins with it."""
    ours = re.compile(rf"{re.escape(prefix)}-(n\d+r\d+|spine\d+|switches|head|wan)")
    return sorted(path.name for path in _SPACES.glob(f"{prefix}-*") if ours.fullmatch(path.name))


def processes_of(prefix: str) -> set[int]:
    """Ids of all processes in a lab's namespaces."""
    found: set[int] = set()
    for space in spaces_of(prefix):
        with contextlib.suppress(LabError):  # removed meanwhile
            found |= {int(line) for line in run(["ip", "netns", "pids", space]).split()}
    return found - {os.getpid()}


def remove(prefix: str) -> list[str]:
    """End all processes in a lab and remove it; returns its former namespaces."""
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
    with contextlib.suppress(OSError):  # another lab exists
        _STATE.rmdir()
    return spaces
