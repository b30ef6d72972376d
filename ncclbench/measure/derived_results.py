"""Results derived from the samples of phases: flows, groups, subtotals, ratios, and rates as others define them.

Point-to-point patterns are never averaged over flows: each flow and each group of a variant has its own result.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ncclbench.analysis.summary import MICRO, Floats, summarise
from ncclbench.measure.sampling import Samples
from ncclbench.schedule.phases import Collective, Exchange, Ints, Phase
from ncclbench.schedule.rates import alg_gb_per_s
from ncclbench.schedule.schedule import Schedule
from ncclbench.store.records import ComparableRate, FlowTimes, GroupMedian, Subtotal, Summary

# Flows summarised at once. Thousands of flows with a thousand samples each would take gigabytes.
_BLOCK = 256


def flow_results(label: str, variants: Sequence[Schedule], samples: Samples) -> FlowTimes | None:
    """Medians of each flow of the exchange called `label`; None where the samples do not separate flows."""
    phase, seconds_RN = _samples_of(label, variants, samples)
    if not isinstance(phase, Exchange) or np.all(phase.src == phase.dst):
        return None
    wire = phase.src != phase.dst
    src, dst = phase.src[wire], phase.dst[wire]
    ends_R = np.median(seconds_RN, axis=1) * MICRO
    return FlowTimes(
        src=src.tolist(),
        dst=dst.tolist(),
        nbytes=phase.nbytes[wire].tolist(),
        p50_us=_longer_ends(seconds_RN, src, dst).tolist(),
        send_p50_us=ends_R[src].tolist(),
        recv_p50_us=ends_R[dst].tolist(),
    )


def group_medians(label: str, variants: Sequence[Schedule], samples: Samples) -> list[GroupMedian] | None:
    """The median of each group of the collective called `label`; None for other phases, and without variants."""
    if len(variants) == 1:
        return None  # they are in the record's own `groups`
    phase, seconds_RN = _samples_of(label, variants, samples)
    if not isinstance(phase, Collective):
        return None
    return [
        GroupMedian(ranks=ranks.tolist(), p50_us=float(np.median(seconds_RN[ranks].max(axis=0)) * MICRO))
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
    """The named sums of phases; empty where phases were not timed separately.

    Each rank's durations are added up before the slowest rank is taken: a rank that is late in one phase waits less in
    the next.
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
    """Rates as other programs define them: mean bytes per variant over the median of a phase or subtotal."""
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
    """The ratios of medians that a pattern asks for, where both were timed."""
    found = {}
    for variant in variants:
        for name, (over, under) in variant.ratios.items():
            one, other = times_us.get(over), times_us.get(under)
            if one is not None and other is not None and other.p50 > 0:
                found[name] = one.p50 / other.p50
    return found
