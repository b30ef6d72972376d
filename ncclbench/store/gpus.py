"""What a GPU's states say that were noted before and after something: what throttled it, which errors it counted.

NVLink sends again what a checksum (CRC) finds to be wrong, and a good link has that now and then: of two healthy H200
every link counted some in the first minutes of a machine, a GPU up to 90 a second, and none from then on. So a checksum
is an error by its rate. The limits are those of the health watch of NVIDIA's DCGM: 100 a second of a GPU's checksums,
and any replay or recovery.
"""

import re
from collections.abc import Mapping
from typing import Any

MOST_CRC_A_SECOND = 100.0
# Over shorter times a handful would be a rate.
_SHORTEST_SECONDS = 10.0
_MOST_SHOWN = 3

_NVLINK = re.compile(r"NVLink (\d+) (.+)")


def gpu_warnings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it should be; for counters ``NAME rose by NUMBER``, with NVLink's summed up over a GPU's links.

    Args:
        then: the GPU's state before, as the `gpus` of records have it.
        now: its state after; what it says to be throttled is named as well.
    """
    warnings = [str(reason) for reason in now.get("throttled") or []]
    by_kind: dict[str, dict[int, int]] = {}
    before = then.get("errors") or {}
    for counter, value in (now.get("errors") or {}).items():
        moved = value - before.get(counter, value)
        if moved <= 0:
            continue
        if match := _NVLINK.fullmatch(counter):
            by_kind.setdefault(match[2], {})[int(match[1])] = moved
        else:
            warnings.append(f"{counter} rose by {moved}")
    seconds = max(_SHORTEST_SECONDS, (now.get("clock_seconds") or 0.0) - (then.get("clock_seconds") or 0.0))
    for kind, links in by_kind.items():
        total = sum(links.values())
        if not kind.startswith("CRC") or total >= MOST_CRC_A_SECOND * seconds:
            warnings.append(f"NVLink {kind} rose by {total} ({_most_of(links)})")
    return warnings


def _most_of(links: Mapping[int, int]) -> str:
    """The links that count most."""
    ranked = sorted(links.items(), key=lambda one: (-one[1], one[0]))
    shown = ", ".join(f"link {link}: {moved}" for link, moved in ranked[:_MOST_SHOWN])
    return shown + (f" and {len(ranked) - _MOST_SHOWN} more" if len(ranked) > _MOST_SHOWN else "")
