"""NCCL's own log: the version that was loaded, the network that NCCL uses, and how ranks are connected.

Each process has its own log file, never stderr. Logging is switched on before NCCL starts. Variables that the user has
set keep their values.
"""

import os
import re
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import msgspec

from ncclbench.store.records import PathRecord

# INFO of these subsystems logs the set-up. COLL and TUNING would write a line per call while calls are timed.
_SUBSYSTEMS = "INIT,GRAPH,NET,P2P,SHM,NVLS,ENV"

_VERSION = re.compile(r"NCCL version ([\w.]+)")
_VIA = re.compile(r"\bvia (NET/[A-Za-z]+|P2P/[A-Za-z]+|SHM(?:/[A-Za-z]+)?|COLLNET)")
_GDR = re.compile(r"/GDRDMA\b")
# A number in brackets after the device is the rank whose NIC replaces the sender's own: PXN.
_SEND = re.compile(r"\[send\] via NET/\w+/\d+(\(\d+\))?")
# NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE: NCCL uses verbs over both, and calls both NET/IB.
_LINK_LAYER = re.compile(r"\]\w+:\d+/(IB|RoCE)\b")
_NETWORK = re.compile(r"Using network (\S+)")
_CHANNELS = re.compile(r"(\d+) coll channels, (\d+) collnet channels, (\d+) nvls channels, (\d+) p2p channels")
_NVLS_OFF = re.compile(r"NVLS multicast support is not available")
_NVLS_ON = re.compile(r"NVLS multicast support is available")
# With this, NCCL does not check for NVLS and prints neither of the two lines above.
_NVLS_SWITCHED_OFF = re.compile(r"NCCL_NVLS_ENABLE set by environment to 0\b")
# Printed only if the user sets NCCL_DEBUG_SUBSYS=TUNING.
_TUNING = re.compile(r"(\w+): (\d+) Bytes -> Algo (\S+) proto (\S+)")
_WARNING = re.compile(r"NCCL WARN (.*)")


def parse_nccl_log(lines: Iterable[str]) -> PathRecord | None:
    """What the lines of an NCCL log say of the path; None if they say nothing.

    `PathRecord.nvls_switched_off` is set by a variable or by NCCL's configuration file, not by missing hardware.
    """
    found: dict[str, object] = {}
    lists: dict[str, set[str]] = {"links": set(), "calls": set(), "warnings": set(), "link_layer": set()}
    for line in lines:
        if match := _VERSION.search(line):
            found["version"] = match[1]
        if match := _NETWORK.search(line):
            found["network"] = match[1]
        if match := _CHANNELS.search(line):
            found["channels"] = int(match[1])
        _note_nvls(line, found)
        lists["calls"] |= {f"{op} {algorithm}/{protocol}" for op, _, algorithm, protocol in _TUNING.findall(line)}
        lists["warnings"] |= set(_WARNING.findall(line))
        lists["link_layer"] |= set(_LINK_LAYER.findall(line))
        _note_link(line, lists["links"], found)
    found |= {name: sorted(values) for name, values in lists.items() if values}
    return msgspec.convert(found, PathRecord) if found else None


def _note_nvls(line: str, found: dict[str, object]) -> None:
    """Whether NVLink SHARP is available; if not, whether a setting disables it."""
    if _NVLS_SWITCHED_OFF.search(line):
        found |= {"nvls": False, "nvls_switched_off": True}
    elif (_NVLS_ON.search(line) or _NVLS_OFF.search(line)) and not found.get("nvls_switched_off"):
        found |= {"nvls": bool(_NVLS_ON.search(line)), "nvls_switched_off": False}


def _note_link(line: str, links: set[str], found: dict[str, object]) -> None:
    """How two ranks are connected, and whether by GPUDirect RDMA and PXN."""
    match = _VIA.search(line)
    if match is None:
        return
    links.add(match[1])
    if match[1].startswith("NET/"):
        found["gdr"] = bool(_GDR.search(line)) or found.get("gdr", False)
    if send := _SEND.search(line):
        found["pxn"] = bool(send[1]) or found.get("pxn", False)


class NcclLog:
    """This process's log file, which is read repeatedly as it grows."""

    def __init__(self, path: Path, ours: bool) -> None:
        """Read `path`; `ours` if `remove` must delete it."""
        self.path, self._ours = path, ours

    @classmethod
    def switch_on(cls, environ: MutableMapping[str, str] = os.environ) -> "NcclLog":
        """Have NCCL write its log; must be called before NCCL reads its variables, which it does once."""
        given = environ.get("NCCL_DEBUG_FILE")
        if given and "%" not in given:
            return cls(Path(given), ours=False)
        path = Path(tempfile.gettempdir()) / f"ncclbench-nccl-{os.getpid()}.log"
        environ["NCCL_DEBUG_FILE"] = str(path)
        if environ.get("NCCL_DEBUG", "VERSION").upper() in ("VERSION", "WARN"):
            environ["NCCL_DEBUG"] = "INFO"
        environ.setdefault("NCCL_DEBUG_SUBSYS", _SUBSYSTEMS)
        return cls(path, ours=True)

    def read(self) -> PathRecord | None:
        """What the log says so far; None if NCCL has written nothing."""
        try:
            with self.path.open(errors="replace") as file:
                return parse_nccl_log(file)
        except OSError:
            return None

    def remove(self) -> None:
        """Delete the file unless the user named it."""
        if self._ours:
            self.path.unlink(missing_ok=True)
