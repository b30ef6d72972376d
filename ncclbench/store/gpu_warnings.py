"""What a GPU's states say that were noted before and after something: what throttled it, which errors it counted.

NVLink sends again what a checksum (CRC) finds to be wrong, and a good link has that now and then: of two healthy H200
every link counted some in the first minutes of a machine, and none ten minutes later. A GPU had 17 to 20 a second over
a case of six seconds, and bursts of up to 169 a second over cases of a third of one: rates need time. So a checksum is
an error by its rate, over 10 s at least. The limits are those of the health watch of NVIDIA's DCGM: 100 a second of a
GPU's checksums, and any replay or recovery.

A counter that is no whole number is not counted, and hides no other.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ncclbench.store.records import GpuState

MOST_CRC_A_SECOND = 100.0
# Over shorter times a handful would be a rate.
_SHORTEST_SECONDS = 10.0
_MOST_SHOWN = 3

_NVLINK = re.compile(r"NVLink (\d{1,4}) (.+)")
_CRC = "CRC"


def gpu_warnings(then: GpuState, now: GpuState) -> list[str]:
    """What is not as it should be; for counters ``NAME rose by NUMBER``, with NVLink's summed up over a GPU's links.

    Args:
        then: the GPU's state before, as the `gpus` of records have it.
        now: its state after; what it says to be throttled is named as well.
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
    """The same of checksums alone, over several stretches of time: each the state before it, and after.

    Rates need time: of a hundred short cases each may have fewer errors than a good link has in a second. Between the
    stretches counters may have been reset, and the GPU may have become another.
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
    """By how much each counter rose; those that fell were reset, and say nothing."""
    before, after = then.errors or {}, now.errors or {}
    both = {name: (before.get(name), value) for name, value in after.items()}
    return {name: b - a for name, (a, b) in both.items() if type(a) is int and type(b) is int and b > a}


def _seconds(then: GpuState, now: GpuState) -> float:
    """Between two states; 0 where nobody noted when they were."""
    return max(0.0, (now.clock_seconds or 0.0) - (then.clock_seconds or 0.0))


def _of_links(kind: str, links: Mapping[int, int], seconds: float) -> str:
    """The warning of one kind of error; "" if there are few enough of them."""
    total = sum(links.values())
    if kind.startswith(_CRC) and total < MOST_CRC_A_SECOND * max(_SHORTEST_SECONDS, seconds):
        return ""
    ranked = sorted(links.items(), key=lambda one: (-one[1], one[0]))
    shown = ", ".join(f"link {link}: {moved}" for link, moved in ranked[:_MOST_SHOWN])
    more = f" and {len(ranked) - _MOST_SHOWN} more" if len(ranked) > _MOST_SHOWN else ""
    return f"NVLink {kind} rose by {total} ({shown}{more})"
