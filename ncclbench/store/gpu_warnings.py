"""Warnings from the states of a GPU before and after a case: throttling, and error counters that rose.

NVLink retransmits data if a checksum (CRC) is wrong, and a good link does so at times. On two healthy H200, every link
counted some errors in the first minutes after the machine started, and none ten minutes later. Per GPU there were 17 to
20 per second over a case of 6 s, and bursts of up to 169 per second over cases of 1/3 s. A rate over a short time is
therefore not reliable, and checksum errors are judged by their rate over at least 10 s. The limits are those of the
health watch of NVIDIA's DCGM: 100 checksum errors per second and GPU, and any replay or recovery.

A counter that is no integer is ignored; the other counters are still read.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ncclbench.store.records import GpuState

MOST_CRC_A_SECOND = 100.0
# Over a shorter time, a few errors would be a high rate.
_SHORTEST_SECONDS = 10.0
_MOST_SHOWN = 3

_NVLINK = re.compile(r"NVLink (\d{1,4}) (.+)")
_CRC = "CRC"


def gpu_warnings(then: GpuState, now: GpuState) -> list[str]:
    """The warnings of a GPU; for a counter ``NAME rose by NUMBER``, summed over the GPU's links for NVLink.

    Args:
        then: the GPU's state before, as in the `gpus` of a record.
        now: its state after; its throttling reasons are among the warnings.
    """
    by_kind: dict[str, Counter[int]] = {}
    warnings = []
    for counter, moved in _moved(then, now).items():
        if match := _NVLINK.fullmatch(counter):
            by_kind.setdefault(match[2], Counter())[int(match[1])] += moved
        else:
            warnings.append(f"{counter} rose by {moved}")
    seconds = _seconds(then, now)
    links = [_of_links(kind, links, seconds) for kind, links in by_kind.items()]
    return [*(now.throttled or []), *warnings, *filter(None, links)]


def crc_warnings(states: Sequence[tuple[GpuState, GpuState]]) -> list[str]:
    """The warnings of checksum errors over several cases, each with the states before and after it.

    A rate needs time: each of many short cases may have too few errors for a warning of its own. Only differences
    within a case are added, since between cases counters may be reset or the GPU may be replaced.
    """
    by_kind: dict[str, Counter[int]] = {}
    for then, now in states:
        for counter, moved in _moved(then, now).items():
            match = _NVLINK.fullmatch(counter)
            if match and match[2].startswith(_CRC):
                by_kind.setdefault(match[2], Counter())[int(match[1])] += moved
    seconds = sum(_seconds(then, now) for then, now in states)
    return list(filter(None, (_of_links(kind, links, seconds) for kind, links in by_kind.items())))


def _moved(then: GpuState, now: GpuState) -> dict[str, int]:
    """The increase of each counter that rose; a counter that fell was reset and is ignored."""
    before, after = then.errors or {}, now.errors or {}
    both = {name: (before.get(name), value) for name, value in after.items()}
    return {name: b - a for name, (a, b) in both.items() if type(a) is int and type(b) is int and b > a}


def _seconds(then: GpuState, now: GpuState) -> float:
    """The time between two states; 0 if a state has no time."""
    return max(0.0, (now.clock_seconds or 0.0) - (then.clock_seconds or 0.0))


def _of_links(kind: str, links: Mapping[int, int], seconds: float) -> str:
    """The warning of one kind of error; "" if the number is below the limit."""
    total = sum(links.values())
    if kind.startswith(_CRC) and total < MOST_CRC_A_SECOND * max(_SHORTEST_SECONDS, seconds):
        return ""
    ranked = sorted(links.items(), key=lambda one: (-one[1], one[0]))
    shown = ", ".join(f"link {link}: {moved}" for link, moved in ranked[:_MOST_SHOWN])
    more = f" and {len(ranked) - _MOST_SHOWN} more" if len(ranked) > _MOST_SHOWN else ""
    return f"NVLink {kind} rose by {total} ({shown}{more})"
