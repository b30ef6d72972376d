"""What a record says beyond the times of its phases: flows and groups, subtotals, rates as others define them, ratios.

Point-to-point patterns are never averaged over flows: each flow and group of a variant has a result by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ncclbench.analysis.summary import MICRO, Floats, summarise
from ncclbench.measure.sampling import Samples
from ncclbench.schedule.phases import Collective, Exchange, Ints, Phase
from ncclbench.schedule.rates import alg_gb_per_s
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import ComparableRate, Subtotal, Summary

# Flows summarised at once: of thousands with a thousand samples each, all would be gigabytes.
_BLOCK = 256


def flow_results(label: str, variants: Sequence[Schedule], samples: Samples) -> dict[str, Any] | None:
    """Medians of each flow of the exchange called `label`; None where flows cannot be told apart.

    Keys, lists of one entry a flow: ``src``, ``dst``, ``nbytes``, ``p50_us`` (of the longer of the two ends'
    durations in each iteration), ``send_p50_us`` and ``recv_p50_us`` (of each end by itself).
    """
    phase, seconds_RN = _samples_of(label, variants, samples)
    if not isinstance(phase, Exchange) or np.all(phase.src == phase.dst):
        return None
    wire = phase.src != phase.dst
    src, dst = phase.src[wire], phase.dst[wire]
    ends_R = np.median(seconds_RN, axis=1) * MICRO
    return {
        "src": src.tolist(),
        "dst": dst.tolist(),
        "nbytes": phase.nbytes[wire].tolist(),
        "p50_us": _longer_ends(seconds_RN, src, dst).tolist(),
        "send_p50_us": ends_R[src].tolist(),
        "recv_p50_us": ends_R[dst].tolist(),
    }


def group_medians(label: str, variants: Sequence[Schedule], samples: Samples) -> list[dict[str, Any]] | None:
    """Ranks and median of each group of the collective called `label`, of a case with variants; None elsewhere."""
    if len(variants) == 1:
        return None  # the record's own `groups` has them
    phase, seconds_RN = _samples_of(label, variants, samples)
    if not isinstance(phase, Collective):
        return None
    return [
        {"ranks": ranks.tolist(), "p50_us": float(np.median(seconds_RN[ranks].max(axis=0)) * MICRO)}
        for ranks in phase.groups
    ]


def _samples_of(label: str, variants: Sequence[Schedule], samples: Samples) -> tuple[Phase | None, Floats]:
    """The one phase called `label`, and its durations, shape (R, iterations); no phase if it was not timed alone."""
    owners = [(k, phase) for k, one in enumerate(variants) for phase in one.phases if phase.label == label]
    column = samples.labels.index(label) if label in samples.labels else 0
    if len(owners) != 1 or samples.mixed or (column == 0 and len(variants[owners[0][0]].phases) > 1):
        return None, np.empty((0, 0))
    turn, phase = owners[0]
    return phase, samples.seconds_RNK[:, turn :: len(variants), column]


def _longer_ends(seconds_RN: Floats, src: Ints, dst: Ints) -> Floats:
    blocks = [slice(k, k + _BLOCK) for k in range(0, len(src), _BLOCK)]
    medians = [np.median(np.maximum(seconds_RN[src[b]], seconds_RN[dst[b]]), axis=1) for b in blocks]
    return np.asarray(np.concatenate(medians) * MICRO, dtype=np.float64)


def subtotals_of(variants: Sequence[Schedule], samples: Samples) -> dict[str, Subtotal]:
    """The named sums of phases; none where phases were not timed by themselves.

    A rank's durations are added up first and the slowest rank is taken then: a rank that was late in one phase has
    waited less in the next.
    """
    named: dict[str, tuple[str, ...]] = {}
    for variant in variants:
        named |= variant.subtotals
    found = {}
    for name, labels in named.items():
        columns = [samples.labels.index(label) for label in labels if label in samples.labels]
        if columns and len(columns) == len(labels):
            seconds_N = samples.seconds_RNK[:, :, columns].sum(axis=2).max(axis=0)
            found[name] = Subtotal(labels=list(labels), time_us=summarise(seconds_N[~np.isnan(seconds_N)]))
    return found


def comparable_of(variants: Sequence[Schedule], times_us: Mapping[str, Summary | None]) -> dict[str, ComparableRate]:
    """Rates as others define them, over the median of a phase or subtotal in `times_us`; bytes are a mean variant's."""
    found = {}
    for name, one in variants[0].comparable.items():
        time_us = times_us.get(one.over)
        sizes = [variant.comparable[name].nbytes for variant in variants if name in variant.comparable]
        mean = round(sum(sizes) / len(sizes))
        if time_us is not None and time_us.p50 > 0:
            rate = alg_gb_per_s(mean, time_us.p50 / MICRO)
            found[name] = ComparableRate(gb_per_s=rate, bytes=mean, over=one.over, definition=one.definition)
    return found


def ratios_of(variants: Sequence[Schedule], times_us: Mapping[str, Summary | None]) -> dict[str, float]:
    """The medians that a pattern wants divided, where both were timed."""
    found = {}
    for variant in variants:
        for name, (over, under) in variant.ratios.items():
            one, other = times_us.get(over), times_us.get(under)
            if one is not None and other is not None and other.p50 > 0:
                found[name] = one.p50 / other.p50
    return found
